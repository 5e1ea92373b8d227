"""The model as a graph for TensorBoard, recorded from one forward pass: a node is an operation as the source writes it.

`torch.jit.trace`, as in `SummaryWriter.add_graph`, turns data-dependent routing into hundreds of primitive operations.
"""

from collections import Counter
from contextlib import ExitStack
from itertools import accumulate, chain
from typing import Any

import torch
from tensorboard.compat.proto.attr_value_pb2 import AttrValue
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.compat.proto.node_def_pb2 import NodeDef
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


def trace_graph(model: nn.Module, *inputs: Any) -> GraphDef:
    """Return the graph of `model(*inputs)`, leave the model as it is. The inside of compiled kernels is missing."""
    recorder = Recorder(model, inputs)
    with ExitStack() as undo:
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        model.eval()
        undo.callback(register_module_forward_pre_hook(recorder.enter_module).remove)
        undo.callback(register_module_forward_hook(recorder.leave_module).remove)
        with torch.no_grad(), recorder:
            model(*inputs)
    return GraphDef(node=shorten_names(recorder.nodes), versions={"producer": 22})


class Recorder(TorchFunctionMode):
    """Records every operation under it as a node, without views; a tensor's producer last wrote its storage."""

    def __init__(self, model: nn.Module, inputs: tuple) -> None:
        super().__init__()
        self.nodes: list[NodeDef] = []
        self.names: Counter[str] = Counter()
        self.module_names = {module: name for name, module in model.named_modules()}
        self.scopes = [""]  # of the modules that run: "", "blocks.0/", "blocks.0/mixer/"
        self.producer: dict[int, str] = {}
        self.weights = {storage_id(parameter) for parameter in model.parameters()}
        self.alive: list[Tensor] = []  # keeps every storage, so that no address is reused
        for name, tensor in zip(("tokens", "targets"), tensors_in(inputs), strict=False):
            self.add(name, "input", [], [tensor])

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = function(*args, **(kwargs or {}))
        name, inputs = getattr(function, "__name__", "operation"), tensors_in((args, kwargs))
        in_place = (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__iadd__")
        written = inputs[:1] if name == "__setitem__" else tensors_in(output)
        viewed = set() if in_place else {storage_id(tensor) for tensor in inputs}
        outputs = [tensor for tensor in written if storage_id(tensor) not in viewed]
        if outputs:
            self.add(name.strip("_"), name.strip("_"), inputs, outputs)
        return output

    def enter_module(self, module: nn.Module, _args: tuple) -> None:
        """Make the module a scope of the graph until `leave_module`."""
        outer, name = self.scopes[-1], self.module_names[module]
        self.scopes.append(f"{outer}{name.removeprefix(outer.replace('/', '.'))}/" if name else "")

    def leave_module(self, _module: nn.Module, _args: tuple, _output: Any) -> None:
        self.scopes.pop()

    def add(self, name: str, operation: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Add a node in the current scope and make it the producer of the outputs."""
        name = self.scopes[-1] + name
        self.names[name] += 1
        name = name if self.names[name] == 1 else f"{name}_{self.names[name] - 1}"
        sources = dict.fromkeys(self.producer[storage_id(t)] for t in inputs if storage_id(t) in self.producer)
        n_parameters = sum(tensor.numel() for tensor in inputs if storage_id(tensor) in self.weights)
        shapes = [{"dim": [{"size": size} for size in tensor.shape]} for tensor in outputs]
        attributes = {"_output_shapes": AttrValue(list={"shape": shapes})}
        if n_parameters:
            attributes["parameters"] = AttrValue(i=n_parameters)
        self.nodes.append(NodeDef(name=name, op=operation, input=list(sources), attr=attributes))
        self.producer |= {storage_id(tensor): name for tensor in outputs}
        self.alive += outputs


def storage_id(tensor: Tensor) -> int:
    """Return a number that all views of the same memory share."""
    return tensor.untyped_storage()._cdata


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and dicts."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def shorten_names(nodes: list[NodeDef]) -> list[NodeDef]:
    """Name each node by the outermost scope that contains no other node."""
    # "a/b/c" is in the scopes "a" and "a/b".
    scopes = {node.name: list(accumulate(node.name.split("/")[:-1], "{}/{}".format)) for node in nodes}
    n_nodes = Counter(chain.from_iterable(scopes.values()))
    short = {name: next((scope for scope in scopes[name] if n_nodes[scope] == 1), name) for name in scopes}
    for node in nodes:
        node.input[:] = [short[name] for name in node.input]
        node.name = short[node.name]
    return nodes

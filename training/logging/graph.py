"""The model as a graph that TensorBoard can draw, recorded from one forward.

`torch.jit.trace`, which `SummaryWriter.add_graph` uses, is deprecated and bakes data-dependent routing
into a tangle of primitive operations. Here a node is an operation as the source writes it, in the scope
of the module that calls it; views are left out, and a module with one operation is that node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from tensorboard.compat.proto.attr_value_pb2 import AttrValue
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.compat.proto.node_def_pb2 import NodeDef
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.versions_pb2 import VersionDef
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def record(model: nn.Module, *inputs: Any) -> GraphDef:
    """The graph of `model(*inputs)`. The model is neither trained nor compiled by it, nor its dropout drawn."""
    recorder = Recorder(model, inputs)
    training = [module for module in model.modules() if module.training]
    with ExitStack() as undo:
        for module in training:
            undo.callback(setattr, module, "training", True)
        model.eval()
        for name, module in model.named_modules():
            for handle in recorder.watch(name, module):
                undo.callback(handle.remove)
        with torch.no_grad(), recorder:
            model(*inputs)
    return GraphDef(node=shortened(recorder.nodes), versions=VersionDef(producer=22))


class Recorder(TorchFunctionMode):
    """Records every operation under it as a node. A tensor's producer is who last wrote its storage."""

    def __init__(self, model: nn.Module, inputs: tuple) -> None:
        super().__init__()
        self.nodes: list[NodeDef] = []
        self.names: Counter[str] = Counter()
        self.scopes: list[tuple[str, str]] = []  # (name in the model, name in the graph)
        self.producer: dict[int, str] = {}
        self.weights = {storage(parameter) for parameter in model.parameters()}
        self.alive: list[Tensor] = []  # so that no storage's address is used twice
        for name, tensor in zip(("tokens", "targets"), tensors(inputs), strict=False):
            self.add(name, "input", [], [tensor])

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "operation")
        inputs = list(tensors((args, kwargs)))
        in_place = (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__iadd__")
        written = inputs[:1] if name == "__setitem__" else list(tensors(output))
        seen = set() if in_place else {storage(tensor) for tensor in inputs}
        outputs = [tensor for tensor in written if storage(tensor) not in seen]
        if outputs:
            self.add(name.strip("_"), name.strip("_"), inputs, outputs)
        return output

    def watch(self, name: str, module: nn.Module) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Make the module a scope of the graph."""

        def enter(_module: nn.Module, _args: tuple) -> None:
            outer, scope = self.scopes[-1] if self.scopes else ("", "")
            relative = name.removeprefix(f"{outer}.")
            self.scopes.append((name, f"{scope}{relative}/" if name else ""))

        def leave(_module: nn.Module, _args: tuple, _output: Any) -> None:
            self.scopes.pop()

        yield module.register_forward_pre_hook(enter)
        yield module.register_forward_hook(leave)

    def add(self, name: str, operation: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Add a node in the present scope and make it the producer of the outputs."""
        name = (self.scopes[-1][1] if self.scopes else "") + name
        self.names[name] += 1
        name = name if self.names[name] == 1 else f"{name}_{self.names[name] - 1}"
        sources = dict.fromkeys(self.producer[storage(t)] for t in inputs if storage(t) in self.producer)
        weights = sum(tensor.numel() for tensor in inputs if storage(tensor) in self.weights)
        dims = ([TensorShapeProto.Dim(size=size) for size in tensor.shape] for tensor in outputs)
        shapes = AttrValue.ListValue(shape=[TensorShapeProto(dim=dim) for dim in dims])
        attributes = {"_output_shapes": AttrValue(list=shapes)}
        if weights:
            attributes["parameters"] = AttrValue(i=weights)
        self.nodes.append(NodeDef(name=name, op=operation, input=list(sources), attr=attributes))
        self.producer |= {storage(tensor): name for tensor in outputs}
        self.alive += outputs


def storage(tensor: Tensor) -> int:
    """What two views of the same memory share."""
    return tensor.untyped_storage()._cdata


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples, dicts and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)
    elif is_dataclass(value):
        yield from tensors([getattr(value, field.name) for field in fields(value)])


def shortened(nodes: list[NodeDef]) -> list[NodeDef]:
    """The nodes, each named by the outermost scope that holds nothing else."""
    held = Counter(scope for node in nodes for scope in scopes(node.name))

    def short(name: str) -> str:
        return next((scope for scope in scopes(name) if held[scope] == 1), name)

    for node in nodes:
        node.input[:] = [short(name) for name in node.input]
        node.name = short(node.name)
    return nodes


def scopes(name: str) -> list[str]:
    """`a/b/c` lies in `a` and in `a/b`."""
    parts = name.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]

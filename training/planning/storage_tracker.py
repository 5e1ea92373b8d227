"""Counting of the memory that real or fake tensors hold."""

import weakref
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorage(NamedTuple):
    """A storage that is still referenced."""

    reference: weakref.ref
    kind: str
    n_bytes: int  # on this rank


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of all storages that operations create, by kind, until they are freed."""

    def __init__(self, is_sharded: bool = False):
        super().__init__()
        self.kind = "activations"  # of new storages
        self.is_sharded = is_sharded  # by FSDP2
        self.live: dict[int, LiveStorage] = {}
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in self.live:
                self.count(tensor, *self._kind_and_share(func, args))
        return out

    def count(self, tensor: Tensor, kind: str, share: float = 1.0) -> None:
        """Count a tensor's storage, of which this rank has a share, as `kind` from now on."""
        storage = tensor.untyped_storage()
        key, n_bytes = id(storage), round(storage.nbytes() * share)
        if key in self.live:
            self._drop(key)
        self.live[key] = LiveStorage(weakref.ref(storage, lambda _: self._drop(key)), kind, n_bytes)
        self.now[kind] += n_bytes
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()

    def _drop(self, key: int) -> None:
        storage = self.live.pop(key)
        self.now[storage.kind] -= storage.n_bytes

    def _kind_and_share(self, func: Any, args: tuple) -> tuple[str, float]:
        """Return (kind, share) for an operation's result. If all its inputs are weights, the result is a cast of them.

        Under FSDP2 a cast of weights takes no memory of its own: it gathers them in the compute dtype.
        """
        if self.kind != "activations":
            return self.kind, 1.0
        inputs = [self.live.get(id(x.untyped_storage())) for x in tree_leaves(args) if isinstance(x, Tensor)]
        kinds = {None if storage is None else storage.kind for storage in inputs}
        if not kinds or not kinds <= {"weights", "casts"}:
            return self.kind, 1.0
        is_gathered = self.is_sharded and kinds == {"weights"} and func is torch.ops.aten._to_copy.default
        return "casts", 0.0 if is_gathered else 1.0

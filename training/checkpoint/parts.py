"""What a process has of a tensor, and files of tensors.

A file is in the format of safetensors (github.com/huggingface/safetensors): the header's length in 8 bytes, a header
of JSON, the tensors' bytes. It is written here to be hashed on the way, and from pieces that are never all in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

MANIFEST = "manifest.json"
KINDS = ("model", "optimizer")
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class TensorShard(NamedTuple):
    """Rows of a tensor, along its first dimension; a scalar is whole."""

    tensor: Tensor
    start: int
    shape: torch.Size  # of the whole
    is_owner: bool  # whether this process is the one that writes it, of those that hold it

    @property
    def n_bytes(self) -> int:
        """Of the whole."""
        return self.shape.numel() * self.tensor.element_size()


class WriterGroup(NamedTuple):
    """The processes that write a checkpoint together."""

    rank: int
    size: int
    gather_bytes: Callable[[bytes], list[bytes]]  # every process's bytes, on all; called from the thread that writes


SINGLE = WriterGroup(0, 1, lambda data: [data])


class Entry(NamedTuple):
    """A tensor to be written, in pieces that follow each other."""

    dtype: torch.dtype
    shape: torch.Size
    pieces: Iterable[Tensor]


class Written(NamedTuple):
    """A file, as the manifest has it."""

    sha256: str
    bytes: int


def write_tensors(path: Path, entries: dict[str, Entry]) -> Written:
    """Write a file, durably."""
    header, end = {}, 0
    for name, (dtype, shape, _) in entries.items():
        start, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return write_bytes(path, [len(text).to_bytes(8, "little"), text], entries)


def write_bytes(path: Path, first: list[bytes], entries: dict[str, Entry] | None = None) -> Written:
    """Write these bytes and then the entries' tensors, durably."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for chunk in _chunks(first, entries or {}):
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return Written(digest.hexdigest(), size)


def _chunks(first: list[bytes], entries: dict[str, Entry]) -> Iterator[bytes | memoryview]:
    yield from first
    for entry in entries.values():
        for piece in entry.pieces:
            if piece.numel():
                yield memoryview(piece.contiguous().reshape(-1).view(torch.uint8).numpy())

"""Write safetensors files (github.com/huggingface/safetensors) and hash them in one pass.

`safetensors.torch.save_file` needs all tensors of a file in memory and a second pass for the hash. These functions hold
one piece of a tensor at a time, sync the file and raise the system's own OSError if the disk is full.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class TensorPieces(NamedTuple):
    """A tensor to write, in pieces of consecutive rows."""

    dtype: torch.dtype
    shape: torch.Size
    pieces: Iterable[Tensor]


def write_tensors(path: Path, tensors: dict[str, TensorPieces]) -> dict[str, str | int]:
    """Write a safetensors file durably; return its manifest entry."""
    header, stop = {}, 0
    for name, (dtype, shape, _) in tensors.items():
        start, stop = stop, stop + shape.numel() * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    pieces = itertools.chain.from_iterable(tensor.pieces for tensor in tensors.values())
    return write_bytes(path, itertools.chain([len(text).to_bytes(8, "little"), text], map(_bytes_of, pieces)))


def write_bytes(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, str | int]:
    """Write the chunks durably; return the file's manifest entry."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"sha256": digest.hexdigest(), "bytes": size}


def _bytes_of(tensor: Tensor) -> bytes | memoryview:
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def file_entry(path: Path) -> dict[str, str | int]:
    """Hash a file; return its manifest entry: {"sha256", "bytes"}, the latter its size."""
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": file.tell()}

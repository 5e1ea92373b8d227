"""Checkpoints: saved whole or not at all, verified before they are used, no pickle anywhere.

A checkpoint is a folder `step-00000120` of safetensors and JSON. It is written under a temporary name; its manifest,
with the SHA-256 of every file, comes last; then it gets its name. So a folder with that name is whole unless the disk
failed, and the manifest tells. Any layout of processes writes it, any other reads it: a tensor lies in one file or, by
an index, in several, and a process asks for its rows. All processes see one file system.
"""

from training.checkpoint.parts import MANIFEST, SINGLE, TensorShard, WriterGroup
from training.checkpoint.read import (
    Checkpoint,
    corruption,
    is_complete,
    latest,
    list_checkpoints,
    load,
    load_unchecked,
    quarantine,
    read_state,
    read_tensors,
    tensor_shapes,
)
from training.checkpoint.write import CheckpointWriter, prune, remove_leftovers

__all__ = [
    "MANIFEST",
    "SINGLE",
    "Checkpoint",
    "CheckpointWriter",
    "TensorShard",
    "WriterGroup",
    "corruption",
    "is_complete",
    "latest",
    "list_checkpoints",
    "load",
    "load_unchecked",
    "prune",
    "quarantine",
    "read_state",
    "read_tensors",
    "remove_leftovers",
    "tensor_shapes",
]

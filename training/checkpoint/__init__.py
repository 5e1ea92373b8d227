"""Checkpoints that are complete or absent, verified before use, without pickle.

    writer = CheckpointWriter(folder, SINGLE, CheckpointConfig())
    writer.save({"model": shards, "optimizer": shards}, {"step": 120}, best_step=None)   # writes in the background
    model, optimizer, state = load(latest(folder, warn=print))

A checkpoint is a folder `step-00000120` of safetensors and JSON files. It is written under a temporary name; the
manifest with the SHA-256 of every file is written last; then the folder is renamed. A tensor is in one file, or its
rows are in one file per rank and an index lists them: any number of ranks can read it. All ranks share a file system.
"""

# ruff: noqa: F401 (the public names of the package)

from training.checkpoint.read import (
    MANIFEST,
    Checkpoint,
    corruption,
    is_complete,
    latest,
    list_checkpoints,
    load,
    quarantine,
    read_state,
    read_tensors,
    tensor_shapes,
)
from training.checkpoint.write import SINGLE, CheckpointWriter, TensorShard, WriterGroup, prune, remove_leftovers

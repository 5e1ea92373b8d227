"""Checkpoints that are complete or absent, verified before use, without pickle.

    writer = CheckpointWriter(folder, SINGLE, CheckpointConfig())
    writer.save({"model": shards, "optimizer": shards}, {"step": 120}, best_step=None)   # writes in the background
    model, optimizer, state = load(latest(folder, warn=print))

A checkpoint is a folder `step-00000120` of safetensors and JSON files; its manifest has their SHA-256. A tensor is in
one file, or each rank's rows are in one and an index lists them: any number of ranks, on one file system, can read it.
"""

from training.checkpoint.copier import STOP_S, Copier
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
    step_path,
    tensor_shapes,
)
from training.checkpoint.remote_run import RemoteRun, check_copy_to, copy_to_errors
from training.checkpoint.write import SINGLE, CheckpointWriter, TensorShard, WriterGroup, prune, remove_leftovers

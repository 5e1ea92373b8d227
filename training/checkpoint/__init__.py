"""Checkpoints: saved whole or not at all, verified before they are used, no pickle anywhere.

A checkpoint is a folder `step-00000120` of safetensors and JSON. It is written under a temporary name; its manifest,
with the SHA-256 of every file, comes last; then it gets its name. So a folder with that name is whole unless the disk
failed, and the manifest tells. Any layout of processes writes it, any other reads it: a tensor lies in one file or, by
an index, in several, and a process asks for its rows. All processes see one file system.
"""

from training.checkpoint.parts import MANIFEST, Part, Peers, alone
from training.checkpoint.read import (
    Checkpoint,
    damage,
    load,
    looks_whole,
    names,
    newest,
    read,
    read_parts,
    set_aside,
    state_of,
    steps,
)
from training.checkpoint.write import Saver, prune, remove_leftovers

__all__ = [
    "MANIFEST",
    "Checkpoint",
    "Part",
    "Peers",
    "Saver",
    "alone",
    "damage",
    "load",
    "looks_whole",
    "names",
    "newest",
    "prune",
    "read",
    "read_parts",
    "remove_leftovers",
    "set_aside",
    "state_of",
    "steps",
]

"""Check that all ranks run the same code, with the same options, on the same data."""

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from training.config import Config
from training.distributed.world import World
from training.errors import UserError
from training.options.schema import flatten_options

PER_HOST = {"cache_dir", "workers"}  # options of `data` that may differ between hosts
N_LISTED = 3  # max differences named in the error


def check_same_options(world: World, config: Config, flags: dict[str, str | None], precision: str) -> None:
    """Raise UserError if ranks differ in options, code, PyTorch version or resolved precision. Collective."""
    source = hashlib.sha256()
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        source.update(str(path.relative_to(package)).encode() + path.read_bytes())
    options = dict(flatten_options(config.model_dump(mode="json", exclude={"data": PER_HOST})))
    versions = {"torch": torch.__version__, "the code of training": source.hexdigest()[:12]}
    check_same(world, options | {"precision": precision} | flags | versions)


def check_same(world: World, values: dict[str, Any]) -> None:
    """Raise UserError if ranks differ in the JSON values. Collective."""
    text = json.dumps(values, sort_keys=True)
    if len(set(world.gather(hashlib.sha256(text.encode()).hexdigest()))) == 1:
        return
    differences, values_of_rank = [], world.gather(values)
    for name in sorted(set().union(*values_of_rank)):
        ranks_by_value = defaultdict(list)
        for rank, rank_values in enumerate(values_of_rank):
            ranks_by_value[json.dumps(rank_values.get(name))].append(rank)
        if len(ranks_by_value) > 1:
            listed = (f"{value} on {_ranks_text(*ranks)}" for value, ranks in ranks_by_value.items())
            differences.append(f"{name}: {', '.join(listed)}")
    if differences:
        more = f"; and {len(differences) - N_LISTED} more" if len(differences) > N_LISTED else ""
        text = "; ".join(differences[:N_LISTED]) + more
        raise UserError(f"the ranks differ: {text}; start all of them with the same inputs")


def _ranks_text(first: int, *others: int) -> str:
    return f"{1 + len(others)} ranks from {first}" if others else f"rank {first}"

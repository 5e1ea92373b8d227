"""Check that all ranks run the same code, with the same options, on the same data."""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from training.config import Config
from training.distributed.world import World
from training.errors import UserError
from training.options.schema import flatten_options

PER_HOST = {"cache_dir", "workers"}  # options of `data` that may differ between hosts
N_LISTED = 3  # max differences named in the error


def check_same_options(world: World, config: Config, resume: str, precision: str) -> None:
    """Raise UserError if ranks differ in options, code, PyTorch version or resolved precision. Collective."""
    options = dict(flatten_options(config.model_dump(mode="json", exclude={"data": PER_HOST})))
    options |= {"precision": precision, "--resume": resume}
    _check_same(world, options | {"torch": torch.__version__, "the code of training": _source_hash()})


def check_same_data(world: World, fingerprint: str) -> None:
    """Raise UserError if ranks have different text or tokenizers. Collective."""
    _check_same(world, {"data": fingerprint[:12]})


def _check_same(world: World, values: Mapping[str, Any]) -> None:
    """Raise UserError if ranks have different JSON values. Sends hashes first, and the values only if these differ."""
    text = json.dumps(values, sort_keys=True)
    if len(set(world.gather_bytes(hashlib.sha256(text.encode()).digest()))) == 1:
        return
    values_of_rank = [json.loads(each) for each in world.gather_bytes(text.encode())]
    differences = []
    for name in sorted(set().union(*values_of_rank)):
        ranks_by_value: dict[str, list[int]] = {}
        for rank, rank_values in enumerate(values_of_rank):
            ranks_by_value.setdefault(json.dumps(rank_values.get(name)), []).append(rank)
        if len(ranks_by_value) > 1:
            listed = (f"{value} on {_ranks_text(*ranks)}" for value, ranks in ranks_by_value.items())
            differences.append(f"{name}: {', '.join(listed)}")
    more = f"; and {len(differences) - N_LISTED} more" if len(differences) > N_LISTED else ""
    raise UserError(
        f"the ranks differ: {'; '.join(differences[:N_LISTED])}{more}; start all of them with the same inputs"
    )


@cache
def _source_hash() -> str:
    package = Path(__file__).parents[1]
    files = sorted(package.rglob("*.py"))
    text = b"".join(str(path.relative_to(package)).encode() + path.read_bytes() for path in files)
    return hashlib.sha256(text).hexdigest()[:12]


def _ranks_text(first: int, *others: int) -> str:
    return f"{1 + len(others)} ranks from {first}" if others else f"rank {first}"

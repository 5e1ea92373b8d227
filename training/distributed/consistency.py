"""What all ranks must have been given alike."""

from __future__ import annotations

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

OWN = {"cache_dir", "workers"}  # options of `data` that each host may have its own of
SHOWN = 3  # differences that are listed


def check_same_options(world: World, config: Config, resume: str, precision: str) -> None:
    """Raise UserError where ranks have other options or other code, or `auto` is another precision. Collective."""
    options = dict(flatten_options(config.model_dump(mode="json", exclude={"data": OWN}))) | {"precision": precision}
    _refuse(world, options | {"--resume": resume, "torch": torch.__version__, "the code of training": _source()})


def check_same_data(world: World, fingerprint: str) -> None:
    """Raise UserError where ranks found other text, or made another tokenizer. Collective."""
    _refuse(world, {"data": fingerprint[:12]})


def _refuse(world: World, facts: Mapping[str, Any]) -> None:
    """Facts are of JSON's types; they travel only where their digests differ."""
    text = json.dumps(facts, sort_keys=True)
    if len(set(world.gather_bytes(hashlib.sha256(text.encode()).digest()))) == 1:
        return
    everyones = [json.loads(each) for each in world.gather_bytes(text.encode())]
    named = {name: _holders(name, everyones) for name in sorted(set().union(*everyones))}
    unlike = [f"{name}: {_values(holders)}" for name, holders in named.items() if len(holders) > 1]
    more = f"; and {len(unlike) - SHOWN} more" if len(unlike) > SHOWN else ""
    raise UserError(f"the ranks were not given the same: {'; '.join(unlike[:SHOWN])}{more}; start all of them alike")


@cache
def _source() -> str:
    package = Path(__file__).parents[1]
    files = sorted(package.rglob("*.py"))
    text = b"".join(str(path.relative_to(package)).encode() + path.read_bytes() for path in files)
    return hashlib.sha256(text).hexdigest()[:12]


def _holders(name: str, everyones: list[dict[str, Any]]) -> dict[str, list[int]]:
    """The ranks by the value that they have."""
    holders: dict[str, list[int]] = {}
    for rank, facts in enumerate(everyones):
        holders.setdefault(json.dumps(facts.get(name)), []).append(rank)
    return holders


def _values(holders: dict[str, list[int]]) -> str:
    return ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in holders.items())


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"{len(ranks)} ranks from {ranks[0]}"

"""Train on every rank of a process group, in several layouts one after the other, and write down what was computed.

    torchrun ... tests/trajectory.py FOLDER CONFIG.yaml...    each trained: FOLDER/CONFIG.safetensors and .json

OUT_OF_MEMORY="1:5" makes the allocation of rank 1's sixth forward fail, POISON="1:5" its loss no number; ALL_TO="2,1"
sends all tokens to these experts;
STOP_AT="8" saves after the eighth step and ends there; THREADS="1,2" are those of each rank.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.utils.hooks import RemovableHandle

from training.config import Config
from training.data import prepare
from training.distributed.world import World, join_world
from training.engine.build import begin, save
from training.engine.step import evaluate, train_step
from training.errors import UserError
from training.options import cli


def train(config: Config, world: World) -> tuple[dict, dict[str, torch.Tensor]]:
    """(what every step computed, the weights on the main rank)."""
    run = begin(config, prepare(config.data, quiet=True), world, "auto")
    seen: list[tuple[bytes, bytes]] = []

    def see(_model: object, _inputs: tuple, inputs: dict) -> None:
        """The tokens that the model was given, by the key of their sample; a stand-in for no sample has none."""
        if torch.is_grad_enabled():
            keys, tokens = inputs["key_B"].numpy(), inputs["tokens_BT"].numpy()
            seen.extend((key.tobytes(), row.tobytes()) for key, row in zip(keys, tokens, strict=True) if key)

    favourites = [int(expert) for expert in os.environ.get("ALL_TO", "").split(",") if expert]
    for name, bias in run.model.named_buffers():
        if favourites and name.endswith("selection_bias"):
            bias[favourites] = 1e6
    hooks, tokens_of_step = [run.model.register_forward_pre_hook(see, with_kwargs=True)], []
    if failing := os.environ.get("OUT_OF_MEMORY"):
        rank, call = map(int, failing.split(":"))
        if rank == world.rank:
            hooks.append(out_of_memory_at(run.model, call))
    if poisoned := os.environ.get("POISON"):
        rank, call = map(int, poisoned.split(":"))
        if rank == world.rank:
            hooks.append(not_finite_at(run.model, call))
    stop = int(os.environ.get("STOP_AT", config.steps))
    while run.step < stop:
        seen.clear()
        train_step(run)
        once = dict(seen)  # of a batch that was begun again too
        of_ranks = world.gather_bytes(b"".join(once.values()))
        tokens_of_step.append(hashlib.sha256(b"".join(of_ranks)).hexdigest())
    for hook in hooks:
        hook.remove()
    rows = run.metrics.fetch()
    run.last_row = rows[-1]
    save(run)
    found = evaluate(run.model, run.val_batches, run.dataset.tokenizer, config.eval.tokens, run.micro_batch, world)
    run.layout.reshard()
    weights = run.layout.full_state_dict()
    run.close()
    names = ("loss", "grad_norm", "expert_load")
    steps = [{name: row[name] for name in names if name in row} for row in rows]
    facts = {"val_loss": found["val_loss"], "micro_batch": run.micro_batch}
    return {"steps": steps, "tokens": tokens_of_step} | facts, weights


def out_of_memory_at(module: torch.nn.Module, call: int) -> RemovableHandle:
    """From here on, fail once, as an allocator does."""
    calls = itertools.count()

    def fail(*_: object) -> None:
        if next(calls) == call:
            raise torch.OutOfMemoryError("out of memory, by the test")

    return module.register_forward_pre_hook(fail)


def not_finite_at(module: torch.nn.Module, call: int) -> RemovableHandle:
    """The loss of that forward is not a number."""
    calls = itertools.count()

    def spoil(_module: object, _inputs: tuple, outputs: tuple) -> tuple:
        loss, metrics = outputs
        worse = float("nan") if next(calls) == call else 1.0
        return loss * worse, metrics | {"loss_sum": metrics["loss_sum"] * worse}

    return module.register_forward_hook(spoil)


def main() -> int:
    threads = os.environ.get("THREADS", "").split(",")
    torch.set_num_threads(int(threads[int(os.environ["RANK"])]) if len(threads) > 1 else 1)
    folder, *paths = map(Path, sys.argv[1:])
    configs = {path: cli.load_config(path) for path in paths}
    try:
        with ExitStack() as at_end:
            world = join_world(torch.device("cpu"), configs[paths[0]].parallel)
            at_end.push(world.close)
            for path, config in configs.items():
                outcome, weights = train(config, world)
                if world.is_main:
                    path = folder / path.name
                    path.with_suffix(".json").write_text(json.dumps(outcome))
                    whole = {name: tensor.contiguous() for name, tensor in weights.items()}
                    save_file(whole, path.with_suffix(".safetensors"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(main())

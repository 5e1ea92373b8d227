"""Train on every rank of a process group, in one layout after another, and write the results to files.

`main([FOLDER, CONFIG.yaml, ...])` runs on each rank (`warm.py`); the results are FOLDER/CONFIG.safetensors and .json.

Variables of the environment: OUT_OF_MEMORY="1:5" makes an allocation in rank 1's sixth forward fail; POISON="1:5" makes
the loss of that forward NaN; ALL_TO="2,1" routes all tokens to these experts; STOP_AT="8" saves after step 8 and ends;
THREADS="1,2" sets the number of threads of each rank.
"""

import hashlib
import importlib
import itertools
import json
import os
import resource
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from conftest import BuiltRun
from safetensors.torch import save_file
from torch.utils.hooks import RemovableHandle

from training.config import Config
from training.distributed.world import World, join_world
from training.errors import UserError
from training.options import cli


def train(config: Config, world: World, stop_at: int | None = None) -> tuple[dict, dict[str, torch.Tensor]]:
    """Train, save a checkpoint, evaluate; returns the figures of every step, and the weights (on the main rank)."""
    run = BuiltRun(config, world)
    seen: list[tuple[bytes, bytes]] = []

    def see(_model: object, inputs: tuple) -> None:
        """Collect the tokens of a forward by the key of their sample; the dummy of a rank without samples has key 0."""
        (batch,) = inputs
        if torch.is_grad_enabled():
            keys, tokens = batch.key_B.numpy(), batch.tokens_BT.numpy()
            seen.extend((key.tobytes(), row.tobytes()) for key, row in zip(keys, tokens, strict=True) if key)

    favorites = [int(expert) for expert in os.environ.get("ALL_TO", "").split(",") if expert]
    for name, bias in run.model.named_buffers():
        if favorites and name.endswith("selection_bias"):
            bias[favorites] = 1e6
    hooks, tokens_of_step = [run.model.register_forward_pre_hook(see)], []
    if failing := os.environ.get("OUT_OF_MEMORY"):
        rank, call = map(int, failing.split(":"))
        if rank == world.rank:
            hooks.append(out_of_memory_at(run.model, call))
    if poisoned := os.environ.get("POISON"):
        rank, call = map(int, poisoned.split(":"))
        if rank == world.rank:
            hooks.append(not_finite_at(run.model, call))
    rows = []
    with run.micro_batch.restart_on_out_of_memory():
        while run.state.step < (stop_at or config.steps):
            seen.clear()
            run.train_step()
            rows += run.rows()
            once = dict(seen)  # a retried batch counts once
            of_ranks = world.gather(b"".join(once.values()).hex())
            tokens_of_step.append(hashlib.sha256(bytes.fromhex("".join(of_ranks))).hexdigest())
    for hook in hooks:
        hook.remove()
    run.save()
    evaluation = run.evaluate()
    weights = run.sharded.full_state_dict()
    run.close()
    names = ("loss", "grad_norm", "expert_load")
    steps = [{name: row[name] for name in names if name in row} for row in rows]
    return {
        "steps": steps,
        "tokens": tokens_of_step,
        "val_losses": {"all": evaluation["val_loss"]} | evaluation["val_sets"]["loss"],
        "micro_batch": run.micro_batch.size,
    }, weights


def out_of_memory_at(module: torch.nn.Module, call: int) -> RemovableHandle:
    """Make an allocation fail in the module's forward number `call`, counted from now."""
    calls = itertools.count()

    def fail(*_: object) -> None:
        if next(calls) == call:
            raise torch.OutOfMemoryError("out of memory, by the test")

    return module.register_forward_pre_hook(fail)


def not_finite_at(module: torch.nn.Module, call: int) -> RemovableHandle:
    """Make the loss of the module's forward number `call`, counted from now, NaN."""
    calls = itertools.count()

    def spoil(_module: object, _inputs: tuple, outputs: tuple) -> tuple:
        loss, metrics = outputs
        factor = float("nan") if next(calls) == call else 1.0
        return loss * factor, metrics | {"loss_sum": metrics["loss_sum"] * factor}

    return module.register_forward_hook(spoil)


def main(arguments: list[str]) -> int:
    """Train every config on this rank."""
    threads = os.environ.get("THREADS", "").split(",")
    torch.set_num_threads(int(threads[int(os.environ["RANK"])]) if len(threads) > 1 else 1)
    folder, *paths = map(Path, arguments)
    configs = {path: cli.load_config(path) for path in paths}
    try:
        with ExitStack() as at_end:
            world = join_world(torch.device("cpu"), configs[paths[0]].parallel)
            at_end.push(world.close)
            for path, config in configs.items():
                outcome, weights = train(config, world, int(os.environ.get("STOP_AT", config.steps)))
                if world.is_main:
                    path = folder / path.name
                    path.with_suffix(".json").write_text(json.dumps(outcome))
                    whole = {name: tensor.contiguous() for name, tensor in weights.items()}
                    save_file(whole, path.with_suffix(".safetensors"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    return 0


def main_in_own_folder(arguments: list[str]) -> int:
    """Train like the command, in this rank's own folder below the first argument."""
    from training.train import main as train_command

    os.chdir(Path(arguments[0], os.environ["RANK"]))
    return train_command(arguments[1:])


def main_in_a_borrowed_group(arguments: list[str]) -> int:
    """Train in a thread, in a process group that was there before."""
    import threading

    import torch.distributed as dist

    from training.train import train as train_run

    dist.init_process_group("gloo")
    config, statuses = cli.load_config(arguments[0]), []
    thread = threading.Thread(target=lambda: statuses.append(train_run(config)))
    thread.start()
    thread.join()
    dist.barrier()
    return statuses[0] if statuses else 1


def main_that_hangs(arguments: list[str]) -> int:
    """Train like the command, but HANG="1:5" never ends step 5 on rank 1, SLOW_RECORD="3:8" writes row 3 in 8 s."""
    from training import engine
    from training.logging.jsonl import JSONLSink
    from training.train import main as train_command

    hanging, slow = os.environ["HANG"], os.environ["SLOW_RECORD"].split(":")
    train_step, write = engine.train_step, JSONLSink.write

    def hang(setup: Any, phase: Any) -> Any:
        while f"{setup.model.world.rank}:{setup.state.step + 1}" == hanging:
            pass
        return train_step(setup, phase)

    def write_slowly(self: JSONLSink, rows: list[dict]) -> None:
        if str(rows[-1]["step"]) == slow[0]:
            time.sleep(float(slow[1]))
        write(self, rows)

    engine.train_step, JSONLSink.write = hang, write_slowly
    return train_command(arguments)


def main_with_a_signal(arguments: list[str]) -> int:
    """Train like the command, but send SIGNAL to this process when its start reaches AT."""
    from training import checkpoint, engine
    from training.logging.jsonl import JSONLSink
    from training.train import main as train_command

    build = importlib.import_module("training.engine.build")  # the package's `build` is the function
    places = {
        "read": (checkpoint, "read_tensors"),
        "prepare folder": (build, "prepare_run_dir"),
        "open logs": (JSONLSink, "__init__"),
        "watch signals": (engine.Events, "__enter__"),
    }
    owner, name = places[os.environ["AT"]]
    original = getattr(owner, name)

    def sending(*arguments: Any, **named: Any) -> Any:
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))
        return original(*arguments, **named)

    setattr(owner, name, sending)
    return train_command(arguments)


def main_with_limited_memory(arguments: list[str]) -> int:
    """Train like the command, but limit the memory to what is in use, at LIMIT_AT: "load" or "step 3"."""
    from training import engine
    from training.train import main as train_command

    build = importlib.import_module("training.engine.build")  # the package's `build` is the function
    load_tensors, train_step = build.load_tensors, engine.train_step

    def limit() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        slack = 4 * 2**20  # for Python's own objects, such as the options as YAML; a sample needs more
        resource.setrlimit(resource.RLIMIT_AS, (used + slack, resource.RLIM_INFINITY))

    def load(*arguments: Any) -> None:
        load_tensors(*arguments)
        limit()

    def step(setup: Any, phase: Any) -> Any:
        if setup.state.step == 2:
            limit()
            setup.micro_batch.size = 128  # needs more than the peak so far: the process keeps freed memory
        return train_step(setup, phase)

    if os.environ["LIMIT_AT"] == "load":
        build.load_tensors = load
    else:
        engine.train_step = step
    return train_command(arguments)

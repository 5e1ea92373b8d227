"""Train GPT-2, dense or Mixture-of-Experts.

    python -m training.train --config configs/quickstart.yaml
    python -m training.train --config my.yaml --optim.learning_rate 1e-3 --steps 2000

The run is left in out_dir/name. Started again with the same options, it goes on where it was.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from training.config import Config
from training.errors import UserError, one_line
from training.files import run_lock
from training.options import cli

FLAGS = {
    "--resume": "auto: go on from the run's newest checkpoint (default); never: start over, the old run is moved "
    "aside; PATH: begin with the checkpoint or run at PATH"
}


def main(argv: list[str] | None = None) -> int:
    """The command. Exit status: 0 done, 1 to be started again, 2 wrong input, 128 + n saved and stopped by signal n."""
    arguments = sys.argv[1:] if argv is None else argv
    config, flags = cli.parse_command_line(arguments, prog="python -m training.train", doc=__doc__, flags=FLAGS)
    # read once by torch: no C++ stacks about ranks that are lost, which a line names
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL" if "WORLD_SIZE" in os.environ else "WARNING")
    try:
        return train(config, resume=resumed(flags["--resume"]))
    except (UserError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return error.status if isinstance(error, UserError) else 2
    except KeyboardInterrupt:  # before the first step
        print("interrupted", file=sys.stderr)
        return 130


def resumed(asked: str | None) -> str:
    """What `--resume` means: a launcher that starts processes again does not start the run over again.

    Raises UserError for nothing at all, such as a variable that is not set.
    """
    if asked == "":
        raise UserError("--resume: '' is neither auto, never nor a path")
    if asked == "never" and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        return "auto"
    return asked or "auto"


def train(config: Config, *, resume: str = "auto") -> int:
    """The five steps of a run; returns the exit status. torch is imported here, once the options are known good."""
    began, folder = time.perf_counter(), Path(config.out_dir, config.name)
    with ExitStack() as at_end:
        lock = None
        if os.environ.get("WORLD_SIZE", "1") == "1":
            lock = at_end.enter_context(run_lock(folder))  # a second starter is told at once

        from training.data import prepare
        from training.device import resolve_precision, select_device
        from training.distributed.consistency import check_same_data, check_same_options
        from training.distributed.mesh import check_mesh
        from training.distributed.rendezvous import report_once_per_host
        from training.distributed.world import join_world
        from training.engine.build import begin, finish, preallocate_save_buffers
        from training.engine.micro_batch import told_in_a_line
        from training.engine.resume import stopped
        from training.engine.step import Watch, record, train_step
        from training.weights.init_from import resolve_init_from

        with report_once_per_host():
            world = join_world(select_device(config.parallel.device), config.parallel)
        at_end.push(world.close)
        if world.is_main and world.size > 1:
            lock = at_end.enter_context(run_lock(folder))
        check_same_options(world, config, resume, resolve_precision(config.precision, world.device))
        world.set_activity("the preparation of data", "untimed")
        config = resolve_init_from(config, fresh=resume == "never")
        check_mesh(config, world.size)
        dataset = prepare(config.data, quiet=not world.is_main)  # 1. load and preprocess the dataset
        world.set_activity("the beginning", "untimed")
        check_same_data(world, dataset.fingerprint)
        run = begin(config, dataset, world, resume)  # 2. initialize, or restore, model and optimizer
        at_end.callback(run.close)
        at_end.enter_context(told_in_a_line(run))
        watch = Watch(run)
        at_end.callback(watch.close)
        run.timer.set_start(began)
        run.metrics.start_clock()
        while run.step < run.config.steps:  # 3. train, 4. evaluating on the way and after the last step
            train_step(run)
            preallocate_save_buffers(run)
            due = watch.due()
            if due.log:
                world.set_activity(f"the record of step {run.step}", "untimed" if world.is_main else "timed")
                if lock is not None:
                    lock.check()
                record(run, due)
            if due.signal:
                run.saver.wait()
                run.close()
                stopped(run, due.signal, resume)
                return 128 + due.signal
        world.set_activity("the end", "untimed" if world.is_main else "timed")
        finish(run)  # 5. save the final model and metrics
        return 0


if __name__ == "__main__":
    sys.exit(main())

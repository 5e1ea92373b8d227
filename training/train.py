"""Train GPT-2, dense or Mixture-of-Experts.

    python -m training.train --config configs/quickstart.yaml
    python -m training.train --config my.yaml --optim.learning_rate 1e-3 --steps 2000
    python -m training.train --config my.yaml --branch runs/my --name my-lower --optim.learning_rate 1e-4

The run is written to out_dir/name. The same command, started again, resumes it. With more --steps a run goes on if each
step that it did stays what it would have been; with other options a new one goes on from it, by --branch.
"""

import os
import sys
import time
from contextlib import ExitStack, closing

from training.config import Config
from training.errors import UserError, command
from training.options import cli
from training.session import session

FLAGS = {
    "--resume": "auto: resume from the run's latest checkpoint (default); never: start over, moving the old run aside; "
    "PATH: start from the checkpoint or run at PATH",
    "--branch": "PATH: a new run, with its own --name, that goes on from the checkpoint or run at PATH with other "
    "options, such as a learning rate or steps; its rows, TensorBoard and report show that run up to there",
}
PAUSED = -1  # status of `train` if its turn is over; no exit status


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command. Exit status: 0 done, 1 run it again, 2 wrong input, 128 + n saved and stopped by signal n."""
    arguments = sys.argv[1:] if argv is None else argv
    config, flags = cli.parse_command_line(arguments, prog="python -m training.train", doc=__doc__, flags=FLAGS)
    # torch reads this at import. Hide C++ stack traces when a rank dies: our monitor prints one line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL" if "WORLD_SIZE" in os.environ else "WARNING")
    branch, resume = flags["--branch"], resolve_resume(flags["--resume"])
    if branch is not None and resume not in ("auto", "never"):
        raise UserError("--branch: leave --resume out; a branch resumes from its own checkpoints once it has some")
    return train(config, resume=resume, branch=branch and cli.flag_path("--branch", branch))


def resolve_resume(value: str | None) -> str:
    """Resolve --resume. After a torchrun restart, `never` becomes `auto`: the relaunch must not discard the run.

    Raises UserError for a path that is none, such as the empty one of an unset shell variable.
    """
    value = "auto" if value is None else value
    if value == "never" and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        return "auto"
    return value if value in ("auto", "never") else cli.flag_path("--resume", value)


def train(config: Config, *, resume: str = "auto", branch: str | None = None, turn_s: float | None = None) -> int:
    """Run the five steps of a run and return the exit status. After `turn_s` seconds, save and return PAUSED."""
    started = time.perf_counter()
    with session(config, resume, branch) as run, ExitStack() as stack:
        from training import engine  # imports torch, once the options are known to be good
        from training.data import prepare

        # 1. Load and preprocess the dataset.
        dataset = prepare(run.config.data, quiet=not run.world.is_main)

        # 2. Initialize the model and optimizer, or restore them from a checkpoint.
        setup = engine.build(run.config, dataset, run.world, resume, branch)
        config, model, optimizer, state = setup.config, setup.model, setup.optimizer, setup.state
        log = stack.enter_context(closing(engine.open_log(setup, dataset, started)))
        if config.parallel.compile:  # after open_log: TensorBoard's graph needs the uncompiled model
            stack.enter_context(engine.compiled(model))
        checkpoints = stack.enter_context(closing(engine.Checkpoints(config, model, optimizer, log, setup.remote)))
        events = stack.enter_context(engine.Events(config, run.world, checkpoints, turn_s))
        stack.enter_context(setup.micro_batch.restart_on_out_of_memory())
        phase = engine.Phases(log.timer, run.world)
        tracer = stack.enter_context(engine.Tracer(config, run.world, log.timer))

        # 3. Train the model.
        log.start_clock()
        while not engine.is_over(state, config):
            with tracer.step(state.step + 1):
                metrics = engine.train_step(setup, phase)
            log.add(state.step, *metrics, state.guard.n_skipped)
            checkpoints.preallocate()
            with phase("communication"):
                due = events.after(state)  # the same on all ranks
            if due.log:
                with phase("compute", f"the log of step {state.step}"):
                    log.fetch()  # waits for the device
                run.check_lock()
                engine.check_finite(state, log)
            if due.evaluate:  # 4. Evaluate on validation data.
                with phase("evaluation"):
                    log.last_row |= engine.evaluate(setup, dataset.tokenizer)
                    engine.check_finite(state, log)
                    log.last_row |= engine.sample_texts(setup, dataset.tokenizer)
            is_best = due.evaluate and state.update_best(log.last_row, config.eval.best, is_saved=due.save)
            if due.tasks or engine.is_over(state, config):
                log.last_row |= engine.score_tasks(setup, phase)
            if due.log:
                log.write(with_report=due.evaluate)
            if due.save or (is_best and config.checkpoint.keep_best) or engine.is_over(state, config):
                with phase("checkpoint"):
                    checkpoints.save(state)
            if due.log:
                log.start_clock()  # evaluations and saves do not count as training
            if due.signal or due.pause:
                checkpoints.wait()
                return engine.report_stop(due.signal, checkpoints, state, log, resume) if due.signal else PAUSED

        # 5. Save the final model and training metrics.
        with phase("checkpoint", "the end of the run"):
            checkpoints.wait()
        engine.finish(setup, dataset, checkpoints, log, phase)
        return 0


if __name__ == "__main__":
    sys.exit(main())

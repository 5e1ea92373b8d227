"""The end of a run: the final model, summary.json, experts.json and the report."""

import json
import math
import shlex
import sys
from pathlib import Path
from signal import Signals
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from training import device as devices
from training.data import Dataset, Tokenizer
from training.engine.build import Setup
from training.engine.expert_tokens import measure_expert_tokens
from training.engine.guard import MAX_CONSECUTIVE
from training.engine.loop import Phases
from training.engine.state import TrainState
from training.errors import UserError
from training.files import atomic_folder, write_atomically
from training.logging.advice import advice, facts_from_rows
from training.logging.jsonl import nan_to_null, read_rows
from training.logging.metrics import summary_values
from training.logging.report import update_report
from training.logging.rows import RunLog
from training.weights import hf


def check_finite(state: TrainState, log: RunLog) -> None:
    """Raise UserError, after writing the rows, if MAX_CONSECUTIVE updates or the validation loss were not finite.

    The state is not saved, because it would replace a good checkpoint.
    """
    val_loss = log.last_row.get("val_loss", 0.0)
    if state.guard.is_stuck:
        reason = f"the last {MAX_CONSECUTIVE} losses or gradients were NaN or infinite"
    elif not math.isfinite(val_loss):
        reason = f"val_loss is {val_loss}"
    else:
        return
    log.write()
    raise UserError(
        f"step {state.step}: {reason}, and nothing more is saved; lower the learning rate and start over with --resume "
        f"never, or with another --name that starts from --resume {log.config.run_dir / 'checkpoints'}/step-N"
    )


def report_stop(number: int, state: TrainState, log: RunLog, resume: str) -> int:
    """Close the log, print which signal stopped the run and how to resume it; return the exit status."""
    log.close()
    if log.world.is_main:
        command = "the same command" if resume == "auto" else "the same command without --resume"
        print(f"stopped by {Signals(number).name}, saved after step {state.step}; {command} resumes it", flush=True)
    return 128 + number


def finish(setup: Setup, dataset: Dataset, log: RunLog, phase: Phases) -> None:
    """Write the final model, experts.json, summary.json and report.html, and close the log. Collective."""
    config, model, state = setup.config, setup.model, setup.state
    folder, is_main = config.run_dir, model.world.is_main
    with phase("checkpoint"):
        weights = model.full_state_dict()
    expert_tokens = None
    if setup.stats.top_ks and (is_main or model.mesh.has_collectives):
        with phase("evaluation"):
            model.reshard()
            args = (model.model, setup.val_samples, dataset.tokenizer, config.eval)
            expert_tokens = measure_expert_tokens(*args, micro_batch=setup.micro_batch.size, step=state.step)
    if not is_main:
        return
    with phase("checkpoint"):
        write_model(folder / "model", weights, setup, dataset.tokenizer)
        if expert_tokens is not None:
            write_atomically(folder / "experts.json", json.dumps(expert_tokens) + "\n")
    summary = summarize(setup, dataset, log)
    write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    update_report(folder)
    log.close(summary)


def write_model(folder: Path, weights: dict[str, Tensor], setup: Setup, tokenizer: Tokenizer) -> None:
    """Write the model and its tokenizer as one atomic folder. Raises UserError if that fails."""
    try:
        with atomic_folder(folder) as partial:
            model = setup.config.model
            hf.write_model(partial, weights, model, tokenizer.end_of_text, n_vocab=tokenizer.vocab_size)
            tokenizer.save(partial)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: the model could not be written: {error}") from error


def summarize(setup: Setup, dataset: Dataset, log: RunLog) -> dict[str, Any]:
    """Return the contents of summary.json."""
    config, state, row, folder = setup.config, setup.state, nan_to_null(log.last_row), str(setup.config.run_dir)
    micro_batch, device = setup.micro_batch, setup.model.world.device
    facts = facts_from_rows(
        read_rows(config.run_dir / "metrics.jsonl"),
        config,
        memory_gib=devices.available_memory_bytes(device) / 2**30,
        peak_gib=devices.peak_memory_gib(device),
        seconds=log.timer.seconds,
        on_gpu=device.type != "cpu",
        micro_batch=micro_batch.size,
        max_samples_per_rank=micro_batch.max_size,
        n_out_of_memory=micro_batch.n_out_of_memory,
        n_skipped=state.guard.n_skipped,
        vocab_size=dataset.tokenizer.vocab_size,
    )
    prompt = (*config.eval.prompts, "The ")[0].rstrip("\n")
    return {
        "steps": state.step,
        "tokens": row["tokens"],
        "skipped_steps": state.guard.n_skipped,
        "train_loss": row["loss"],
        **summary_values(row),
        "best_val_loss": state.best["val_loss"],
        "best_step": state.best["step"],
        "time_s": log.time_s,
        "tokens_per_s": row["tokens"] / log.time_s,
        "goodput": log.timer.goodput,
        "time": {phase: round(seconds, 6) for phase, seconds in log.timer.seconds.items()},
        "advice": advice(facts),
        "parameters": setup.stats.n_parameters,
        "active_parameters": setup.stats.n_active_parameters,
        "model_dir": f"{folder}/model",
        "next": [
            shlex.join([program("python"), "-m", "training.generate", "--run", folder, "--prompt", prompt]),
            shlex.join([program("python"), "-m", "training.evaluate", "--run", folder]),
            shlex.join([program("tensorboard"), "--logdir", folder]),
        ],
    }


def program(name: str) -> str:
    """Return the shell's name for a program of this environment: .venv/bin/NAME below this folder, else NAME."""
    path = Path(sys.executable).with_name(name)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else name

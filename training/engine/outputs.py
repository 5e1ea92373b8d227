"""A run's outputs other than checkpoints: config.yaml, the logs, the final model, summary.json, the report."""

import json
from contextlib import nullcontext
from functools import partial
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from training import checkpoint
from training import device as devices
from training.checkpoint import Checkpoint
from training.config import Config
from training.data import Dataset
from training.data.dialogues import end_tokens
from training.engine.branch import describe_lineage
from training.engine.build import Setup
from training.engine.expert_tokens import measure_expert_tokens
from training.engine.loop import Phases, is_out_of_patience
from training.engine.next_commands import next_commands
from training.engine.state import Checkpoints
from training.errors import UserError
from training.files import atomic_folder, ensure_folder, mkdir_durable, write_atomically, write_errors_as_user_errors
from training.logging.advice import advice, facts_from_history
from training.logging.jsonl import copy_rows, nan_to_null
from training.logging.metrics import summary_values
from training.logging.phases import PhaseTimer
from training.logging.report import update_report
from training.logging.rows import RunLog
from training.logging.sinks import RunInfo, open_sinks
from training.model.metrics import step_metrics
from training.optim.optimizer import averages_in
from training.options import cli
from training.options.schema import flatten_options
from training.planning.report import describe_batch, describe_model
from training.terminal import print_line, print_note
from training.weights import hf

VARIED = ("seed", "steps", "batch_tokens", "optim.", "schedule.", "model.n_")  # options, or the beginning of them
UNVARIED = ("name", "out_dir", "checkpoint.", "logging.", "data.cache_dir")  # tell no runs apart


def open_log(setup: Setup, dataset: Dataset, started: float) -> RunLog:
    """Return the run's log; on the main rank write config.yaml and the tokenizer, and open the sinks.

    `started` is the `time.perf_counter` at the start of the process. Raises UserError if the folder cannot be written.
    """
    config, state, world = setup.config, setup.state, setup.model.world
    timer = PhaseTimer(world.device, started)
    timer.load_state_dict(state.phases)
    to_values, flops = partial(step_metrics, top_ks=setup.stats.top_ks), setup.stats.flops_per_token
    rates = setup.optimizer.peak_learning_rates
    log = RunLog(config, world, to_values, flops, timer, rates, time_s=state.time_s, last_row=state.last_row)
    if not world.is_main:
        return log
    folder = config.run_dir
    try:
        mkdir_durable(folder)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; choose another --out_dir or --name") from error
    info = run_info(setup, dataset)
    write_atomically(folder / "config.yaml", info.config_yaml)
    ensure_folder(folder / "tokenizer")
    dataset.tokenizer.save(folder / "tokenizer", config.model.n_positions)
    if setup.parent is not None:
        with write_errors_as_user_errors(folder):
            copy_rows(setup.parent, folder, state.step)
    log.info, log.sinks = info, open_sinks(config.logging, info)
    jsonl_sink = log.sinks[0]  # metrics.jsonl
    log.history = jsonl_sink.history
    timer.add_lost_time(jsonl_sink.lost_s)
    if state.step == 0 and not setup.model.mesh.has_collectives:
        batch = setup.loader.samples.batch([0]).cropped(32)
        for sink in log.sinks:
            sink.write_graph(setup.model.model, batch.to(world.device), setup.model.model.portable_attention)
    return log


def run_info(setup: Setup, dataset: Dataset) -> RunInfo:
    """Return what the sinks may show of a run, such as the lines at the top of the console's log and of the report."""
    config, stats, state, world = setup.config, setup.stats, setup.state, setup.model.world
    batches = setup.loader.batches
    layers, kernels, device = config.model.layers(), setup.kernels.as_text(), devices.device_name(world.device)
    ranks = f", {world.size} processes: {setup.model.mesh}" if world.size > 1 else ""
    moe = {i: block.ffn for i, block in enumerate(layers) if block.ffn.type == "moe"}
    factors = [ffn.capacity_factor for ffn in moe.values() if ffn.capacity_factor is not None]
    capacities = ", ".join(dict.fromkeys(f"{factor:g}" for factor in factors))
    header = {
        "run": str(config.run_dir),
        "device": f"{device}{ranks}, {config.precision}",
        "attention": kernels["attention"],
        "experts": kernels["experts"] if moe else "",
        "loss": kernels["loss"],
        "capacity": capacities and f"{capacities}: drops tokens, so the result depends on micro-batch and ranks",
        **describe_model(config, stats),
        "data": "; ".join(
            f"{name} {split.n_documents:,} documents, {split.n_tokens:,} tokens, {split.n_bytes / 1e6:.1f} MB"
            for name, split in (("train", dataset.train), ("val", dataset.val))
        ),
        "batch": describe_batch(config, setup.micro_batch.size),
        "steps": f"{config.steps:,}, {batches.tokens(config.steps):,} tokens",
        "average": describe_average(config),
        "initialized from": "" if state.step else config.init_from,
        "branched off from": describe_lineage(state.lineage),
        "resuming from": f"step {state.step:,}" if state.step and setup.parent is None else "",
    }
    facts = {
        "device": device,
        "precision": config.precision,
        "world_size": world.size,
        "micro_batch": setup.micro_batch.size,
        "tokens_per_step": batches.constant,
        "n_parameters": stats.n_parameters,
        "n_active_parameters": stats.n_active_parameters,
        "flops_per_token": stats.flops_per_token,
        "data": state.data,
        "lineage": state.lineage,
    }
    return RunInfo(
        dir=config.run_dir,
        name=config.name,
        config=state.config,
        config_yaml=cli.dump_config(config),
        header={label: text for label, text in header.items() if text},
        start_step=state.step,
        steps=config.steps,
        batches=batches,
        moe_layers=list(moe),
        facts=facts,
        hyperparameters=hyperparameters(config),
        is_new_branch=setup.parent is not None,
    )


def hyperparameters(config: Config) -> dict[str, Any]:
    """Return the options that are not at their default and those that are often varied, with lists as JSON."""
    changed = dict(flatten_options(config.model_dump(mode="json", exclude_defaults=True)))
    options = flatten_options(config.model_dump(mode="json"))
    return {
        name: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for name, value in options
        if (name in changed and not name.startswith(UNVARIED)) or name.startswith(VARIED)
    }


def describe_average(config: Config) -> str:
    """Return a line about the averaged weights, "" if there are none."""
    if (average := config.optim.average) is None:
        return ""
    of_weights = f"of the weights, decay {average.decay:g}, from step {config.schedule.warmup_steps + 1} on"
    return of_weights + "; the final model has it" * average.final


def finish(setup: Setup, dataset: Dataset, checkpoints: Checkpoints, log: RunLog, phase: Phases) -> None:
    """Write the final model, experts.json, summary.json and the report; close the log and wait for the run's copy.

    Raises UserError. Collective.
    """
    config, model, tokenizer, expert_tokens = setup.config, setup.model, dataset.tokenizer, None
    folder, is_main = config.run_dir, model.world.is_main
    with phase("checkpoint"):
        weights, is_average = final_weights(setup)
    if setup.stats.top_ks and (is_main or model.mesh.has_collectives):
        with phase("evaluation"):
            model.reshard()
            args = (model.model, setup.val_samples, tokenizer, config.eval)
            expert_tokens = measure_expert_tokens(*args, micro_batch=setup.micro_batch.size, step=setup.state.step)
    if not is_main:
        return
    with phase("checkpoint"):
        try:
            with atomic_folder(folder / "model") as unfinished:
                ends = end_tokens(tokenizer) if config.data.has_messages else ()
                options = {"n_vocab": setup.state.n_vocab, "end_tokens": ends}
                hf.write_model(unfinished, weights, config.model, tokenizer.end_of_text, **options)
                tokenizer.save(unfinished, config.model.n_positions)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder / 'model'}: the model could not be written: {error}") from error
        if expert_tokens is not None:
            write_atomically(folder / "experts.json", json.dumps(expert_tokens) + "\n")
    summary = summarize(setup, dataset, log)
    final_loss = model_val_loss(log, summary["model_step"], is_average)
    summary |= {"model_is_average": is_average, "model_val_loss": final_loss}
    if summary["stopped_early"]:
        n, step = config.eval.patience, setup.state.step
        print_line(f"eval.patience: no lower loss in {n} evaluations; stopped early at step {step:,}")
    write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    update_report(log.info, log.history, summary, expert_tokens)
    log.close(summary)
    checkpoints.finish_copy(is_finished=True)


def final_weights(setup: Setup) -> tuple[dict[str, Tensor], bool]:
    """Return the full weights of the final model on the main rank, and True if they are averaged ones. Collective.

    They are those of the last step or, with `checkpoint.final: best` or after `eval.patience` ended the run, read from
    the checkpoint of the best one.
    """
    model, average, state = setup.model, setup.config.optim.average, setup.state
    wants_average = average is not None and average.final
    if has_best_model(setup) and state.best["step"] != state.step:
        loaded = best_checkpoint(setup) if model.world.is_main else None
        weights, averages = ({}, {}) if loaded is None else (loaded.model, averages_in(loaded.optimizer))
        weights |= averages if wants_average else {}
    else:
        averages = setup.optimizer.averages
        with model.with_weights(averages) if wants_average and averages else nullcontext():
            weights = model.full_state_dict()
            if wants_average:  # copies: the model gets its own weights back
                weights = {name: tensor.clone() for name, tensor in weights.items()}
    if wants_average and not averages and model.world.is_main:
        print_note("optim.average: it had not begun at the step of the final model, which has the trained weights")
    return weights, wants_average and bool(averages)


def model_val_loss(log: RunLog, step: int, is_average: bool) -> float | None:
    """Return the validation loss of the final model; None if its step has none in the log."""
    name = "averaged_val_loss" if is_average else "val_loss"
    return dict(log.history.points(name)).get(step)


def has_best_model(setup: Setup) -> bool:
    """Return True if the final model is that of the best step."""
    config, state = setup.config, setup.state
    return state.best is not None and (config.checkpoint.final == "best" or is_out_of_patience(state, config))


def best_checkpoint(setup: Setup) -> Checkpoint:
    """Read the best checkpoint. Raises UserError if it is damaged."""
    return checkpoint.load(checkpoint.step_path(setup.config.run_dir / "checkpoints", setup.state.best["step"]))


def summarize(setup: Setup, dataset: Dataset, log: RunLog) -> dict[str, Any]:
    """Return the contents of summary.json."""
    config, state, row, folder = setup.config, setup.state, nan_to_null(log.last_row), str(setup.config.run_dir)
    micro_batch, device, best = setup.micro_batch, setup.model.world.device, state.best or {}
    facts = facts_from_history(
        log.history,
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
    return {
        "steps": state.step,
        "tokens": row["tokens"],
        "skipped_steps": state.guard.n_skipped,
        "train_loss": row.get("loss"),
        **summary_values(row),
        "best_val_loss": best.get("val_loss"),
        "best_step": best.get("step"),
        "best_of": best.get("of"),
        "model_step": best["step"] if has_best_model(setup) else state.step,
        "stopped_early": is_out_of_patience(state, config) and state.step < config.steps,
        "time_s": log.time_s,
        "tokens_per_s": row["tokens"] / log.time_s,
        "goodput": log.timer.goodput,
        "time": {phase: round(seconds, 6) for phase, seconds in log.timer.seconds.items()},
        "advice": advice(facts),
        "parameters": setup.stats.n_parameters,
        "active_parameters": setup.stats.n_active_parameters,
        "model_dir": f"{folder}/model",
        "lineage": state.lineage,
        "next": next_commands(config, state),
    }

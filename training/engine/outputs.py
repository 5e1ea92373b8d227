"""Open a run's outputs other than checkpoints: config.yaml, the tokenizer, run.json and the logs."""

from functools import partial
from typing import Any

from training import device as devices
from training.data import Dataset
from training.engine.build import Setup
from training.errors import UserError
from training.files import mkdir_durable, write_atomically
from training.logging import jsonl
from training.logging.phases import PhaseTimer
from training.logging.rows import RunLog
from training.logging.sinks import RunInfo, open_sinks
from training.model.metrics import step_metrics
from training.options import cli
from training.planning.report import describe_batch, describe_model


def open_log(setup: Setup, dataset: Dataset, started: float) -> RunLog:
    """Return the run's log; on the main rank write config.yaml and the tokenizer, and open the sinks.

    `started` is the `time.perf_counter` at the start of the process. Raises UserError if the folder cannot be written.
    """
    config, state, world = setup.config, setup.state, setup.model.world
    timer = PhaseTimer(world.device, started)
    timer.load_state_dict(state.phases)
    log = RunLog(
        config=config,
        world=world,
        step_metrics=partial(step_metrics, top_ks=setup.stats.top_ks),
        flops_per_token=setup.stats.flops_per_token,
        timer=timer,
        time_s=state.time_s,
        last_row=state.last_row,
    )
    if not world.is_main:
        return log
    folder, text = config.run_dir, cli.dump_config(config)
    try:
        mkdir_durable(folder)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; choose another --out_dir or --name") from error
    write_atomically(folder / "config.yaml", text)
    dataset.tokenizer.save(folder / "tokenizer")
    timer.add_lost_time(jsonl.read_rows(folder / "metrics.jsonl"), state.step)
    info = RunInfo(
        dir=folder,
        name=config.name,
        config=config.model_dump(mode="json"),
        config_yaml=text,
        header=header(setup, dataset),
        start_step=state.step,
        steps=config.steps,
        tokens_per_step=config.batch_tokens,
        moe_layers=[i for i, block in enumerate(config.model.layers()) if block.ffn.type == "moe"],
        facts=facts(setup),
    )
    log.sinks = open_sinks(config.logging, info)
    if state.step == 0 and not setup.model.mesh.has_collectives:
        batch = setup.loader.samples.batch([0])
        batch = batch._replace(tokens_BT=batch.tokens_BT[:, :32], targets_BT=batch.targets_BT[:, :32])
        for sink in log.sinks:
            sink.write_graph(setup.model.model, batch.to(world.device), setup.model.model.portable_attention)
    return log


def header(setup: Setup, dataset: Dataset) -> dict[str, str]:
    """Return {label: text} of the lines at the top of the console's log and of the report."""
    config, model, state, world = setup.config, setup.config.model, setup.state, setup.model.world
    ranks = f", {world.size} processes: {setup.model.mesh}" if world.size > 1 else ""
    moe = [block.ffn for block in model.layers() if block.ffn.type == "moe"]
    capacities = dict.fromkeys(f"{ffn.capacity_factor:g}" for ffn in moe if ffn.capacity_factor is not None)
    kernels = setup.kernels.as_text()
    lines = {
        "run": str(config.run_dir),
        "device": f"{devices.device_name(world.device)}{ranks}, {config.precision}",
        "attention": kernels["attention"],
        "experts": kernels["experts"] if moe else "",
        "loss": kernels["loss"],
        "capacity": f"{', '.join(capacities)}: drops tokens, so the result depends on micro-batch and ranks"
        if capacities
        else "",
        **describe_model(config, setup.stats),
        "data": "; ".join(
            f"{name} {split.n_documents:,} documents, {split.n_tokens:,} tokens, {split.n_bytes / 1e6:.1f} MB"
            for name, split in (("train", dataset.train), ("val", dataset.val))
        ),
        "batch": describe_batch(config, setup.micro_batch.size),
        "steps": f"{config.steps:,}, {config.steps * config.batch_tokens:,} tokens",
        "initialized from": config.init_from if config.init_from is not None and not state.step else "",
        "resuming from": f"step {state.step:,}" if state.step else "",
    }
    return {label: text for label, text in lines.items() if text}


def facts(setup: Setup) -> dict[str, Any]:
    """Return "facts" of run.json: the header's figures for programs."""
    config, world = setup.config, setup.model.world
    return {
        "device": devices.device_name(world.device),
        "precision": config.precision,
        "world_size": world.size,
        "micro_batch": setup.micro_batch.size,
        "tokens_per_step": config.batch_tokens,
        "n_parameters": setup.stats.n_parameters,
        "n_active_parameters": setup.stats.n_active_parameters,
    }

"""Validation loss over a fixed set of samples, and continuations of prompts."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

from training.data import Samples, Tokenizer
from training.data.dialogues import encode_user_turn, end_tokens
from training.distributed.world import World
from training.engine.build import Setup
from training.engine.loop import Phases
from training.engine.tasks import compute_scores, task_row
from training.model import GPT
from training.model.generation import SamplingParams, continue_texts, encode_prompt


def evaluate(setup: Setup, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the metrics of an evaluation over `eval.tokens` of the run's validation text. Collective.

    The averaged weights have figures of their own, from their beginning on.
    """
    config, model, averages = setup.config, setup.model, setup.optimizer.averages
    arguments = (setup.val_samples, tokenizer, config.eval.tokens, setup.micro_batch.size, model.world)
    row = validation_figures(model.model, *arguments)
    model.reshard()
    if averages:
        with model.with_weights(averages):
            figures = validation_figures(model.model, *arguments)
        row |= {f"averaged_{name}": figures[name] for name in ("val_loss", "val_bits_per_byte")}
    return row


def score_tasks(setup: Setup, phase: Phases) -> dict[str, Any]:
    """Return the metrics of the run's tasks; {} if it has none. Collective."""
    if not setup.tasks:
        return {}
    with phase("evaluation"):
        row = task_row(compute_scores(setup.model.model, setup.tasks, setup.model.world))
        setup.model.reshard()
    return row


def sample_texts(setup: Setup, tokenizer: Tokenizer) -> dict[str, list[dict[str, str]]]:
    """Return {"samples": a continuation of each of `eval.prompts`}; {} on ranks that do not sample.

    A text depends only on weights, seed, step and prompt. In a run on dialogues a prompt is a user's turn. Collective
    if forward contains collectives.
    """
    config, model = setup.config, setup.model
    is_collective = model.mesh.has_collectives
    if not config.eval.prompts or not (model.world.is_main or is_collective):
        return {}
    is_chat = config.data.has_messages
    encode = encode_user_turn if is_chat else encode_prompt
    texts = continue_texts(
        model.model,
        tokenizer,
        [encode(tokenizer, prompt) for prompt in config.eval.prompts],
        config.eval.sample_tokens,
        seeds=[(config.seed, setup.state.step)] * len(config.eval.prompts),
        params=SamplingParams(config.eval.temperature, config.eval.top_k),
        end_tokens=end_tokens(tokenizer) if is_chat else (),
        sync_tokens=model.world.broadcast_tensor if is_collective else None,
    )
    model.reshard()
    pairs = zip(config.eval.prompts, texts, strict=True)
    return {"samples": [{"prompt": prompt, "text": text.text} for prompt, text in pairs]}


class Losses(NamedTuple):
    """Sums over the targets of some text."""

    nats: float
    n_targets: float
    n_bytes: float  # of the targets' text, before normalization

    def figures(self) -> dict[str, float]:
        """Return the loss in nats per token, the perplexity, and the bits per byte."""
        loss = self.nats / self.n_targets
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700)),  # exp(710) overflows
            "bits_per_byte": self.nats / math.log(2) / self.n_bytes,
        }


def total(losses: Iterable[Losses]) -> Losses:
    """Return the sums over all of the text."""
    return Losses(*map(sum, zip(*losses, strict=True)))


def validation_figures(
    model: GPT, samples: Samples, tokenizer: Tokenizer, n_tokens: int | None, micro_batch: int, world: World
) -> dict[str, Any]:
    """Return the metrics of an evaluation: over all of the validation text and, if there are several, by source.

    Arguments as of `validation_losses`. Collective.
    """
    by_name = validation_losses(model, samples, tokenizer, n_tokens, micro_batch, world)
    row: dict[str, Any] = {f"val_{name}": value for name, value in total(by_name.values()).figures().items()}
    if len(by_name) > 1:
        for source, losses in by_name.items():
            for name, value in losses.figures().items():
                row.setdefault("val_sets", {}).setdefault(name, {})[source] = value
    return row


@torch.no_grad()
def validation_losses(
    model: GPT, samples: Samples, tokenizer: Tokenizer, n_tokens: int | None, micro_batch: int, world: World
) -> dict[str, Losses]:
    """Return, by the source's name, the cross-entropy over `n_tokens` of the samples (None: all). Collective.

    Without auxiliary losses. The samples are the same, evenly spaced, for any micro-batch and number of ranks.
    """
    sums = [
        sum_losses(model, samples, indices, tokenizer, micro_batch, world)
        for indices in samples.evenly_spaced(n_tokens)
    ]
    sums = torch.tensor(sums, dtype=torch.float64)
    world.all_reduce_([sums])
    losses = {}
    for stream, values in zip(samples.split.streams, sums.tolist(), strict=True):
        of_source = Losses(*values)
        if stream.token_bytes is not None:  # evenly over the source: no token has its own text
            of_source = of_source._replace(n_bytes=of_source.n_bytes * stream.n_bytes / stream.token_bytes)
        losses[stream.name] = of_source
    return losses


def sum_losses(
    model: GPT, samples: Samples, indices: np.ndarray, tokenizer: Tokenizer, micro_batch: int, world: World
) -> Losses:
    """Return the sums over this rank's part of the samples with these indices. Collective."""
    local = world.local_range(len(indices))
    n_forwards = math.ceil(math.ceil(len(indices) / world.size) / micro_batch)  # equal on all ranks, as FSDP requires
    loss_sums, n_targets, n_bytes = [], 0, 0
    for first in range(local.start, local.start + n_forwards * micro_batch, micro_batch):
        chunk = indices[first : min(first + micro_batch, local.stop)]
        batch = samples.batch(chunk if len(chunk) else indices[:1])
        if len(chunk) == 0:  # a dummy forward without targets
            batch = batch._replace(targets_BT=torch.full_like(batch.targets_BT, -1))
        _, metrics = model(batch.to(world.device))
        loss_sums.append(metrics["loss_sum"])
        targets = batch.targets_BT[batch.targets_BT >= 0]
        n_targets += len(targets)
        n_bytes += int(tokenizer.token_bytes[targets].sum())
    nats = torch.stack(loss_sums).cpu().double().sum().item() if loss_sums else 0.0
    return Losses(nats, n_targets, n_bytes)

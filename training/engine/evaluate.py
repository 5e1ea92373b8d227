"""Validation loss over a fixed set of samples, and continuations of prompts."""

import math

import torch

from training.data import Samples, Tokenizer
from training.distributed.world import World
from training.engine.build import Setup
from training.model import GPT
from training.model.generation import SamplingParams, continue_texts, encode_prompt


def evaluate(setup: Setup, tokenizer: Tokenizer) -> dict[str, float]:
    """Return the figures of `validation_loss` over `eval.tokens` of the run's validation set. Collective."""
    config, model = setup.config, setup.model
    n_tokens, micro_batch = config.eval.tokens, setup.micro_batch.size
    figures = validation_loss(model.model, setup.val_samples, tokenizer, n_tokens, micro_batch, model.world)
    model.reshard()
    return figures


def sample_texts(setup: Setup, tokenizer: Tokenizer) -> dict[str, list[dict[str, str]]]:
    """Return {"samples": a continuation of each of `eval.prompts`}; {} on ranks that do not sample.

    A text depends only on weights, seed, step and prompt. Collective if forward contains collectives.
    """
    config, model = setup.config, setup.model
    is_collective = model.mesh.has_collectives
    if not config.eval.prompts or not (model.world.is_main or is_collective):
        return {}
    texts = continue_texts(
        model.model,
        tokenizer,
        [encode_prompt(tokenizer, prompt) for prompt in config.eval.prompts],
        config.eval.sample_tokens,
        seeds=[(config.seed, setup.state.step)] * len(config.eval.prompts),
        params=SamplingParams(config.eval.temperature, config.eval.top_k),
        sync_tokens=model.world.broadcast_tensor if is_collective else None,
    )
    model.reshard()
    pairs = zip(config.eval.prompts, texts, strict=True)
    return {"samples": [{"prompt": prompt, "text": text.text} for prompt, text in pairs]}


@torch.no_grad()
def validation_loss(
    model: GPT, samples: Samples, tokenizer: Tokenizer, n_tokens: int | None, micro_batch: int, world: World
) -> dict[str, float]:
    """Return the cross-entropy over `n_tokens` of the samples (None: all), without auxiliary losses. Collective.

    The samples are the same, evenly spaced, for any micro-batch and number of ranks. Keys: "val_loss" (nats per
    token), "val_perplexity", "val_bits_per_byte" (per UTF-8 byte of the targets' text, before normalization).
    """
    indices = samples.evenly_spaced(n_tokens)
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
    loss_sum = torch.stack(loss_sums).cpu().double().sum() if loss_sums else 0.0
    sums = torch.tensor([loss_sum, n_targets, n_bytes], dtype=torch.float64)
    world.all_reduce_([sums])
    nats, n_targets, n_bytes = sums.tolist()
    if (token_bytes := samples.split.token_bytes) is not None:  # evenly over the split: no token has its own text
        n_bytes *= samples.split.n_bytes / token_bytes
    loss = nats / n_targets
    return {
        "val_loss": loss,
        "val_perplexity": math.exp(min(loss, 700)),  # exp(710) overflows
        "val_bits_per_byte": nats / math.log(2) / n_bytes,
    }

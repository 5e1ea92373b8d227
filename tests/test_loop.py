"""What a step, an evaluation and a save compute, against the same written down a second time."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from training import device as devices
from training.data import prepare
from training.data.loader import Samples
from training.distributed.world import World
from training.engine import step as loop
from training.engine.build import begin, save
from training.engine.step import Watch, evaluate, train_step, update
from training.errors import UserError
from training.optim.loss_scale import LossScale
from training.train import train

CPU = torch.device("cpu")
# Auxiliary losses as large as the cross-entropy: what forgets or doubles them shows.
MOE = {"type": "moe", "n_experts": 4, "hidden": 32, "balance": "both", "z_loss_weight": 1.0, "switch_weight": 2.0}
MODEL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "blocks": [{"ffn": MOE}, {}]}


@pytest.fixture
def begun(config):
    """Begin the small run, or go on with it, in this process; keywords replace options."""
    runs = []

    def make(**changes):
        made = config(**{"model": MODEL} | changes)
        runs.append(begin(made, prepare(made.data, quiet=True), World(0, 1, CPU), "auto"))
        return runs[-1]

    yield make
    for run in runs:
        run.close()


def perturb(model) -> None:
    """Weights large enough that no two windows have the same loss."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=generator)


def cross_entropy(model, tokens, targets) -> torch.Tensor:
    """The sum over the targets, in nats."""
    logits = model.logits(torch.from_numpy(tokens))
    return F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).flatten(), ignore_index=-1, reduction="sum")


def test_the_norm_of_a_large_gradient_is_exact(begun):
    """One sum of all squares in float32 is off by a thousandth, on a CPU."""
    run = begun(model=MODEL | {"vocab_size": 65536, "n_embd": 128})
    for _, parameter in run.layout.local_parameters():
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    exact = math.sqrt(
        sum(parameter.grad.double().square().sum().item() for _, parameter in run.layout.local_parameters())
    )
    assert run.layout.grad_norm().item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("n_windows", [7, None], ids=["some windows", "all windows"])
def test_an_evaluation_is_the_cross_entropy_of_windows_spread_evenly(begun, n_windows):
    run = begun()
    perturb(run.model)
    there = run.val_batches.n_samples
    windows = range(there) if n_windows is None else [there * i // n_windows for i in range(n_windows)]
    tokens, targets = run.val_batches.at(list(windows))
    found = evaluate(
        run.model,
        run.val_batches,
        run.dataset.tokenizer,
        None if n_windows is None else 32 * n_windows + 31,
        micro_batch=3,
        world=run.world,
    )
    with torch.no_grad():
        nats = cross_entropy(run.model, tokens, targets).item()
    n_bytes = (targets >= 0).sum() - (targets == run.dataset.tokenizer.end_of_text).sum()  # a token is a byte
    assert found["val_loss"] == pytest.approx(nats / (targets >= 0).sum(), rel=1e-5)
    assert found["val_perplexity"] == pytest.approx(math.exp(nats / (targets >= 0).sum()), rel=1e-4)
    assert found["val_bits_per_byte"] == pytest.approx(nats / n_bytes / math.log(2), rel=1e-5)


def test_a_step_follows_the_gradient_of_the_written_down_loss_on_its_own_batch(begun, monkeypatch):
    run = begun(micro_batch=3)
    perturb(run.model)
    taken = []

    def spy(run, grad_norm):
        taken[:] = [p.grad.clone() for p in run.model.parameters()]
        update(run, grad_norm)

    monkeypatch.setattr(loop, "update", spy)
    for step in (0, 1):
        tokens, targets = run.batches.at(step * 8 + np.arange(8))
        nats, routing = written_down(run.model, tokens, targets)
        parameters = list(run.model.parameters())
        expected = torch.autograd.grad(nats / 256 + routing, parameters)
        train_step(run)
        rounding = 1e-5 * max(g.abs().max().item() for g in expected)  # a key's bias has a gradient of zero
        for ours, theirs in zip(taken, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=rounding)
        (row,) = run.metrics.fetch()
        assert row["loss"] == pytest.approx(nats.item() / 256, rel=1e-5)
        assert row["grad_norm"] == pytest.approx(torch.cat([g.flatten() for g in expected]).norm().item(), rel=1e-4)


def written_down(model, tokens, targets) -> tuple[torch.Tensor, torch.Tensor]:
    """(cross-entropy as a sum, z-loss and Switch loss as weighted means) of a whole batch."""
    seen, moe = [], model.blocks[0].ffn
    hook = moe.router.register_forward_hook(lambda *called: seen.append(called[-1]))
    nats = cross_entropy(model, tokens, targets)
    hook.remove()
    logits = seen[0].flatten(0, -2)
    z_loss = logits.logsumexp(dim=-1).square().mean()
    switch = 4 * (moe.load.clone() * logits.softmax(dim=-1).mean(dim=0)).sum()
    return nats, 1.0 * z_loss + 2.0 * switch


def test_a_step_is_done_though_the_next_ones_batch_cannot_be_read(begun, monkeypatch):
    """It is read ahead, and the step that needs it reads it again, to tell."""
    run, samples = begun(), Samples.samples

    def damaged(self, indices):
        if 8 in indices:  # the second step's first
            raise UserError("damaged")
        return samples(self, indices)

    monkeypatch.setattr(Samples, "samples", damaged)
    train_step(run)
    assert run.step == 1
    with pytest.raises(UserError, match="damaged"):
        train_step(run)


def test_a_step_balances_the_experts(begun):
    run = begun()
    perturb(run.model)
    moe = run.model.blocks[0].ffn
    expected = torch.zeros(4)
    for _ in range(2):
        train_step(run)
        load = torch.tensor(run.metrics.fetch()[0]["expert_load"][0])
        assert load.max() > 0.3
        torch.testing.assert_close(moe.load, load)
        expected += moe.config.bias_rate * (0.25 - load).sign()
    torch.testing.assert_close(moe.selection_bias, expected)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("norm", "clipped"), [(0.25, 0.25), (40.0, 0.5)])
def test_an_update_clips_a_large_gradient_and_leaves_a_small_one(begun, monkeypatch, precision, norm, clipped):
    run = begun(precision=precision, optim={"grad_clip": 0.5})
    parameters = list(run.model.parameters())
    gradients = [torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) for i, p in enumerate(parameters)]
    length = torch.cat([g.flatten() for g in gradients]).norm()
    scale = run.loss_scale.scale if precision == "fp16" else 1.0
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g * (norm * scale / length)
    taken = []
    monkeypatch.setattr(run.optimizer, "step", lambda _: taken.extend(p.grad.clone() for p in parameters))
    update(run, torch.tensor(norm))
    for ours, g in zip(taken, gradients, strict=True):
        torch.testing.assert_close(ours, g * (clipped / length), rtol=1e-4, atol=0)


def test_the_learning_rate_in_the_log_is_the_one_of_the_step(begun):
    run = begun(steps=5)
    used = []
    for _ in range(5):
        train_step(run)
        used.append(run.optimizer.optimizers[0].param_groups[0]["lr"])
    assert used[:3] == pytest.approx([6e-4 / 3, 6e-4 * 2 / 3, 6e-4])  # two steps of warm-up
    assert [row["learning_rate"] for row in run.metrics.fetch()] == pytest.approx(used)


def test_the_loss_scale_doubles_after_2000_good_steps_and_halves_after_a_bad_one():
    scale = LossScale(8.0)
    for _ in range(1999):
        scale.update(True)
    assert scale.scale == 8
    scale.update(True)
    assert scale.scale == 16
    scale.update(False)
    for _ in range(1999):
        scale.update(True)
    assert scale.scale == 8
    scale.update(True)
    assert scale.scale == 16


def test_a_run_is_saved_after_so_many_minutes(begun):
    run = begun(checkpoint={"every": None, "every_minutes": 5})
    run.step = 1
    watch = Watch(run)
    try:
        assert not watch.due().save
        watch.saved_at -= 5 * 60 - 20
        assert not watch.due().save
        watch.saved_at -= 21
        assert watch.due().save
        assert not watch.due().save
    finally:
        watch.close()


def test_the_best_evaluation_is_saved_when_it_comes_and_kept(config, tmp_path):
    rising = {"type": "constant", "warmup_steps": 39}  # good at first, then far too high
    made = config(
        steps=40,
        optim={"learning_rate": 1.0},
        schedule=rising,
        eval={"every": 4, "tokens": 512},
        checkpoint={"every": None, "keep": 1},
    )
    assert train(made) == 0
    folder = tmp_path / "runs/small"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    val_losses = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    best = min(val_losses, key=val_losses.get)
    assert best not in (4, 40), val_losses
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["best_step"], summary["best_val_loss"]) == (best, val_losses[best])
    assert summary["val_loss"] == val_losses[40]
    kept = {path.name for path in (folder / "checkpoints").glob("step-*")}
    assert kept == {f"step-{best:08d}", "step-00000040"}


def test_the_loss_scale_goes_on_where_it_was(begun):
    run = begun(precision="fp16")
    run.loss_scale = LossScale(2.0**10, good_steps=7)
    train_step(run)
    save(run)
    run.close()
    assert begun(precision="fp16").loss_scale == LossScale(2.0**10, good_steps=8)


def test_a_run_keeps_the_precision_it_began_with(begun):
    another = "fp32" if devices.resolve_precision("auto", CPU) == "bf16" else "bf16"
    run = begun(precision=another)
    train_step(run)
    save(run)
    run.close()
    again = begun(precision="auto")
    assert again.step == 1
    assert again.config.precision == another and again.model.dtype == devices.DTYPES[another]

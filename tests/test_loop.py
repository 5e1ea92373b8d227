"""Steps, evaluations and saves equal a second, plain implementation."""

import dataclasses
import json
import math
from itertools import chain

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import load_file

from training import device as devices
from training.config import CheckpointConfig
from training.data.loader import Samples
from training.engine import step
from training.engine.evaluate import validation_figures
from training.engine.loop import Events
from training.engine.step import clip_gradients
from training.errors import UserError
from training.optim.optimizer import LossScale, averages_in
from training.train import train

CPU = torch.device("cpu")
# Auxiliary losses as large as the cross-entropy, so that a test fails if one is missing or counted twice.
MOE = {"type": "moe", "n_experts": 4, "hidden": 32, "balance": "both", "z_loss_weight": 1.0, "switch_weight": 2.0}
MODEL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "blocks": [{"ffn": MOE}, {}]}


@pytest.fixture
def build_run(build_run):
    """Build the small run with strong auxiliary losses."""
    return lambda **changes: build_run(**{"model": MODEL} | changes)


def perturb(model) -> None:
    """Make weights so large that no two windows have the same loss."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=generator)


def test_bits_per_byte_are_those_of_the_text_before_normalization(build_run):
    """With 2 bytes of tokens for 3 of the text, a byte of the text costs 2/3 as much."""
    one = build_run()
    samples, before = one.setup.val_samples, one.evaluate()
    streams = [dataclasses.replace(stream, n_bytes=3, token_bytes=2) for stream in samples.split.streams]
    samples.split = dataclasses.replace(samples.split, streams=tuple(streams))
    after = one.evaluate()
    assert after["val_bits_per_byte"] == pytest.approx(before["val_bits_per_byte"] * 2 / 3, rel=1e-12)
    assert after["val_loss"] == before["val_loss"]


def cross_entropy(model, tokens, targets) -> torch.Tensor:
    """Return the sum over the targets, in nats."""
    logits = model.logits(torch.from_numpy(tokens))
    return F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).flatten(), ignore_index=-1, reduction="sum")


def test_the_norm_of_a_large_gradient_is_exact(build_run):
    """On a CPU, a single float32 sum of all squares is off by a thousandth."""
    run = build_run(model=MODEL | {"vocab_size": 65536, "n_embd": 128})
    for _, parameter in run.sharded.local_parameters():
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    exact = math.sqrt(
        sum(parameter.grad.double().square().sum().item() for _, parameter in run.sharded.local_parameters())
    )
    assert run.sharded.grad_norm().item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("n_windows", [7, None], ids=["some windows", "all windows"])
def test_an_evaluation_is_the_cross_entropy_of_windows_spread_evenly(build_run, n_windows):
    """Over each source's text: in proportion to its windows, at least one; and over all of these windows."""
    run = build_run()
    perturb(run.model)
    samples, first, parts = run.setup.val_samples, 0, {}
    for stream in samples.split.streams:
        there = math.ceil((len(stream.tokens) - 1) / 32)
        before, after = (
            (n_windows * end // samples.n_samples for end in (first, first + there)) if n_windows else (0, there)
        )
        n = max(1, after - before)
        parts[stream.name] = [first + there * i // n for i in range(n)]
        first += there
    assert first == samples.n_samples and list(parts) == ["json", "email", "logging"]
    figures = validation_figures(
        run.model,
        run.setup.val_samples,
        run.dataset.tokenizer,
        None if n_windows is None else 32 * n_windows + 31,
        micro_batch=3,
        world=run.world,
    )
    of_sources = figures.pop("val_sets")
    for name, windows in {**parts, None: list(chain.from_iterable(parts.values()))}.items():
        tokens, targets = samples.at(windows)
        with torch.no_grad():
            nats = cross_entropy(run.model, tokens, targets).item()
        n_targets = (targets >= 0).sum()
        n_bytes = n_targets - (targets == run.dataset.tokenizer.end_of_text).sum()  # a token is a byte
        expected = {"loss": nats / n_targets, "perplexity": math.exp(nats / n_targets)}
        expected["bits_per_byte"] = nats / n_bytes / math.log(2)
        if name is None:
            assert figures == pytest.approx({f"val_{key}": value for key, value in expected.items()}, rel=1e-4)
        else:
            assert {key: values[name] for key, values in of_sources.items()} == pytest.approx(expected, rel=1e-4)


def test_a_step_follows_the_gradient_of_the_reference_loss_on_its_own_batch(build_run, monkeypatch):
    run = build_run(micro_batch=3)
    perturb(run.model)
    gradients = []

    def spy(*arguments):
        gradients[:] = [p.grad.clone() for p in run.model.parameters()]
        clip_gradients(*arguments)

    monkeypatch.setattr(step, "clip_gradients", spy)
    for number in (0, 1):
        tokens, targets = run.setup.loader.samples.at(number * 8 + np.arange(8))
        nats, routing = reference_loss(run.model, tokens, targets)
        parameters = list(run.model.parameters())
        expected = torch.autograd.grad(nats / 256 + routing, parameters)
        run.train_step()
        rounding = 1e-5 * max(g.abs().max().item() for g in expected)  # a key's bias has a gradient of zero
        for ours, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=rounding)
        (row,) = run.rows()
        assert row["loss"] == pytest.approx(nats.item() / 256, rel=1e-5)
        assert row["grad_norm"] == pytest.approx(torch.cat([g.flatten() for g in expected]).norm().item(), rel=1e-4)


def reference_loss(model, tokens, targets) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (cross-entropy as a sum, z-loss and Switch loss as weighted means) of a whole batch."""
    seen, moe = [], model.blocks[0].ffn
    hook = moe.router.register_forward_hook(lambda *called: seen.append(called[-1]))
    nats = cross_entropy(model, tokens, targets)
    hook.remove()
    logits = seen[0].flatten(0, -2)
    z_loss = logits.logsumexp(dim=-1).square().mean()
    switch = 4 * (moe.load.clone() * logits.softmax(dim=-1).mean(dim=0)).sum()
    return nats, 1.0 * z_loss + 2.0 * switch


def test_a_step_completes_if_the_next_batch_cannot_be_read(build_run, monkeypatch):
    """The loader prefetches it; the step that needs it reads it again and raises there."""
    run, read = build_run(), Samples.read

    def damaged(self, indices):
        if 8 in indices:  # the first sample of step 2
            raise UserError("damaged")
        return read(self, indices)

    monkeypatch.setattr(Samples, "read", damaged)
    run.train_step()
    assert run.state.step == 1
    with pytest.raises(UserError, match="damaged"):
        run.train_step()


def test_a_step_balances_the_experts(build_run):
    run = build_run()
    perturb(run.model)
    moe = run.model.blocks[0].ffn
    expected = torch.zeros(4)
    for _ in range(2):
        run.train_step()
        load = torch.tensor(run.rows()[0]["expert_load"][0])
        assert load.max() > 0.3
        torch.testing.assert_close(moe.load, load)
        expected += moe.config.bias_rate * (0.25 - load).sign()
    torch.testing.assert_close(moe.selection_bias, expected)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("norm", "clipped"), [(0.25, 0.25), (40.0, 0.5)])
def test_an_update_clips_a_large_gradient_and_leaves_a_small_one(build_run, monkeypatch, precision, norm, clipped):
    run = build_run(precision=precision, optim={"grad_clip": 0.5})
    parameters = list(run.model.parameters())
    gradients = [torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) for i, p in enumerate(parameters)]
    length = torch.cat([g.flatten() for g in gradients]).norm()
    scale = run.state.loss_scale.scale if precision == "fp16" else 1.0
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g * (norm * scale / length)
    clipped_gradients = []
    monkeypatch.setattr(run.optimizer, "step", lambda _: clipped_gradients.extend(p.grad.clone() for p in parameters))
    clip_gradients(run.sharded, torch.tensor(norm), run.config.optim.grad_clip, scale)
    run.optimizer.step(1.0)
    for ours, g in zip(clipped_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, g * (clipped / length), rtol=1e-4, atol=0)


def test_the_learning_rate_in_the_log_is_the_one_of_the_step(build_run):
    run = build_run(steps=5)
    used = []
    for _ in range(5):
        run.train_step()
        used.append(run.optimizer.optimizers[0].param_groups[0]["lr"])
    assert used[:3] == pytest.approx([6e-4 / 3, 6e-4 * 2 / 3, 6e-4])  # two steps of warm-up
    assert [row["learning_rate"] for row in run.rows()] == pytest.approx(used)


def test_the_loss_scale_doubles_after_2000_good_steps_and_halves_after_a_bad_one():
    scale = LossScale(8.0, good_steps=0)
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


def test_a_run_is_saved_every_n_minutes(build_run):
    run = build_run(checkpoint={"every": None, "every_minutes": 5})
    run.state.step = 1
    with Events(run.config, run.world, run.checkpoints) as events:
        assert not events.after(run.state).save
        events.saved_at -= 5 * 60 - 20
        assert not events.after(run.state).save
        events.saved_at -= 21
        assert events.after(run.state).save
        assert not events.after(run.state).save


def test_every_nth_step_is_saved_and_kept(run, call):
    folder = run(checkpoint={"every": 4, "keep": 1, "keep_every": 3, "keep_best": False})
    names = ["step-00000003", "step-00000006", "step-00000008"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == names
    assert call("checkpoints", "prune", str(folder), "--keep", "1").returncode == 0
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == names


def test_the_best_evaluation_is_saved_at_once_and_kept(config, tmp_path):
    rising = {"type": "constant", "warmup_steps": 39}  # good at first, then far too high
    rising_config = config(
        steps=40,
        optim={"learning_rate": 1.0},
        schedule=rising,
        eval={"every": 4, "tokens": 512},
        checkpoint={"every": None, "keep": 1},
    )
    assert train(rising_config) == 0
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
    assert summary["model_step"] == 40


@pytest.mark.parametrize("average", [None, {"decay": 0.5, "final": True}])
def test_the_best_step_may_be_the_final_model(run, capsys, average):
    """The learning rate rises until training diverges."""
    folder = run(
        steps=12,
        optim={"learning_rate": 1.0, "average": average},
        schedule={"type": "constant", "warmup_steps": 3},
        eval={"every": 2, "tokens": 512},
        checkpoint={"every": 1, "keep": 1, "final": "best"},
        model={"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 32},
    )
    summary = json.loads((folder / "summary.json").read_text())
    best = summary["best_step"]
    assert summary["model_step"] == best < 12
    assert f"model       {folder}/model, of step {best}\n" in capsys.readouterr().out
    checkpoint = folder / f"checkpoints/step-{best:08d}"
    expected = load_file(checkpoint / "model.safetensors")
    if average is not None and best > 3:
        expected |= averages_in(load_file(checkpoint / "optimizer.safetensors"))
    written = load_file(folder / "model/model.safetensors")
    assert torch.equal(written["transformer.wpe.weight"], expected["wpe.weight"])
    assert summary["model_is_average"] == (average is not None and best > 3)


def test_the_best_model_needs_the_best_checkpoint():
    with pytest.raises(ValidationError, match="only with keep_best"):
        CheckpointConfig(final="best", keep_best=False)


def test_a_resumed_run_keeps_its_loss_scale(build_run):
    run = build_run(precision="fp16")
    run.state.loss_scale = LossScale(2.0**10, good_steps=7)
    run.train_step()
    run.save()
    run.close()
    assert build_run(precision="fp16").state.loss_scale == LossScale(2.0**10, good_steps=8)


def test_a_resumed_run_keeps_its_precision(build_run):
    another = "fp32" if devices.resolve_precision("auto", CPU) == "bf16" else "bf16"
    run = build_run(precision=another)
    run.train_step()
    run.save()
    run.close()
    again = build_run(precision="auto")
    assert again.state.step == 1
    assert again.config.precision == another and again.model.dtype == devices.DTYPES[another]

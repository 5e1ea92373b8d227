"""A plan says what a run will take: memory as it is counted while real tensors live, and figures that can be redone."""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys

import pytest
import torch

from training import plan
from training.config import Config
from training.data import prepare
from training.distributed.mesh import MeshShape
from training.distributed.parallelize import parallelize
from training.distributed.world import World
from training.kernels.choose import ATTENTION_BACKENDS, EXPERT_KERNELS, Kernels
from training.model import GPT
from training.optim.optimizer import Optimizer
from training.options import cli
from training.planning.disk import checkpoint_bytes
from training.planning.memory import StorageTracker, estimate, largest_micro_batch

MOE = {"type": "moe", "n_experts": 4, "top_k": 2, "hidden": 64}
SIZES = {"n_layer": 3, "n_head": 2, "n_embd": 32, "n_positions": 64, "vocab_size": 512}


def config_of(model=None, **changes) -> Config:
    options = {"batch_tokens": 512, "micro_batch": 8, "precision": "fp32", "data": {"sources": [{"type": "stdlib"}]}}
    return Config.model_validate(options | {"model": SIZES | (model or {})} | changes)


def counted(config: Config, micro_batch: int) -> int:
    """Bytes at the peak of a second step with real tensors, which take part in real operations."""
    live = StorageTracker(MeshShape(1, 1, 1))
    with live:
        model = GPT(config.model, Kernels(ATTENTION_BACKENDS["flash"], EXPERT_KERNELS["grouped"])).init_weights(0)
        gc.collect()
        layout = parallelize(model, config.parallel, World(0, 1, torch.device("cpu")), torch.float32)
        optimizer = Optimizer(config.optim, layout.local_parameters(), model.parameter_kinds())
        for _ in range(2):
            live.peak.clear()
            for _ in range(config.batch_tokens // 64 // micro_batch):
                tokens_BT = torch.randint(512, (micro_batch, 64))
                model(tokens_BT, tokens_BT, 512, None, torch.zeros(micro_batch, dtype=torch.int64))[0].backward()
            with torch.no_grad():
                layout.grad_norm()
                optimizer.step(1.0)
            layout.zero_grad()
    return live.peak.total()


@pytest.mark.parametrize(
    ("config", "micro_batch"),
    [
        (config_of(), 8),
        (config_of(), 2),
        (config_of({"blocks": [{"ffn": MOE}, {}], "position": "rope", "norm": "rmsnorm"}), 4),
        (config_of({"vocab_size": 8192, "tie_head": False}), 1),
        (config_of({"n_embd": 128}, optim={"type": "muon"}), 1),
        (config_of(parallel={"recompute": "full"}), 8),
        (config_of(parallel={"recompute": "selective"}), 8),
        (config_of({"blocks": [{"mixer": {"window": 16}}]}), 8),
    ],
    ids=["whole batch", "accumulated", "experts", "head of its own", "muon", "full", "selective", "window"],
)
def test_fake_tensors_take_what_real_ones_do(config, micro_batch):
    found = estimate(config, micro_batch)
    foretold = found.total - found.copy - found.pieces - found.process
    assert foretold == pytest.approx(counted(config, micro_batch), rel=0.03)


def test_the_parts_are_what_arithmetic_says():
    config = config_of({"blocks": [{"ffn": MOE}]}, optim={"type": "muon"})
    found, model = estimate(config, 2), GPT(config.model)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    matrices = sum(p.numel() for name, p in model.named_parameters() if model.parameter_kinds()[name] == "matrix")
    n = model.n_parameters()[0]
    assert found.weights == 4 * n + buffers and found.gradients == 4 * n
    assert found.optimizer == pytest.approx(4 * (2 * n - matrices), abs=1000)  # and counts of steps
    assert found.copy == found.weights + found.optimizer
    assert found.total == sum(found[:-1])
    on_gpu = estimate(config, 2, device="cuda")
    assert on_gpu.copy == on_gpu.pieces == on_gpu.process == 0


def test_on_a_gpu_logits_have_one_piece_of_memory_unless_another_loss_is_asked_for():
    def taken(device, **parallel):
        return estimate(config_of({"vocab_size": 8192}, precision="bf16", parallel=parallel), 8, device=device).total

    n_logits = 8 * 64 * 8192  # fewer than a GPU has at a time
    alone, copied = taken("cuda"), taken("cuda", loss="chunked")
    assert copied - alone == pytest.approx(4 * n_logits, rel=0.05)  # in float32
    assert taken("cuda", loss="reference") > copied
    assert taken("cpu") == taken("cpu", loss="chunked")


def test_a_mesh_divides_what_it_splits_and_the_worst_routing_sends_every_row_to_one_rank():
    model, batch = {"blocks": [{"ffn": MOE}], "n_embd": 128}, {"batch_tokens": 4096}
    whole = estimate(config_of(model, **batch), 8)
    n_experts = 3 * 4 * (2 * 64 * 128 + 64 + 128)
    sharded = estimate(config_of(model, **batch, parallel={"mesh": {"shard": 4}}), 8, world=4)
    assert sharded.weights == pytest.approx(whole.weights / 4, rel=0.01)
    assert sharded.optimizer == pytest.approx(whole.optimizer / 4, rel=0.01)
    assert sharded.casts > whole.casts and sharded.routing == 0
    split = estimate(config_of(model, **batch, parallel={"mesh": {"expert": 4}}), 8, world=4)
    assert split.weights == whole.weights - 4 * n_experts * 3 // 4
    rows = 8 * 64 * 2  # that a rank sends; three other ranks' are kept of each layer, hidden twice and out
    assert split.routing > 3 * rows * 3 * 4 * (2 * 64 + 128)
    both = estimate(config_of(model, **batch, parallel={"mesh": {"shard": 4, "expert": 2}}), 8, world=4)
    assert both.weights == sharded.weights


def test_memory_is_nearly_a_straight_line_and_the_largest_micro_batch_is_the_last_that_fits():
    config = config_of(batch_tokens=4096)
    one, two, nine = (estimate(config, n).total for n in (1, 2, 9))
    assert nine - one == pytest.approx(8 * (two - one), rel=0.1)
    limit = estimate(config, 9).total + 1
    assert largest_micro_batch(config, limit) == 9
    assert largest_micro_batch(config, one - 1) == 0
    assert largest_micro_batch(config, 2 * limit) == 64
    assert largest_micro_batch(config, 2 * limit, world=16) == 4


def plan_of(tmp_path, config, *flags) -> str:
    (tmp_path / "c.yaml").write_text(cli.dump_config(config))
    command = [sys.executable, "-m", "training.plan", "--config", "c.yaml", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_prints_a_page_that_can_be_checked_by_hand(tmp_path):
    mixed = {"n_embd": 256, "n_positions": 256, "blocks": [{"ffn": MOE}], "vocab_size": None}
    config = config_of(mixed, batch_tokens=65536, steps=1000, micro_batch=7, precision="bf16")
    said = plan_of(tmp_path, config, "--world", "8", "--device", "h200", "--mfu", "0.5")
    assert len(said.splitlines()) < 40
    model = GPT(config.model.model_copy(update={"vocab_size": 8192}))
    total, active = model.n_parameters()
    speed = 0.5 * 989e12 * 8 / model.flops_per_token()
    assert f"{total:,}, {active:,} of them active" in said
    assert "on 8 x H200, bf16" in said and "256 samples x 256, 32 a device, 7 at a time" in said
    assert f"{plan.hours(65536000 / speed)}, at {speed:,.0f} tokens/s" in said
    assert "not prepared here" in said and "all samples fit at once" in said
    assert "are no multiple of micro_batch 7" in said
    figures = [float(n) for n in re.findall(r"^  \w.*? +([\d.]+)(?: of 139.8)?$", said, flags=re.MULTILINE)]
    assert sum(figures[:-1]) == pytest.approx(figures[-1], abs=0.05)
    assert list(tmp_path.iterdir()) == [tmp_path / "c.yaml"]  # nothing prepared, nothing written


def test_prepared_data_tell_the_epochs_and_a_run_its_speed(run, config):
    small = config(steps=200, optim={"type": "muon"}, logging={"every": 1, "tensorboard": False})
    n_tokens = prepare(small.data, quiet=True).train.n_tokens
    here = plan.machine("cpu", small)
    found = plan.plan(small, here, 1)
    assert plan.epochs(found) == pytest.approx(200 * 256 / n_tokens)
    said = "\n".join(plan.lines(found, None, here=True))
    assert f"{n_tokens:,} tokens to train on" in said and "unknown: no peak is known" in said
    folder = run(steps=4, optim={"type": "muon"}, logging={"every": 1, "tensorboard": False})
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    middle = sorted(row["tokens_per_s"] for row in rows[1:])[1]
    assert f"at {middle:,.0f} tokens/s as this run was measured here" in plan._time(found, None, here=True)
    others = small.model_copy(update={"batch_tokens": 512}), here._replace(name="H200")
    assert plan.measured(found._replace(config=others[0])) is None
    assert plan.measured(found._replace(machine=others[1])) is None
    assert plan.measured(found._replace(world=2)) is None
    files = [(folder / "checkpoints" / "step-00000004" / f"{kind}.safetensors") for kind in ("model", "optimizer")]
    sizes = [path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little") for path in files]  # no header
    assert checkpoint_bytes(found.model, found.config) == pytest.approx(
        sum(sizes), abs=300
    )  # buffers, and counts of steps


@pytest.mark.parametrize(
    ("changes", "device", "expected"),
    [
        (
            {"micro_batch": 4096, "batch_tokens": 2**24, "model": {"n_embd": 2048, "n_head": 16}},
            "t4",
            "does not fit: use",
        ),
        ({"model": {"n_embd": 16384, "n_head": 64}}, "l4", "not one sample fits into 22.0 GiB"),
        ({"precision": "bf16"}, "V100", "V100 has no matrix units for bf16: use precision fp16"),
        ({"batch_tokens": 64 * 9}, "a100", "9 samples do not divide among 2 processes"),
        ({"steps": 200}, "a100", "tokens a parameter, where about 20 are best: a smaller model"),
        ({"steps": 10**7}, "a100", "a larger model learns more"),
    ],
    ids=str,
)
def test_what_is_likely_to_be_regretted_is_said(changes, device, expected):
    changed = dict(changes)
    config = config_of(changed.pop("model", None), **changed)
    found = plan.plan(config, plan.machine(device, config), 2)
    assert any(expected in line for line in plan.warnings(found)), list(plan.warnings(found))


def test_epochs_are_those_of_the_source_that_is_read_the_most(config):
    small = config(steps=100_000)
    paths = small.data.sources[0].paths
    weighted = [{"paths": [path], "weight": weight} for path, weight in zip(paths, (3.0, 0.5, 0.5), strict=True)]
    data = small.data.model_dump() | {"sources": weighted}
    small = Config.model_validate(small.model_dump() | {"data": data})
    n_tokens = [len(stream.tokens) for stream in prepare(small.data, quiet=True).train.streams]
    found = plan.plan(small, plan.machine("cpu", small), 1)
    shares = (3 / 4, 1 / 8, 1 / 8)
    most = max(100_000 * 256 * share / n for share, n in zip(shares, n_tokens, strict=True))
    assert plan.epochs(found) == pytest.approx(most)
    assert any("beyond 4 it teaches little" in line for line in plan.warnings(found))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--device", "abacus"], "--device: 'abacus' is none of cpu, V100"),
        (["--world", "0"], "--world: '0' is not a number of processes"),
        (["--world", "9"], "--world: 9 processes are more than the 8 samples of batch_tokens 512"),
        (["--mfu", "40"], "--mfu: '40' is not above 0"),
        (["--mfu", "0.4", "--device", "cpu"], "--mfu: no peak is known of CPU"),
        (["--parallel.mesh.shard", "3"], "parallel.mesh.shard: 3 does not divide the 1 processes"),
        (
            ["--model.vocab_size", "null", "--data.tokenizer", "{type: huggingface, name: x/y}"],
            "model.vocab_size: unknown",
        ),
    ],
    ids=str,
)
def test_bad_input_is_a_line(flags, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(cli.dump_config(config_of()))
    assert plan.main(["--config", "c.yaml", *flags]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"error: {expected}") and said.err.count("\n") == 1

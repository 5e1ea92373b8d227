"""A plan's memory agrees with real tensors, and its other figures can be computed by hand."""

import gc
import json
import re
import subprocess
import sys
import time
from collections import Counter
from itertools import cycle, product
from pathlib import Path

import pytest
import torch
import torch._dynamo  # the first fake tensor imports it, and imports do not count below
from conftest import ROOT, SHIPPED

from training.batch import Batch
from training.config import Config
from training.data import prepare
from training.device import GPUS
from training.distributed.parallelize import parallelize
from training.distributed.world import World
from training.errors import UserError
from training.kernels.attention.table import ATTENTION_BACKENDS
from training.kernels.interface import Kernels
from training.kernels.table import EXPERT_KERNELS
from training.model import GPT
from training.model.stats import model_stats, parameter_kinds
from training.optim.groups import freeze, match_groups
from training.optim.optimizer import Optimizer
from training.options import cli
from training.plan import main, measured_tokens_per_s
from training.planning import report
from training.planning.memory import MemoryEstimate, MemoryEstimator
from training.planning.walk import Peak, StorageTracker, walk

MOE = {"type": "moe", "n_experts": 4, "top_k": 2, "hidden": 64}
SIZES = {"n_layer": 3, "n_head": 2, "n_embd": 32, "n_positions": 64, "vocab_size": 512}


# Nothing before the second layer's feed-forward layer has a gradient.
FROZEN = {"type": "muon", "groups": [{"match": "w?e.*", "freeze": True}, {"match": "blocks.0.*", "freeze": True},
          {"match": "blocks.1.mixer.*", "freeze": True}, {"match": "blocks.2.*", "learning_rate": 1e-3}]}  # fmt: skip


def config_of(model=None, **changes) -> Config:
    options = {"batch_tokens": 512, "micro_batch": 8, "precision": "fp32", "data": {"sources": [{"type": "stdlib"}]}}
    return Config.model_validate(options | {"model": SIZES | (model or {})} | changes)


def estimate(config: Config, micro_batch: int, world_size: int = 1, device_type: str = "cpu") -> MemoryEstimate:
    return MemoryEstimator(config, world_size, device_type).estimate(micro_batch)


def peak_of_real_tensors(config: Config, micro_batch: int) -> int:
    """Return the bytes at the peak of two steps with real tensors."""
    tracker = StorageTracker()
    with tracker:
        model = GPT(config.model, Kernels(ATTENTION_BACKENDS["flash"], EXPERT_KERNELS["grouped"]))
        gc.collect()
        kinds = parameter_kinds(model)
        groups = match_groups(config.optim, kinds)
        freeze(model, groups)
        sharded = parallelize(model, config.parallel, World(0, 1, torch.device("cpu")), torch.float32)
        optimizer = Optimizer(config.optim, sharded.local_parameters(), kinds, groups=groups)
        for _ in range(2):
            for _ in range(config.batch_tokens // 64 // micro_batch):
                tokens_BT = torch.randint(512, (micro_batch, 64))
                key_B = torch.zeros(micro_batch, dtype=torch.int64)
                model(Batch(tokens_BT, tokens_BT, key_B, 512))[0].backward()
            with torch.no_grad():
                sharded.grad_norm()
                optimizer.step(1.0)
            sharded.zero_grad()
    peak = Peak(Counter())
    peak.add(tracker.parts[""])
    return peak.max_bytes


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
        (config_of({"n_layer": 1}, batch_tokens=5120), 80),
        (config_of({"n_embd": 64, "dropout": 0.2}), 8),
        (config_of({"n_embd": 128, "bigram_rows": 4000}), 8),
        (config_of({"n_embd": 128, "blocks": [{"ffn": MOE}, {}]}, optim=FROZEN), 4),
        (config_of({"n_embd": 128}, optim=FROZEN | {"groups": [{"match": "blocks*", "freeze": True}]}), 2),
    ],
    ids=[
        "whole batch",
        "accumulated",
        "experts",
        "head of its own",
        "muon",
        "full",
        "selective",
        "window",
        "five chunks of logits",
        "dropout",
        "pairs",
        "frozen up to the second layer",
        "frozen layers",
    ],
)
def test_fake_tensors_need_the_memory_of_real_ones(config, micro_batch):
    memory = estimate(config, micro_batch)
    tensors = memory.total - memory.save_copy - memory.fragmentation - memory.process
    assert tensors == pytest.approx(peak_of_real_tensors(config, micro_batch), rel=0.03)


MEASURE = """
import sys
from pathlib import Path
from training.train import main
def resident(field):
    return int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0]) * 1024
config = ["--config", sys.argv[1]]
main([*config, "--name", "first", "--model.n_layer", "1", "--steps", "1"])  # loads libraries and their buffers
before = resident("VmRSS")
status = main(config)
print(resident("VmHWM") - before)
sys.exit(status)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of a process")
def test_a_run_with_recomputation_needs_the_resident_memory_of_its_plan(processes, cache, tmp_path):
    config = config_of(
        {"n_layer": 8, "n_embd": 128, "n_positions": 512, "vocab_size": 8192},
        **{"batch_tokens": 4096, "steps": 2, "out_dir": str(tmp_path), "parallel": {"recompute": "full"}},
        schedule={"type": "constant", "warmup_steps": 0},
        data={"sources": [{"type": "stdlib"}], "tokenizer": {"type": "byte"}, "cache_dir": str(cache)},
        eval={"every": None, "tokens": 1024, "prompts": []},
        logging={"tensorboard": False},
    )
    (tmp_path / "c.yaml").write_text(cli.dump_config(config))
    (tmp_path / "measure.py").write_text(MEASURE)
    done = processes.run(str(tmp_path / "measure.py"), str(tmp_path / "c.yaml"))
    assert done.returncode == 0, done.stderr
    memory = estimate(config.resolved(), 8)
    assert int(done.stdout.splitlines()[-1]) == pytest.approx(memory.total - memory.process, abs=2**26)


@pytest.mark.soak
def test_nine_runs_need_the_resident_memory_of_their_plans():
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "plan_memory.py")], timeout=7200)
    assert done.returncode == 0


def test_weights_gradients_and_optimizer_state_are_what_arithmetic_says():
    config = config_of({"blocks": [{"ffn": MOE}]}, optim={"type": "muon"})
    memory, model = estimate(config, 2), GPT(config.model)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    stats = model_stats(config.model)
    matrices = sum(p.numel() for name, p in model.named_parameters() if stats.kinds[name] == "matrix")
    n = stats.n_parameters
    assert memory.weights == 4 * n + buffers and memory.gradients == 4 * n
    assert memory.optimizer == pytest.approx(4 * (2 * n - matrices), abs=1000)  # and step counters
    assert memory.save_copy == memory.weights + memory.optimizer
    assert memory.total == sum(memory[:-1])
    on_gpu = estimate(config, 2, device_type="cuda")
    assert on_gpu.save_copy == on_gpu.fragmentation == on_gpu.process == 0


def test_the_loss_on_a_gpu_overwrites_the_logits_unless_another_kernel_is_chosen():
    def total(device_type, **parallel):
        config = config_of({"vocab_size": 8192}, precision="bf16", parallel=parallel)
        return estimate(config, 8, device_type=device_type).total

    n_logits = 8 * 64 * 8192  # less than one chunk on a GPU
    in_place, chunked = total("cuda"), total("cuda", loss="chunked")
    assert chunked - in_place == pytest.approx(4 * n_logits, rel=0.05)  # a float32 copy
    assert total("cuda", loss="reference") > chunked
    assert total("cpu") == total("cpu", loss="chunked")


def test_frozen_weights_have_no_gradient_and_no_optimizer_state_and_need_no_activations():
    optim = {"type": "adamw", "average": {"decay": 0.9}}
    whole = estimate(config_of(optim=optim), 8)
    config = config_of(optim=optim | {"groups": [{"match": "blocks.[01].*", "freeze": True}]})
    frozen, n = estimate(config, 8), 2 * (12 * 32 * 32 + 13 * 32)
    assert frozen.weights == whole.weights
    assert whole.save_copy - frozen.save_copy == pytest.approx(3 * 4 * n, abs=1000)  # and step counters
    stats = model_stats(config.model)
    kept = report.checkpoint_bytes(stats, config_of(optim=optim)) - report.checkpoint_bytes(stats, config)
    assert kept == 3 * 4 * n
    first = [{"match": "w?e.*", "freeze": True}, {"match": "blocks.[01].*", "freeze": True}]
    from_layer_2 = estimate(config_of(optim=optim | {"groups": first}), 8)
    assert from_layer_2.activations < 0.6 * whole.activations  # those of one layer of three, and temporary ones
    with_pairs = estimate(config_of({"bigram_rows": 100}, optim=optim | {"groups": first}), 8)
    assert with_pairs.activations > 0.7 * whole.activations  # gradients pass frozen layers to the table of pairs


def test_a_mesh_divides_memory_and_the_worst_routing_sends_all_tokens_to_one_rank():
    model, batch = {"blocks": [{"ffn": MOE}], "n_embd": 128}, {"batch_tokens": 4096}
    whole = estimate(config_of(model, **batch), 8)
    n_experts = 3 * 4 * (2 * 64 * 128 + 64 + 128)
    sharded = estimate(config_of(model, **batch, parallel={"mesh": {"shard": 4}}), 8, world_size=4)
    assert sharded.weights == pytest.approx(whole.weights / 4, rel=0.01)
    assert sharded.optimizer == pytest.approx(whole.optimizer / 4, rel=0.01)
    assert sharded.casts > whole.casts and sharded.routing == 0
    split = estimate(config_of(model, **batch, parallel={"mesh": {"expert": 4}}), 8, world_size=4)
    assert split.weights == whole.weights - 4 * n_experts * 3 // 4
    n_rows = 8 * 64 * 2  # that a rank sends; each layer keeps the rows of three other ranks: hidden twice, and output
    assert split.routing > 3 * n_rows * 3 * 4 * (2 * 64 + 128)
    both = estimate(config_of(model, **batch, parallel={"mesh": {"shard": 4, "expert": 2}}), 8, world_size=4)
    assert both.weights == sharded.weights
    matrices = {"model": {"n_embd": 128}, "batch_tokens": 4096, "optim": {"type": "muon"}}
    whole, quarter = (
        MemoryEstimator(config_of(**matrices, parallel={"mesh": {"shard": n}}), n).optimizer for n in (1, 4)
    )
    assert whole / 4 < quarter < whole / 2  # a rank orthogonalizes a quarter of the matrices, and exchanges their rows


def test_memory_is_almost_linear_and_the_largest_micro_batch_is_the_last_that_fits():
    estimator = MemoryEstimator(config_of(batch_tokens=4096))
    one, two, nine = (estimator.estimate(n).total for n in (1, 2, 9))
    assert nine - one == pytest.approx(8 * (two - one), rel=0.1)
    limit = nine + 1
    assert estimator.largest_micro_batch(limit) == 9
    assert estimator.largest_micro_batch(one - 1) == 0
    assert estimator.largest_micro_batch(2 * limit) == 64
    assert MemoryEstimator(config_of(batch_tokens=4096), 16).largest_micro_batch(2 * limit) == 4


DEVICES = ["cpu", *GPUS]
WORLDS = ["1", "64"]
SOME = [(name, *which) for name, which in zip(SHIPPED, cycle([("cpu", "1"), ("h100", "64")]), strict=False)]
SOME += [("configs/gpt2_124m", "cpu", "1")]
ALL = list(product(SHIPPED, DEVICES, WORLDS))


@pytest.mark.parametrize(
    ("name", "device", "world"),
    [*SOME, *(pytest.param(*which, marks=pytest.mark.soak) for which in ALL if which not in SOME)],
)
def test_every_shipped_config_is_planned_within_5_seconds(name, device, world, tmp_path, capsys, monkeypatch):
    path = SHIPPED[name]
    monkeypatch.chdir(tmp_path)
    flags = ["--init_from", "null"] if "finetune" in name else []  # GPT-2's sizes are the defaults
    config, before = cli.load_config(path), time.process_time()
    status = main(["--config", str(path), "--device", device, "--world", world, *flags])
    assert time.process_time() - before < 5
    page, errors = capsys.readouterr()
    if (n_samples := config.batch_tokens // config.model.n_positions) < int(world):
        assert status == 2 and errors.startswith(f"error: --world: {world} ranks are more than the {n_samples} samples")
        return
    assert status == 0
    figures = [float(n) for n in re.findall(r"^  \w.*? +([\d.]+)(?: of [\d.]+)?$", page, flags=re.MULTILINE)]
    assert sum(figures[:-1]) == pytest.approx(figures[-1], abs=0.05)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "recompute", "optim", "precision"),
    [
        (
            {"blocks": [{"ffn": MOE, "repeat": 2}, {"mixer": {"window": 16}}], "n_layer": 5, "position": "rope"},
            "none",
            {},
            "fp32",
        ),
        (
            {"blocks": [{"mixer": {"type": "latent"}}], "isolate_documents": True, "position": "rope"},
            "selective",
            {},
            "fp32",
        ),
        # In bf16 on a CPU, some operations copy only tensors of several samples.
        ({"n_layer": 24, "position": "rope", "blocks": [{"mixer": {"qk_norm": True}}]}, "none", {}, "bf16"),
        ({"n_layer": 6}, "none", FROZEN, "fp32"),
        (
            {"n_layer": 6},
            "none",
            {"groups": [{"match": "w?e.*", "freeze": True}, {"match": "blocks.[014].*", "freeze": True}]},
            "fp32",
        ),
    ],
    ids=[
        "experts and windows",
        "packed documents",
        "QK-norm",
        "frozen layers",
        "frozen layers before and after others",
    ],
)
def test_a_walk_of_each_kind_of_layer_stands_for_a_walk_of_all_layers(model, recompute, optim, precision):
    config = config_of(model, parallel={"recompute": recompute}, optim=optim, precision=precision).resolved()
    estimator = MemoryEstimator(config)
    assert len(estimator.blocks) < config.model.n_layer
    for micro_batch in (1, 2, 5):
        peak = Peak(estimator.resident + Counter(gradients=estimator.gradients))
        layers = list(config.model.layers())
        for part in walk(config, layers, micro_batch, estimator.mesh, "cpu", 1, estimator.frozen).values():
            peak.add(change for change in part if change[0] not in ("weights", "gradients"))
        memory = estimator.estimate(micro_batch)
        assert memory.total - memory.save_copy - memory.fragmentation - memory.process == pytest.approx(
            peak.max_bytes, rel=1e-3
        )


def output_of(tmp_path, config, capsys, *flags) -> str:
    (tmp_path / "c.yaml").write_text(cli.dump_config(config))
    assert main(["--config", "c.yaml", *flags]) == 0
    return capsys.readouterr().out


def test_the_command_prints_a_page_that_can_be_checked_by_hand(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mixed = {"n_embd": 256, "n_positions": 256, "blocks": [{"ffn": MOE}], "vocab_size": None}
    config = config_of(mixed, batch_tokens=65536, steps=1000, micro_batch=7, precision="bf16")
    page = output_of(tmp_path, config, capsys, "--world", "8", "--device", "h200", "--mfu", "0.5")
    assert len(page.splitlines()) < 40
    stats = model_stats(config.model.model_copy(update={"vocab_size": 8192}))
    speed = 0.5 * 989e12 * 8 / stats.flops_per_token
    assert f"{stats.n_parameters:,}, {stats.n_active_parameters:,} active per token" in page
    assert "on 8 x H200, bf16" in page and "256 samples x 256, 32 per rank, micro-batch 7" in page
    assert f"{report.duration_text(65536000 / speed)}, at {speed:,.0f} tokens/s" in page
    assert "not prepared here" in page and "all samples fit at once" in page
    assert "are no multiple of micro_batch 7" in page
    figures = [float(n) for n in re.findall(r"^  \w.*? +([\d.]+)(?: of 139.8)?$", page, flags=re.MULTILINE)]
    assert sum(figures[:-1]) == pytest.approx(figures[-1], abs=0.05)
    assert list(tmp_path.iterdir()) == [tmp_path / "c.yaml"]  # nothing prepared, nothing written


def test_prepared_data_give_the_epochs_and_a_run_gives_its_speed(run, config, capsys):
    changes = {"optim": {"type": "muon"}, "logging": {"every": 1, "tensorboard": False}}
    small = config(steps=200, **changes)
    n_tokens = prepare(small.data, quiet=True).train.n_tokens
    here = report.find_device("cpu", small)
    plan = report.build_plan(small, here, 1)
    assert report.epochs(plan) == pytest.approx(200 * 256 / n_tokens)
    page = "\n".join(report.report_lines(plan, None, None))
    assert f"{n_tokens:,} training tokens" in page and "unknown: no peak is known" in page
    assert measured_tokens_per_s(plan.config, here.name, 1) is None, "not started yet"
    folder = run(steps=4, **changes)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    median = sorted(row["tokens_per_s"] for row in rows[1:])[1]
    assert measured_tokens_per_s(plan.config, here.name, 1) == median
    with (folder / "metrics.jsonl").open("ab") as file:  # what a crash may leave behind
        file.write(b'\0\0\0\n{"step": 5}\n[]\n{"step": 6, "tokens_per')
    assert measured_tokens_per_s(plan.config, here.name, 1) == median
    (folder.parent / "c.yaml").write_text(cli.dump_config(small))
    assert main(["--config", str(folder.parent / "c.yaml")]) == 0
    assert f"at {median:,.0f} tokens/s as this run was measured here" in capsys.readouterr().out
    assert measured_tokens_per_s(plan.config.model_copy(update={"batch_tokens": 512}), here.name, 1) is None
    assert measured_tokens_per_s(plan.config, "H200", 1) is None
    assert measured_tokens_per_s(plan.config, here.name, 2) is None
    files = [folder / "checkpoints" / "step-00000004" / f"{kind}.safetensors" for kind in ("model", "optimizer")]
    sizes = [path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little") for path in files]  # no header
    n_bytes = report.checkpoint_bytes(plan.stats, plan.config)
    assert n_bytes == pytest.approx(sum(sizes), abs=300)  # buffers and step counters
    record = json.loads((folder / "run.json").read_text())
    del record["facts"]
    (folder / "run.json").write_text(json.dumps(record))
    assert measured_tokens_per_s(plan.config, here.name, 1) is None, "written by an older version"


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
        ({"batch_tokens": 64 * 9}, "a100", "9 samples do not divide among 2 ranks"),
        ({"steps": 200}, "a100", "tokens per parameter; about 20 are best: a smaller model"),
        ({"steps": 10**7}, "a100", "a larger model learns more"),
    ],
    ids=str,
)
def test_likely_mistakes_cause_a_warning(changes, device, expected):
    changed = dict(changes)
    config = config_of(changed.pop("model", None), **changed)
    warnings = list(report.warnings(report.build_plan(config, report.find_device(device, config), 2)))
    assert any(expected in line for line in warnings), warnings


def test_epochs_are_those_of_the_source_that_is_read_most(config):
    small = config(steps=100_000)
    paths = [path for source in small.data.sources for path in source.paths]
    weighted = [{"paths": [path], "weight": weight} for path, weight in zip(paths, (3.0, 0.5, 0.5), strict=True)]
    data = small.data.model_dump() | {"sources": weighted}
    small = Config.model_validate(small.model_dump() | {"data": data})
    n_tokens = [len(stream.tokens) for stream in prepare(small.data, quiet=True).train.streams]
    plan = report.build_plan(small, report.find_device("cpu", small), 1)
    shares = (3 / 4, 1 / 8, 1 / 8)
    most = max(100_000 * 256 * share / n for share, n in zip(shares, n_tokens, strict=True))
    assert report.epochs(plan) == pytest.approx(most)
    assert any("beyond 4 the model learns little" in line for line in report.warnings(plan))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--device", "abacus"], "--device: 'abacus' is none of cpu, V100"),
        (["--world", "0"], "--world: '0' is not a number of ranks"),
        (["--world", "9"], "--world: 9 ranks are more than the 8 samples of batch_tokens 512"),
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
def test_wrong_input_is_one_line_and_status_2(flags, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(cli.dump_config(config_of()))
    assert main(["--config", "c.yaml", *flags]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"error: {expected}") and printed.err.count("\n") == 1


def test_a_run_starts_only_if_there_is_room_for_its_model_and_its_batch():
    config = config_of(parallel={"mesh": {"shard": 2}})
    needed = 16 * model_stats(config.model).n_parameters // 2  # weights, gradients and two moments, in float32
    report.check_memory(config, 2, needed)
    with pytest.raises(UserError, match=r"parameters of model, their gradients and optimizer take .* a smaller model"):
        report.check_memory(config, 2, needed - 1)
    large = config_of(batch_tokens=2**30)
    report.check_memory(large, 2, 8 * 2**30)
    with pytest.raises(UserError, match=r"batch_tokens 1,073,741,824 take 16.0 GiB per rank, and 8.0 GiB are here"):
        report.check_memory(large, 1, 8 * 2**30)


@pytest.mark.parametrize(
    ("command", "model"),
    [
        ("train", {"n_embd": 4_000_000}),
        ("train", {"vocab_size": 10**13}),
        ("train", {"n_head": 10**12, "blocks": [{"mixer": {"head_dim": 64}}]}),
        ("train", {"blocks": [{"ffn": MOE | {"n_experts": 10**12}}]}),
        ("train", {"blocks": [{"mixer": {"type": "latent", "kv_rank": 10**15}}]}),
        *product(("train", "plan"), [{"n_embd": 2**62}, {"blocks": [{"ffn": MOE | {"n_shared": 10**18}}]}]),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_a_model_larger_than_any_memory_is_one_line_before_memory_is_taken(call, tmp_path, command, model):
    path = tmp_path / "large.yaml"
    path.write_text(cli.dump_config(config_of(model, out_dir=str(tmp_path / "runs"))))
    done = call(command, "--config", str(path))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert re.match("error: (model: one of its tensors has more than 2.63 bytes|the .* parameters of mod)", done.stderr)

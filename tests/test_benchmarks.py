"""The benchmarks run, at sizes too small for meaningful figures."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

HERE = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def output_of(processes):
    """Run a benchmark as a fork, which saves the imports; return its output."""

    def run(name: str, *arguments: object) -> str:
        done = processes.start(str(HERE / name), *map(str, arguments)).wait(timeout_s=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_experts_compares_with_the_dense_layer_and_transformers(output_of):
    output = output_of("experts.py", "--width", 64, "--tokens", 256, "--rounds", 1, "--threads", 1, "--dtype", "fp32")
    assert "auto: grouped (matches the reference)" in output
    for name in ("dense", "auto", "loop", "transformers, eager", "transformers, grouped"):
        assert f"    {name} " in output
    assert "of our time in Transformers' eager experts: " in output and "(bar: at least 1.4, " in output


@pytest.mark.soak
def test_moe_vs_dense_trains_a_moe_and_its_twin_in_turns(output_of, tmp_path):
    pytest.importorskip("matplotlib")
    yaml = YAML(typ="safe")
    config = yaml.load((HERE / "moe_vs_dense.yaml").read_text())
    (tmp_path / "text.txt").write_text("".join(f"{n} and {n} are {n + n}.\n" for n in range(3000)))
    config |= {"steps": 6, "batch_tokens": 512, "eval": {"every": 3, "tokens": 256}}
    config["data"] = {"sources": [{"paths": [str(tmp_path / "text.txt")]}], "tokenizer": {"type": "byte"}}
    with (tmp_path / "moe.yaml").open("w") as file:
        yaml.dump(config, file)
    arguments = ("--config", tmp_path / "moe.yaml", "--cache_dir", tmp_path / "cache", "--plot", tmp_path / "it.png")
    output = output_of("moe_vs_dense.py", *arguments, "--seeds", 2)
    steps = [line.split("  loss")[0].split() for line in output.splitlines() if " step " in line]
    twin = [["moe_vs_dense-dense", "step", f"{n}/13"] for n in (3, 6, 9, 12, 13)]  # twice the FLOPs, with the router's
    moe = [["moe_vs_dense", "step", f"{n}/6"] for n in (3, 6)]
    assert sorted(steps) == sorted(2 * (twin + moe))
    assert "\nseed 0\n" in output and "\nseed 1\n" in output and "2 seeds, 95 % interval" in output
    assert "its share of the FLOPs: 0.4" in output and "its share of the time" in output
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.soak
def test_bound_compares_a_step_with_its_matrix_products(output_of, tmp_path):
    config = small(HERE.parent / "configs" / "quickstart.yaml", tmp_path, 8)
    output = output_of("bound.py", "--config", config, "--rounds", 1, "--cache_dir", tmp_path / "cache")
    for name in ("dense", "experts"):
        (line,) = (line for line in output.splitlines() if line.startswith(f"{name}: a step takes "))
        step, alone = (float(n) for n in re.findall(r"([\d.]+) ms", line))
        assert 0 < alone < step
    assert output.count("  their ratio: ") == 2 and "mm " not in output  # every product counts as one


@pytest.mark.soak
def test_ladder_finds_the_best_rate_of_each_width(output_of, tmp_path):
    pytest.importorskip("matplotlib")
    arguments = ("--widths", 32, 64, "--steps", 2, "--cache_dir", tmp_path / "cache", "--plot", tmp_path / "it.png")
    output = output_of("ladder.py", *arguments)
    lines = [line for line in output.splitlines() if line.startswith("width ")]
    rates = ("muon_learning_rate", "embedding_learning_rate")
    assert [tuple(line.split()[1:3]) for line in lines] == [(width, rate) for width in ("32", "64") for rate in rates]
    for line in lines:
        losses = {rate: float(loss) for rate, loss in re.findall(r"([\d.]+): ([\d.]+)", line)}
        assert len(losses) == 4 and losses[line.rpartition("lowest at ")[2]] == min(losses.values())
    assert output.count("; as width to the power of ") == 2
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.soak
def test_log_measures_a_start_and_a_report(output_of):
    lines = output_of("log.py", "--rows", 100, "--layers", 2).splitlines()
    assert lines[1].startswith("      100 rows, 0 MiB: ")
    assert [line[:34].split("   ")[1].strip() or line for line in lines[2:]] == [
        "start", "report", "start without curves.jsonl", "report without curves.jsonl"
    ]  # fmt: skip


TINY = ("--n_layer", 2, "--n_embd", 32, "--n_head", 2, "--n_positions", 32, "--samples", 4, "--vocab_size", 512)


@pytest.mark.soak
def test_step_compares_with_transformers_and_a_moe_with_its_twin(output_of):
    arguments = (*TINY, "--precision", "fp32", "--rounds", 1, "--device", "cpu", "--uncompiled")
    output = output_of("step.py", *arguments, "--only", "moe", "--no_memory")
    for name in ("this", "transformers", "its dense twin"):
        assert f"    {name} " in output
    assert "transformers / this: " in output and "this / its dense twin: " in output
    assert 0 < float(output_of("step.py", *arguments, "--peak", "dense", "this").splitlines()[-1]) < 4


@pytest.mark.soak
def test_cuda_sh_runs_on_a_cpu_at_toy_size(tmp_path):
    variables = {"TOY": "1", "OUT": str(tmp_path), "PYTEST_ADDOPTS": "tests/test_gpu.py tests/test_phase_timer.py"}
    command = ["bash", str(HERE / "cuda.sh"), sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=os.environ | variables)
    assert done.returncode == 0, done.stdout
    tests, output, experts = ((tmp_path / f"cuda-{name}.txt").read_text() for name in ("tests", "steps", "experts"))
    assert "skipped" in tests and "failed" not in tests
    (missing,) = (line for line in output.splitlines() if "not here" in line)
    assert "this, compiled, loss triton" in missing  # needs CUDA
    assert "ceilings: a product of 256^3" in output
    assert re.search(r"8 experts, \w+ / twin: ", output) and re.search(r"64 experts, \w+ / twin: ", output)
    assert "samples fit at a time" in output and "in kernels" in output
    for name in ("triton", "chunked", "reference"):
        assert f"\n    this, compiled, loss {name} " in output
    assert "waits of the host: " in output and "the largest gaps: " in output
    assert "of the dense layer's" in experts
    recipes = (tmp_path / "cuda-recipes.txt").read_text()
    assert all(name in recipes for name in ("gpt2_124m", "gpt2_124m_modern", "gpt2_moe"))
    assert "<svg" in (tmp_path / "cuda-recipes.html").read_text()


def test_cuda_sh_exits_with_status_1_if_a_part_fails(tmp_path):
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\ncase $1 in *gpu.py) exit 3;; esac\n")
    failing.chmod(0o755)
    done = subprocess.run(["bash", str(HERE / "cuda.sh"), str(failing)], env=os.environ | {"OUT": str(tmp_path)})
    assert done.returncode == 1 and (tmp_path / "cuda-experts.txt").exists()  # the other parts still run


def small(recipe: Path, folder: Path, steps: int) -> Path:
    """Write the recipe with few steps and little text; return its path."""
    yaml = YAML(typ="safe")
    config = yaml.load(recipe.read_text())
    (folder / "text.txt").write_text("".join(f"{n} and {n} are {n + n}.\n" for n in range(30000)))
    config |= {"steps": steps, "batch_tokens": 1024}
    config["eval"]["every"] = 4
    if "warmup" not in config["schedule"]:  # a share of the run
        config["schedule"]["warmup_steps"] = 2
    if "decay_steps" in config["schedule"]:
        config["schedule"]["decay_steps"] = steps // 2
    config["data"]["sources"] = [{"paths": [str(folder / "text.txt")]}]
    config["data"]["tokenizer"]["vocab_size"] = 300
    with (folder / recipe.name).open("w") as file:
        yaml.dump(config, file)
    return folder / recipe.name


@pytest.mark.soak
def test_around_prints_its_figures_beside_their_limits(output_of, tmp_path):
    config = small(HERE.parent / "configs" / "quickstart.yaml", tmp_path, 8)
    output = output_of("around.py", "--config", config, "--steps", 12, "--every", 5, "--rounds", 1)
    first = ("first step of the cached quickstart", "12 equal blocks, compiled, first step", "again, from the cache")
    for name in ("--help: ", *(f"{title}: " for title in first), "data  ", "idle  ", "checkpoint "):
        assert f"\n{name}" in output
    assert output.count("bar") == 7


@pytest.mark.soak
def test_scaling_compares_two_processes_with_one(output_of):
    arguments = ("--only", "quickstart's sizes", "--kinds", "experts")
    output = output_of("scaling.py", "--rounds", 1, "--samples", 4, "--steps", 4, *arguments)
    assert output.count("one of two threads ") == output.count("two of one thread ") == 1
    assert "tokens/s of two processes over one's: " in output


@pytest.mark.soak
def test_speedrun_compares_with_the_plain_recipe(output_of, tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("plain", "speedrun"):
        small(HERE.parent / "recipes" / f"{name}.yaml", tmp_path, 12)
    arguments = ("--recipes", tmp_path, "--cache_dir", tmp_path / "cache", "--seeds", 1)
    output = output_of("speedrun.py", *arguments, "--plot", tmp_path / "it.png")
    assert "\n  plain        loss " in output and "\n  speedrun     loss " in output
    assert "final loss of speedrun less that of plain: " in output and "its share of the time: " in output
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_tokens_measures_speed_and_draws_memory(output_of, tmp_path):
    pytest.importorskip("matplotlib")
    output = output_of("tokens.py", "--rounds", 1, "--timed", 0.5, "--megabytes", 1, 2, "--plot", tmp_path / "it.png")
    assert "tokenizers / this: " in output and "2 MB of text: " in output
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.soak
def test_growth_prints_measured_and_expected_figures(output_of, tmp_path):
    pytest.importorskip("matplotlib")
    sizes = ("--width", 32, "--tokens", 256, "--contexts", 64, 128, "--experts", 1, 4, "--at_a_time", 128)
    output = output_of("growth.py", "--steps", 1, *sizes, "--plot", tmp_path / "it.png")
    assert output.count("measured, expected, their ratio") == 4
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")

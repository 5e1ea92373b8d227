"""The benchmarks run, at sizes at which their figures say nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

HERE = Path(__file__).parent.parent / "benchmarks"


def output_of(name, *arguments) -> str:
    command = [sys.executable, str(HERE / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_experts_are_compared_with_the_dense_layer_and_with_transformers():
    said = output_of("experts.py", "--width", 64, "--tokens", 256, "--rounds", 1, "--threads", 1, "--dtype", "fp32")
    assert "auto: grouped (ran, and equals the reference)" in said
    for name in ("dense", "auto", "loop", "transformers, eager", "transformers, grouped"):
        assert f"    {name} " in said
    assert "of our time in Transformers' eager experts: " in said and "(bar: at least 1.4, " in said


def test_a_moe_and_its_twin_are_trained_side_by_side(tmp_path):
    pytest.importorskip("matplotlib")
    yaml = YAML(typ="safe")
    config = yaml.load((HERE / "moe_vs_dense.yaml").read_text())
    (tmp_path / "text.txt").write_text("".join(f"{n} and {n} are {n + n}.\n" for n in range(3000)))
    config |= {"steps": 6, "batch_tokens": 512, "eval": {"every": 3, "tokens": 256}}
    config["schedule"] |= {"warmup_steps": 3, "decay_steps": 3}
    config["data"] = {"sources": [{"paths": [str(tmp_path / "text.txt")]}], "tokenizer": {"type": "byte"}}
    with (tmp_path / "moe.yaml").open("w") as file:
        yaml.dump(config, file)
    arguments = ("--config", tmp_path / "moe.yaml", "--cache_dir", tmp_path / "cache", "--plot", tmp_path / "it.png")
    said = output_of("moe_vs_dense.py", *arguments)
    assert [line.split("  loss")[0].split() for line in said.splitlines() if line.startswith("  ")] == [
        ["dense", "step", "3/6"],
        ["moe", "step", "3/6"],
        ["moe,", "short", "step", "3/4"],
        ["moe,", "short", "step", "4/4"],
        ["dense", "step", "6/6"],
        ["moe", "step", "6/6"],
    ]
    assert "with 1.5 times fewer tokens" in said and "a step takes" in said and "on the clock" in said
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")


TINY = ("--n_layer", 2, "--n_embd", 32, "--n_head", 2, "--n_positions", 32, "--samples", 4, "--vocab_size", 512)


def test_a_step_is_compared_with_transformers_and_a_moe_with_its_twin():
    arguments = (*TINY, "--precision", "fp32", "--rounds", 1, "--device", "cpu", "--uncompiled")
    said = output_of("step.py", *arguments, "--only", "moe", "--no_memory")
    for name in ("this", "transformers", "its dense twin"):
        assert f"    {name} " in said
    assert "transformers / this: " in said and "this / its dense twin: " in said
    assert 0 < float(output_of("step.py", *arguments, "--peak", "dense", "this").splitlines()[-1]) < 4


def test_what_is_asked_of_an_accelerator_runs_on_a_cpu_at_a_toys_size(tmp_path):
    variables = {"TOY": "1", "OUT": str(tmp_path), "PYTEST_ADDOPTS": "tests/test_gpu.py tests/test_phase_timer.py"}
    command = ["bash", str(HERE / "cuda.sh"), sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | variables)
    assert done.returncode == 0, done.stdout
    tests, said, experts = ((tmp_path / f"cuda-{name}.txt").read_text() for name in ("tests", "steps", "experts"))
    assert "skipped" in tests and "failed" not in tests
    (missing,) = (line for line in said.splitlines() if "not here" in line)
    assert "this, compiled, loss triton" in missing  # which is for CUDA
    assert "ceilings: a product of 256^3" in said and "MoE / twin: " in said
    assert "samples fit at a time" in said and "in kernels" in said
    for name in ("triton", "chunked", "reference"):
        assert f"\n    this, compiled, loss {name} " in said
    assert "waits of the host: " in said and "the largest gaps: " in said
    assert "of the dense layer's" in experts


def test_what_fails_there_is_told_by_the_status(tmp_path):
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\ncase $1 in *gpu.py) exit 3;; esac\n")
    failing.chmod(0o755)
    done = subprocess.run(["bash", str(HERE / "cuda.sh"), str(failing)], env=os.environ | {"OUT": str(tmp_path)})
    assert done.returncode == 1 and (tmp_path / "cuda-experts.txt").exists()  # the rest is done all the same


def small(recipe: Path, folder: Path, steps: int) -> Path:
    """A file like the recipe, of a few steps on little text."""
    yaml = YAML(typ="safe")
    config = yaml.load(recipe.read_text())
    (folder / "text.txt").write_text("".join(f"{n} and {n} are {n + n}.\n" for n in range(30000)))
    config |= {"steps": steps, "batch_tokens": 1024}
    config["eval"]["every"] = 4
    config["schedule"]["warmup_steps"] = 2
    if "decay_steps" in config["schedule"]:
        config["schedule"]["decay_steps"] = steps // 2
    config["data"]["sources"] = [{"paths": [str(folder / "text.txt")]}]
    config["data"]["tokenizer"]["vocab_size"] = 300
    with (folder / recipe.name).open("w") as file:
        yaml.dump(config, file)
    return folder / recipe.name


@pytest.mark.soak
def test_what_is_round_a_step_is_told_beside_its_bars(tmp_path):
    config = small(HERE.parent / "configs" / "quickstart.yaml", tmp_path, 8)
    said = output_of("around.py", "--config", config, "--steps", 12, "--every", 5, "--rounds", 1)
    first = ("first step of the cached quickstart", "12 equal blocks, compiled, first step", "again, from the cache")
    for name in ("--help: ", *(f"{title}: " for title in first), "data  ", "idle  ", "checkpoint "):
        assert f"\n{name}" in said
    assert said.count("bar") == 7


@pytest.mark.soak
def test_two_processes_are_compared_with_one():
    arguments = ("--only", "quickstart's sizes", "--kinds", "experts")
    said = output_of("scaling.py", "--rounds", 1, "--samples", 4, "--steps", 4, *arguments)
    assert said.count("one of two threads ") == said.count("two of one thread ") == 1
    assert "tokens/s of two processes over one's: " in said


@pytest.mark.soak
def test_the_speedrun_is_timed_beside_the_plain_recipe(tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("plain", "speedrun"):
        small(HERE.parent / "recipes" / f"{name}.yaml", tmp_path, 12)
    said = output_of("speedrun.py", "--recipes", tmp_path, "--plot", tmp_path / "it.png")
    assert "\nplain        12 steps, " in said and "\nspeedrun     12 steps, " in said
    assert "plain's final loss is reached at step " in said
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_tokenizer_is_timed_and_its_memory_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    said = output_of("tokens.py", "--rounds", 1, "--timed", 0.5, "--megabytes", 1, 2, "--plot", tmp_path / "it.png")
    assert "tokenizers / this: " in said and "2 MB of text: " in said
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")


def test_growth_is_told_beside_what_arithmetic_says(tmp_path):
    pytest.importorskip("matplotlib")
    sizes = ("--width", 32, "--tokens", 256, "--contexts", 64, 128, "--experts", 1, 4, "--at_a_time", 128)
    said = output_of("growth.py", "--steps", 1, *sizes, "--plot", tmp_path / "it.png")
    assert said.count("measured, expected, their ratio") == 4
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")

"""The benchmarks run, at sizes at which their figures say nothing."""

from __future__ import annotations

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
    said = output_of("experts.py", "--width", 64, "--tokens", 256, "--rounds", 1, "--threads", 1)
    assert "auto: grouped (ran, and equals the reference)" in said
    for name in ("dense", "auto", "loop", "transformers, eager", "transformers, grouped"):
        assert f"    {name} " in said
    assert "of our time in Transformers' eager experts: bar 1.4" in said


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

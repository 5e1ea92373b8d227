"""One trajectory: micro-batch, ranks and layout change nothing that is computed, beyond the order of sums."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
import torch
from conftest import ROOT, command, write_config
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from trajectory import train

from training.checkpoint import corruption
from training.config import Config, MeshConfig, ModelConfig
from training.data import prepare
from training.distributed.mesh import MeshShape, mesh_shape
from training.distributed.recompute import SAVED_OPERATORS
from training.distributed.world import World
from training.engine.build import begin
from training.engine.step import train_step
from training.errors import UserError

STEPS = 30
MOE = {
    "n_embd": 32,
    "n_positions": 32,
    "isolate_documents": True,
    "blocks": [
        {"ffn": {"type": "moe", "n_experts": 4, "hidden": 32, "jitter": 0.1, "balance": "both", "bias_rate": 0.01}},
        {"ffn": {"type": "moe", "n_experts": 4, "hidden": 16, "scoring": "sigmoid", "n_shared": 1, "gated": True}},
    ],
}
# Samples that ranks do not share evenly; three rows more than a multiple of four, which FSDP2 cuts unevenly.
MODELS = {
    "moe": {"batch_tokens": 10 * 32, "optim": {"type": "muon"}, "model": MOE | {"n_layer": 2, "n_head": 2}},
    "dense": {
        "batch_tokens": 9 * 16,
        "model": {"n_layer": 6, "n_head": 2, "n_embd": 22, "n_positions": 16, "vocab_size": 259, "tie_head": False},
    },
}
RANKS = {
    "2": [("moe", 1, {}), ("moe", 8, {"shard": 2}), ("moe", 2, {"expert": 2}), ("moe", 4, {"shard": 2, "expert": 2}),
          ("dense", 2, {}), ("dense", 4, {"shard": 2})],
    "4": [("moe", 1, {"shard": 2, "replicate": 2}), ("moe", 2, {"expert": 4}), ("moe", 1, {"shard": 4, "expert": 2}),
          ("moe", 2, {"shard": 2, "expert": 2}), ("moe", 8, {"expert": 2}), ("dense", 1, {"shard": 4})],
    "4, others": [("moe", 4, {}), ("moe", 2, {"shard": 4}), ("moe", 2, {"shard": 4, "expert": 4}), ("dense", 8, {})],
}  # fmt: skip


def changed(kind: str, name: str, micro_batch: int, mesh: dict, **more) -> dict:
    """What the small run's options are changed to."""
    parallel = {"device": "cpu", "mesh": mesh} | more.pop("parallel", {})
    common = {
        "name": name,
        "steps": STEPS,
        "micro_batch": micro_batch,
        "parallel": parallel,
        "logging": {"tensorboard": False},
        "eval": {"tokens": 7 * 32},  # windows that ranks do not share evenly
    }
    return MODELS[kind] | common | more


@pytest.fixture(scope="module")
def alone() -> dict:
    """What one process computes, by the model; filled by the first test that asks."""
    return {}


def of_one(alone: dict, kind: str, config) -> tuple[dict, dict[str, torch.Tensor]]:
    if kind not in alone:
        made = config(**changed(kind, f"{kind}-alone", 4, {}))
        alone[kind] = train(made, World(0, 1, torch.device("cpu")))
    return alone[kind]


def same(outcome: dict, weights: dict, alone: tuple[dict, dict], label: str, begins: int = 0) -> None:
    """As close as the order of sums allows, after STEPS steps; `outcome` is of a run that went on after `begins`."""
    theirs, their_weights = alone
    assert outcome["tokens"] == theirs["tokens"][begins:], label
    for step, (one, other) in enumerate(zip(outcome["steps"], theirs["steps"][begins:], strict=True), start=begins):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5), (label, step)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5), (label, step)
        assert one.get("expert_load") == other.get("expert_load"), (label, step)
    assert outcome["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-5), label
    assert weights.keys() == their_weights.keys()
    for name, tensor in weights.items():
        assert (tensor - their_weights[name]).abs().max() < 1e-6 * STEPS, (label, name)


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
@pytest.mark.parametrize("kind", MODELS)
def test_the_micro_batch_is_no_part_of_the_trajectory(kind, micro_batch, config, alone):
    made = config(**changed(kind, "cut", micro_batch, {}))
    same(*train(made, World(0, 1, torch.device("cpu"))), of_one(alone, kind, config), f"micro-batch {micro_batch}")


@pytest.mark.parametrize("runs", ["2", "4", pytest.param("4, others", marks=pytest.mark.soak)])
def test_ranks_and_layouts_are_no_part_of_the_trajectory(runs, options, config, alone, tmp_path):
    paths, n_ranks = [], int(runs[0])
    for i, (kind, micro_batch, mesh) in enumerate(RANKS[runs]):
        paths.append(write_config(tmp_path / f"{i}.yaml", options(**changed(kind, f"{i}", micro_batch, mesh))))
    together(n_ranks, tmp_path, paths)
    for i, (kind, _, mesh) in enumerate(RANKS[runs]):
        outcome = json.loads((tmp_path / f"{i}.json").read_text())
        weights = load_file(tmp_path / f"{i}.safetensors")
        same(outcome, weights, of_one(alone, kind, config), f"{kind} on {n_ranks} {mesh}")


def test_a_rank_whose_experts_get_no_token_takes_part_with_zero_gradients(options, config, tmp_path, monkeypatch):
    monkeypatch.setenv("ALL_TO", "0,1")
    changes = {
        "steps": 4,
        "model": MOE | {"n_layer": 2, "n_head": 2, "blocks": [{"ffn": {**MOE["blocks"][0]["ffn"], "balance": "none"}}]},
    }
    alone = train(config(**changed("moe", "starved-alone", 4, {}, **changes)), World(0, 1, torch.device("cpu")))
    assert {tuple(load) for step in alone[0]["steps"] for load in step["expert_load"]} == {(0.5, 0.5, 0, 0)}
    meshes = [{"expert": 2}, {"shard": 2, "expert": 2}]
    paths = [
        write_config(tmp_path / f"{i}.yaml", options(**changed("moe", f"starved-{i}", 2, mesh, **changes)))
        for i, mesh in enumerate(meshes)
    ]
    together(2, tmp_path, paths)
    for i, mesh in enumerate(meshes):
        same(
            json.loads((tmp_path / f"{i}.json").read_text()), load_file(tmp_path / f"{i}.safetensors"), alone, f"{mesh}"
        )


@pytest.mark.parametrize(
    ("kind", "legs"),
    [
        ("moe", [(1, 8, 4, {}), (2, 16, 1, {"shard": 2, "expert": 2}), (4, 24, 2, {"shard": 4}), (1, 30, 4, {})]),
        pytest.param("dense", [(4, 10, 8, {"shard": 4}), (2, 20, 2, {}), (1, 30, 4, {})], marks=pytest.mark.soak),
    ],
)
def test_a_run_that_moves_between_layouts_is_the_run_that_never_did(kind, legs, options, config, alone, tmp_path):
    outcome = {"steps": [], "tokens": []}
    for n_ranks, stop, micro_batch, mesh in legs:
        files = {"one_file_gib": 0 if n_ranks == 2 else 8}
        path = write_config(
            tmp_path / "leg.yaml", options(**changed(kind, "moved", micro_batch, mesh, checkpoint=files))
        )
        together(n_ranks, tmp_path, [path], STOP_AT=str(stop))
        leg = json.loads((tmp_path / "leg.json").read_text())
        outcome = leg | {name: outcome[name] + leg[name] for name in ("steps", "tokens")}
        saved = tmp_path / "runs" / "moved" / "checkpoints" / f"step-{stop:08d}"
        assert corruption(saved) is None
        assert (saved / "model-00002-of-00002.safetensors").exists() == (n_ranks == 2 and "shard" in mesh)
    same(outcome, load_file(tmp_path / "leg.safetensors"), of_one(alone, kind, config), f"{kind} {legs}")


def test_a_rank_without_memory_in_a_forward_of_all_ends_the_run_which_goes_on_with_less(options, config, tmp_path):
    path = write_config(tmp_path / "ended.yaml", options(**changed("moe", "ended", 4, {"shard": 2}, steps=6)))
    together(2, tmp_path, [path], STOP_AT="2")
    said = together(2, tmp_path, [path], status=1, OUT_OF_MEMORY="1:1")
    (line,) = [line for line in said.splitlines() if "out of memory" in line]
    assert re.fullmatch(
        r"error: rank 1 \(host \S+, pid \d+\): step 3: out of memory; "
        "the same command goes on from the newest checkpoint, 2 samples at a time",
        line,
    )
    together(2, tmp_path, [path])
    outcome = json.loads((tmp_path / "ended.json").read_text())
    assert outcome["micro_batch"] == 2
    alone = train(config(**changed("moe", "alone", 4, {}, steps=6)), World(0, 1, torch.device("cpu")))
    same(outcome, load_file(tmp_path / "ended.safetensors"), alone, "ended and gone on", begins=2)


def test_ranks_of_unlike_processors_agree_on_what_is_remembered(options, tmp_path):
    """A run that began on two alike goes on on two that are not: what fits is tried again, by both."""
    path = write_config(tmp_path / "unlike.yaml", options(**changed("dense", "unlike", "auto", {}, steps=4)))
    together(2, tmp_path, [path], STOP_AT="2")
    together(2, tmp_path, [path], THREADS="1,2")
    places = json.loads((tmp_path / "runs/unlike/checkpoints/step-00000004/state.json").read_text())["micro_batch"]
    assert sorted("1 thread " in place and "2 threads" in place for place in places) == [False, True]


def together(n_ranks: int, folder, paths, *, status: int = 0, **variables: str) -> str:
    """Run the driver; returns what it said."""
    done = command(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_ranks),
        str(ROOT / "tests" / "trajectory.py"), str(folder), *map(str, paths), env=variables,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    return done.stderr


class Counted(TorchDispatchMode):
    """Counts the operators that selective recomputation keeps, where they run."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (name := func.name().partition(".")[0]) in SAVED_OPERATORS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def test_what_is_costly_is_not_computed_again_where_that_is_selective(config):
    """Products and attention of a forward and backward, counted as they run."""
    counts = {}
    for recompute in ("none", "selective", "full"):
        made = config(**changed("moe", recompute, 4, {}, parallel={"recompute": recompute}))
        run = begin(made, prepare(made.data, quiet=True), World(0, 1, torch.device("cpu")), "auto")
        with Counted() as counts[recompute]:
            train_step(run)
        run.close()
    none, selective, full = (counted.counts for counted in counts.values())
    assert selective == none
    for name in ("aten::addmm", "aten::_grouped_mm", "aten::_scaled_dot_product_flash_attention_for_cpu"):
        assert full[name] > none[name] > 0


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_computing_blocks_again_is_the_same_run_bit_for_bit(kind, recompute, config, alone):
    made = config(**changed(kind, "again", 4, {}, parallel={"recompute": recompute}))
    outcome, weights = train(made, World(0, 1, torch.device("cpu")))
    theirs, their_weights = of_one(alone, kind, config)
    assert outcome == theirs
    assert all(torch.equal(tensor, their_weights[name]) for name, tensor in weights.items())


@pytest.mark.parametrize(
    "cells",
    [
        MeshShape(1, 1, 1),
        MeshShape(2, 1, 2),
        MeshShape(1, 4, 1),
        MeshShape(1, 4, 2),
        MeshShape(2, 4, 4),
        MeshShape(2, 3, 1),
    ],
)
@pytest.mark.parametrize("of_experts", [False, True])
def test_a_copy_of_the_ranks_holds_every_row_once(cells, of_experts):
    for n in (4, 8, 12):
        n_copies = cells.replicate * cells.shard // max(cells.shard, cells.expert if of_experts else 1)
        held = [row for rank in range(cells.replicate * cells.shard) for row in cells.local_rows(n, rank, of_experts)]
        assert sorted(held) == sorted(list(range(n)) * n_copies), (cells, n)


@pytest.mark.parametrize(
    ("mesh", "size", "said"),
    [
        (
            {"shard": 3},
            4,
            "parallel.mesh.shard: 3 does not divide the 4 processes; change the mesh, or start 3 of them",
        ),
        ({"shard": 2, "replicate": 3}, 4, "parallel.mesh: replicate 3 x shard 2 is not 4, the number of processes"),
        ({"expert": 3}, 4, "parallel.mesh.expert: 3 does not divide the 4 processes"),
        ({"expert": 8}, 8, "parallel.mesh.expert: 8 does not divide n_experts 4"),
    ],
)
def test_a_mesh_that_does_not_multiply_out_is_refused_in_a_line(mesh, size, said):
    model = ModelConfig.model_validate(MOE | {"n_layer": 2, "n_head": 2, "vocab_size": 320})
    with pytest.raises(UserError, match=said):
        mesh_shape(MeshConfig(**mesh), size, model)


def test_experts_are_not_split_where_there_are_none():
    with pytest.raises(UserError, match="the model has no experts"):
        mesh_shape(MeshConfig(expert=2), 2, ModelConfig())


def test_the_worst_mesh_is_refused_before_anything_starts():
    with pytest.raises(ValueError, match="2 does not divide shard 3"):
        Config.model_validate(
            {"data": {"sources": [{"type": "stdlib"}]}, "parallel": {"mesh": {"shard": 3, "expert": 2}}}
        )

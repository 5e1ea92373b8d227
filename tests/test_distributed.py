"""Micro-batch, ranks and layout change no result of training, beyond the order of sums."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import write_config
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from trajectory import train

from training.checkpoint import corruption
from training.config import Config, MeshConfig, ModelConfig
from training.distributed.mesh import MeshShape, mesh_shape
from training.distributed.sharded_model import SAVED_OPERATORS
from training.distributed.world import World
from training.errors import UserError

STEPS, MANY = 10, 30  # in `make test`; in soak tests
MOE = {
    "n_embd": 32,
    "n_positions": 32,
    "isolate_documents": True,
    "bigram_rows": 101,
    "blocks": [
        {
            "ffn": {"type": "moe", "n_experts": 4, "hidden": 32, "jitter": 0.1, "balance": "both", "bias_rate": 0.01},
            "short_conv": 3,
        },
        {"ffn": {"type": "moe", "n_experts": 4, "hidden": 16, "scoring": "sigmoid", "n_shared": 1, "gated": True}},
    ],
}
# Sample counts that do not divide evenly by the ranks, and vocabularies that FSDP2 shards unevenly.
MODELS = {
    "moe": {"batch_tokens": 10 * 32, "optim": {"type": "muon"}, "model": MOE | {"n_layer": 2, "n_head": 2}},
    "dense": {
        "batch_tokens": 9 * 16,
        "model": {"n_layer": 6, "n_head": 2, "n_embd": 22, "n_positions": 16, "vocab_size": 259, "tie_head": False},
    },
}
# (model, micro-batch, mesh) by the number of ranks; "others" run in soak tests only.
RANKS = {
    "2": [("moe", 1, {}), ("moe", 8, {"shard": 2}), ("moe", 2, {"expert": 2}), ("moe", 4, {"shard": 2, "expert": 2}),
          ("dense", 2, {}), ("dense", 4, {"shard": 2})],
    "4": [("moe", 1, {"shard": 2, "replicate": 2}), ("moe", 1, {"shard": 4, "expert": 2}), ("moe", 8, {"expert": 2}),
          ("dense", 1, {"shard": 4})],
    "4, others": [("moe", 2, {"expert": 4}), ("moe", 2, {"shard": 2, "expert": 2}), ("moe", 4, {}),
                  ("moe", 2, {"shard": 4}), ("moe", 2, {"shard": 4, "expert": 4}), ("dense", 8, {})],
}  # fmt: skip
FEW_AND_MANY = [STEPS, pytest.param(MANY, marks=pytest.mark.soak)]


def changes_of(kind: str, name: str, micro_batch: int, mesh: dict, steps: int = STEPS, **more) -> dict:
    """Return changes of the small run's options."""
    parallel = {"device": "cpu", "mesh": mesh} | more.pop("parallel", {})
    common = {
        "name": name,
        "steps": steps,
        "micro_batch": micro_batch,
        "parallel": parallel,
        "logging": {"tensorboard": False},
        "eval": {"tokens": 7 * 32},  # does not divide evenly by the ranks
    }
    return MODELS[kind] | common | more


@pytest.fixture(scope="module")
def references() -> dict:
    """Results of one process by (model, steps); filled on first use."""
    return {}


@pytest.fixture
def of_one(references, config):
    """Return a function that returns the result of one process, computed once per model and number of steps."""

    def get(kind: str, steps: int) -> tuple[dict, dict[str, torch.Tensor]]:
        if (kind, steps) not in references:
            references[kind, steps] = train_alone(config(**changes_of(kind, f"{kind}-alone", 4, {}, steps)))
        return references[kind, steps]

    return get


def train_alone(config: Config, stop_at: int | None = None) -> tuple[dict, dict[str, torch.Tensor]]:
    """Train in this process."""
    return train(config, World(0, 1, torch.device("cpu")), stop_at)


@pytest.fixture
def train_on_ranks(processes, options, tmp_path):
    """Train one run after another on the same ranks; returns each run's result, and the output of the ranks."""

    def go(n_ranks: int, runs: list[dict], *, status: int = 0, **variables: str) -> tuple[list[tuple], str]:
        paths = [write_config(tmp_path / f"{i}.yaml", options(**changes)) for i, changes in enumerate(runs)]
        words = [str(tmp_path), *map(str, paths)]
        ended = processes.run("trajectory:main", *words, n_ranks=n_ranks, env=variables)
        assert ended.returncode == status, ended.stderr
        if status:
            return [], ended.stderr
        return [
            (json.loads(path.with_suffix(".json").read_text()), load_file(path.with_suffix(".safetensors")))
            for path in paths
        ], ended.stderr

    return go


def assert_same(ours: tuple[dict, dict], theirs: tuple[dict, dict], label: str, n_before: int = 0) -> None:
    """Assert equality up to the order of sums; `ours` may belong to a run resumed after `n_before` steps."""
    (outcome, weights), (their_outcome, their_weights) = ours, theirs
    steps = their_outcome["steps"]
    assert outcome["tokens"] == their_outcome["tokens"][n_before:], label
    for step, (one, other) in enumerate(zip(outcome["steps"], steps[n_before:], strict=True), start=n_before):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5), (label, step)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5), (label, step)
        assert one.get("expert_load") == other.get("expert_load"), (label, step)
    assert outcome["val_losses"] == pytest.approx(their_outcome["val_losses"], rel=1e-5), label
    assert outcome["val_losses"].keys() == {"all", "json", "email", "logging"}
    assert weights.keys() == their_weights.keys()
    for name, tensor in weights.items():
        assert (tensor - their_weights[name]).abs().max() < 1e-6 * len(steps), (label, name)


@pytest.mark.parametrize("steps", FEW_AND_MANY)
@pytest.mark.parametrize("micro_batch", [1, 2, 8])
@pytest.mark.parametrize("kind", MODELS)
def test_results_do_not_depend_on_the_micro_batch(kind, micro_batch, steps, config, of_one):
    ours = train_alone(config(**changes_of(kind, "cut", micro_batch, {}, steps)))
    assert_same(ours, of_one(kind, steps), f"micro-batch {micro_batch}")


def test_results_do_not_depend_on_ranks_if_batches_change(train_on_ranks, config):
    """Batches of 4, 10 and 3 samples: a rank has more or fewer micro-batches, and some of them are empty."""
    sizes = [(0, 4 * 32), (2 * 4 * 32, 10 * 32), (2 * 4 * 32 + 2 * 10 * 32, 3 * 32)]
    staged = {"batch_schedule": [{"from_tokens": start, "batch_tokens": size} for start, size in sizes]}
    staged["batch_tokens"] = None

    def changes(name: str, micro_batch: int, mesh: dict) -> dict:
        return changes_of("moe", name, micro_batch, mesh, 6) | staged

    alone = train_alone(config(**changes("alone", 4, {})))
    assert_same(train_alone(config(**changes("cut", 1, {}))), alone, "micro-batch 1")
    layouts = [(2, {}), (2, {"shard": 2, "expert": 2})]
    outcomes, _ = train_on_ranks(2, [changes(f"{i}", *layout) for i, layout in enumerate(layouts)])
    for (_, mesh), ours in zip(layouts, outcomes, strict=True):
        assert_same(ours, alone, f"2 ranks {mesh}")


@pytest.mark.parametrize("steps", FEW_AND_MANY)
@pytest.mark.parametrize("ranks", ["2", "4", pytest.param("4, others", marks=pytest.mark.soak)])
def test_results_do_not_depend_on_ranks_and_layouts(ranks, steps, train_on_ranks, of_one):
    runs, n_ranks = RANKS[ranks], int(ranks[0])
    changes = [changes_of(kind, f"{i}", micro_batch, mesh, steps) for i, (kind, micro_batch, mesh) in enumerate(runs)]
    outcomes, _ = train_on_ranks(n_ranks, changes)
    for (kind, _, mesh), ours in zip(runs, outcomes, strict=True):
        assert_same(ours, of_one(kind, steps), f"{kind} on {n_ranks} {mesh}")


def test_a_rank_whose_experts_get_no_token_contributes_zero_gradients(train_on_ranks, config, monkeypatch):
    monkeypatch.setenv("ALL_TO", "0,1")
    changes = {
        "steps": 4,
        "model": MOE | {"n_layer": 2, "n_head": 2, "blocks": [{"ffn": {**MOE["blocks"][0]["ffn"], "balance": "none"}}]},
    }
    alone = train_alone(config(**changes_of("moe", "starved-alone", 4, {}, **changes)))
    assert {tuple(load) for step in alone[0]["steps"] for load in step["expert_load"]} == {(0.5, 0.5, 0, 0)}
    meshes = [{"expert": 2}, {"shard": 2, "expert": 2}]
    runs = [changes_of("moe", f"starved-{i}", 2, mesh, **changes) for i, mesh in enumerate(meshes)]
    outcomes, _ = train_on_ranks(2, runs, ALL_TO="0,1")
    for mesh, ours in zip(meshes, outcomes, strict=True):
        assert_same(ours, alone, f"{mesh}")


MOE_LEGS = [(1, 0.2, 4, {}), (2, 0.5, 1, {"shard": 2, "expert": 2}), (4, 0.8, 2, {"shard": 4}), (1, 1.0, 4, {})]
DENSE_LEGS = [(4, 0.3, 8, {"shard": 4}), (2, 0.7, 2, {}), (1, 1.0, 4, {})]


@pytest.mark.parametrize(
    ("kind", "legs", "steps"),
    [
        ("moe", MOE_LEGS, STEPS),
        pytest.param("moe", MOE_LEGS, MANY, marks=pytest.mark.soak),
        pytest.param("dense", DENSE_LEGS, MANY, marks=pytest.mark.soak),
    ],
)
def test_a_run_may_move_between_layouts(kind, legs, steps, train_on_ranks, config, of_one, tmp_path):
    """Each leg resumes the checkpoint of the previous leg in another layout."""
    outcome = {"steps": [], "tokens": []}
    for n_ranks, share, micro_batch, mesh in legs:
        files = {"one_file_gib": 0 if n_ranks == 2 else 8}
        changes, stop = changes_of(kind, "moved", micro_batch, mesh, steps, checkpoint=files), round(share * steps)
        if n_ranks == 1:
            leg, weights = train_alone(config(**changes), stop)
        else:
            [(leg, weights)], _ = train_on_ranks(n_ranks, [changes], STOP_AT=str(stop))
        outcome = leg | {name: outcome[name] + leg[name] for name in ("steps", "tokens")}
        saved = tmp_path / "runs" / "moved" / "checkpoints" / f"step-{stop:08d}"
        assert corruption(saved) is None
        assert (saved / "model-00002-of-00002.safetensors").exists() == (n_ranks == 2 and "shard" in mesh)
    assert_same((outcome, weights), of_one(kind, steps), f"{kind} {legs}")


def test_a_rank_out_of_memory_inside_a_collective_ends_the_run_which_resumes_with_a_smaller_micro_batch(
    train_on_ranks, config
):
    changes = changes_of("moe", "ended", 4, {"shard": 2}, steps=6)
    train_on_ranks(2, [changes], STOP_AT="2")
    _, output = train_on_ranks(2, [changes], status=1, OUT_OF_MEMORY="1:1")
    (line,) = [line for line in output.splitlines() if "out of memory" in line]
    assert re.fullmatch(
        r"error: rank 1 \(host \S+, pid \d+\): step 3: out of memory; "
        "the same command resumes from the latest checkpoint with micro_batch 2",
        line,
    )
    [(outcome, weights)], _ = train_on_ranks(2, [changes])
    assert outcome["micro_batch"] == 2
    alone = train_alone(config(**changes_of("moe", "alone", 4, {}, steps=6)))
    assert_same((outcome, weights), alone, "ended and resumed", n_before=2)


def test_ranks_on_different_processors_agree_on_the_known_micro_batch(train_on_ranks, tmp_path):
    """The resumed run has two different processors, so both ranks search again for a micro-batch that fits."""
    changes = changes_of("dense", "unlike", "auto", {}, steps=4)
    train_on_ranks(2, [changes], STOP_AT="2")
    train_on_ranks(2, [changes], THREADS="1,2")
    known = json.loads((tmp_path / "runs/unlike/checkpoints/step-00000004/state.json").read_text())["micro_batch"]
    assert sorted("1 thread " in hardware and "2 threads" in hardware for hardware in known) == [False, True]


class OperatorCounter(TorchDispatchMode):
    """Counts calls of the operators whose results selective checkpointing saves."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (name := func.name().partition(".")[0]) in SAVED_OPERATORS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def test_selective_checkpointing_repeats_neither_matmuls_nor_attention(build_run):
    """Count the operators of a forward and a backward."""
    counts = {}
    for recompute in ("none", "selective", "full"):
        run = build_run(**changes_of("moe", recompute, 4, {}, parallel={"recompute": recompute}))
        with OperatorCounter() as counts[recompute]:
            run.train_step()
    none, selective, full = (counted.counts for counted in counts.values())
    assert selective == none
    for name in ("aten::addmm", "aten::_grouped_mm", "aten::_scaled_dot_product_flash_attention_for_cpu"):
        assert full[name] > none[name] > 0


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_activation_checkpointing_changes_no_bit(kind, recompute, config, of_one):
    outcome, weights = train_alone(config(**changes_of(kind, "again", 4, {}, parallel={"recompute": recompute})))
    theirs, their_weights = of_one(kind, STEPS)
    assert outcome == theirs
    assert all(torch.equal(tensor, their_weights[name]) for name, tensor in weights.items())


@pytest.mark.parametrize(
    "mesh",
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
def test_every_replica_holds_every_row_once(mesh, of_experts):
    n_ranks = mesh.replicate * mesh.shard
    for n in (4, 8, 12):
        n_copies = n_ranks // max(mesh.shard, mesh.expert if of_experts else 1)
        rows = [row for rank in range(n_ranks) for row in mesh.local_rows(n, rank, of_experts)]
        assert sorted(rows) == sorted(list(range(n)) * n_copies), (mesh, n)


@pytest.mark.parametrize(
    ("mesh", "size", "message"),
    [
        (
            {"shard": 3},
            4,
            "parallel.mesh.shard: 3 does not divide the 4 processes; change the mesh, or start 3 processes",
        ),
        ({"shard": 2, "replicate": 3}, 4, "parallel.mesh: replicate 3 x shard 2 is not 4, the number of processes"),
        ({"expert": 3}, 4, "parallel.mesh.expert: 3 does not divide the 4 processes"),
        ({"expert": 8}, 8, "parallel.mesh.expert: 8 does not divide n_experts 4"),
    ],
)
def test_a_mesh_that_does_not_fit_the_ranks_is_an_error_of_one_line(mesh, size, message):
    model = ModelConfig.model_validate(MOE | {"n_layer": 2, "n_head": 2, "vocab_size": 320})
    with pytest.raises(UserError, match=message):
        mesh_shape(MeshConfig(**mesh), size, model)


def test_a_dense_model_has_no_experts_to_split():
    with pytest.raises(UserError, match="the model has no experts"):
        mesh_shape(MeshConfig(expert=2), 2, ModelConfig())


def test_a_mesh_that_can_never_fit_is_an_error_of_the_options():
    with pytest.raises(ValueError, match="2 does not divide shard 3"):
        Config.model_validate(
            {"data": {"sources": [{"type": "stdlib"}]}, "parallel": {"mesh": {"shard": 3, "expert": 2}}}
        )


def test_the_saved_operators_of_our_kernels_are_defined():
    """Selective checkpointing would silently recompute a renamed operator."""
    package = Path(__file__).parent.parent / "training"
    for operator in (name for name in SAVED_OPERATORS if name.startswith("training_")):
        namespace, _, name = operator.partition("::")
        (path,) = [
            path
            for path in package.rglob("*.py")
            if "_".join(("training", *path.relative_to(package).with_suffix("").parts)) == namespace
        ]
        assert f'::{name}"' in path.read_text(), operator

"""`optim.groups`: learning rates, weight decay and frozen weights by patterns of names, alone and in whole runs."""

import json
from contextlib import suppress

import pytest
import torch
from conftest import MOE, rows, tensors, write_config
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn
from trajectory import train as train_and_return

from training.config import AdamWConfig, Config, LionConfig, ModelConfig, MuonConfig
from training.distributed.world import World
from training.errors import UserError
from training.kernels.experts import TORCH_EXPERTS, sort_by_expert
from training.model import model_stats
from training.optim.groups import frozen_names, match_groups
from training.optim.optimizer import OPTIMIZERS, Optimizer, state_bytes
from training.options.notices import notices
from training.train import train

SHAPES = {"blocks.0.up": (8, 4), "blocks.1.up": (8, 4), "blocks.0.router": (3, 4), "wte": (16, 4), "norm": (4,)}
KINDS = {"blocks.0.up": "matrix", "blocks.1.up": "matrix", "blocks.0.router": "router", "wte": "embedding",
         "norm": "vector"}  # fmt: skip
TINY = ModelConfig(n_layer=3, n_head=2, n_embd=16, n_positions=32, vocab_size=64, blocks=[{"ffn": MOE}, {}])
NAMES = model_stats(TINY).kinds
# Of every kind: a router at its own rate, biases with decay, frozen experts, a frozen layer, and the embedding.
GROUPS = [
    {"match": "blocks.*.ffn.router.*", "learning_rate": 5e-3, "weight_decay": 0},
    {"match": "blocks.0.ffn.experts.up*", "freeze": True},
    {"match": "blocks.0.mixer.out.weight", "learning_rate": 1e-3},
    {"match": "blocks.1.*", "freeze": True},
    {"match": "*.bias", "weight_decay": 0.5},
]


def parameters():
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def train_parameters(config, names=None) -> dict[str, nn.Parameter]:
    """Return parameters after three steps of an optimizer of those with these names; None: of all, in their groups."""
    named = parameters()
    groups = match_groups(config, SHAPES) if names is None else {}
    trained = {name: p for name, p in named.items() if names is None or name in names}
    optimizer, generator = Optimizer(config, trained.items(), KINDS, groups=groups), torch.Generator().manual_seed(1)
    for _ in range(3):
        for name, p in named.items():
            gradient = torch.randn(p.shape, generator=generator)
            p.grad = None if name in groups and groups[name].freeze else gradient
        optimizer.step(lr_factor=0.5)
    return named


@pytest.mark.parametrize("config_class", OPTIMIZERS, ids=lambda c: c.__name__)
def test_a_group_computes_what_an_optimizer_with_its_options_computes(config_class):
    groups = [
        {"match": "blocks.1.*", "learning_rate": 3e-3, "weight_decay": 0.7},
        {"match": "*.router", "learning_rate": 5e-3},
        {"match": "norm", "weight_decay": 0.3},
        {"match": "wte", "freeze": True},
    ]
    ours = train_parameters(config_class(groups=groups))
    rates = {"learning_rate": 3e-3} | ({"muon_learning_rate": 3e-3} if config_class is MuonConfig else {})
    alone = {
        "blocks.1.up": config_class(**rates, weight_decay=0.7),
        "blocks.0.router": config_class(learning_rate=5e-3),
        "blocks.0.up": config_class(),
    }
    for name, config in alone.items():
        assert torch.equal(ours[name], train_parameters(config, [name])[name]), name
    assert torch.equal(ours["wte"], parameters()["wte"])
    # A vector has no decay of its own. Adam's and Lion's updates do not depend on the weight.
    rate = 0.5 * config_class().learning_rate
    without, decayed = (train_parameters(c)["norm"] for c in (config_class(), config_class(groups=groups)))
    assert torch.allclose(decayed - without, -3 * rate * 0.3 * parameters()["norm"], rtol=0.02, atol=1e-6)


def test_embeddings_in_a_group_have_its_rate_not_that_of_embeddings():
    config = AdamWConfig(embedding_learning_rate=0.3, groups=[{"match": "w*", "learning_rate": 1e-3}])
    optimizer = Optimizer(config, parameters().items(), KINDS, groups=match_groups(config, SHAPES))
    assert optimizer.peak_learning_rates == {"matrix+router": 6e-4, "vector": 6e-4, "w*": 1e-3}


@pytest.mark.parametrize("config_class", OPTIMIZERS, ids=lambda c: c.__name__)
def test_frozen_weights_have_no_state_and_no_average(config_class):
    config = config_class(average={"decay": 0.5}, groups=[{"match": "[bw]*", "freeze": True}])
    named, groups = parameters(), match_groups(config, SHAPES)
    optimizer = Optimizer(config, named.items(), KINDS, groups=groups)
    n_bytes = state_bytes(config, {name: p.shape for name, p in named.items()}, KINDS)
    assert sum(tensor.nbytes for tensor in optimizer.allocate_missing_state()) == n_bytes
    named["norm"].grad = torch.ones(4)
    optimizer.step(1.0, is_averaged=True)
    state = optimizer.state_dict()
    assert {key.partition("/")[0] for key in state} == {"norm"}
    assert sum(tensor.nbytes for tensor in state.values() if tensor.ndim) == n_bytes
    whole = config_class(average={"decay": 0.5})
    other = Optimizer(whole, parameters().items(), KINDS)
    with pytest.raises(KeyError):
        other.load_state_dict(state)


def test_the_first_group_that_matches_has_a_parameter():
    groups = [{"match": "blocks.0.*", "freeze": True}, {"match": "*router*", "learning_rate": 1.0}]
    matched = match_groups(AdamWConfig(groups=groups), NAMES)
    assert matched["blocks.0.ffn.router.weight"].freeze and matched["blocks.2.ffn.router.weight"].learning_rate == 1.0
    assert "wte.weight" not in matched and set(matched) <= set(NAMES)
    assert match_groups(AdamWConfig(), NAMES) == {}
    groups = match_groups(AdamWConfig(groups=[{"match": "blocks.1.*"}, {"match": "*", "freeze": True}]), NAMES)
    assert set(NAMES) - frozen_names(groups) == {name for name in NAMES if name.startswith("blocks.1.")}


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (["blocks.*.ffn.ruoter.*"], r"groups\.0\.match: no parameter matches 'blocks\.\*\.ffn\.ruoter\.\*'; the nearest"
                                    r" names are blocks\.\*\.ffn\.router\.weight, "),
        (["wte.*", "WPE.*"], r"groups\.1\.match: no parameter matches 'WPE\.\*'; the nearest names are .*wpe\.weight"),
        (["*.selection_bias"], "no parameter matches"),  # a buffer, which routing sets
        (["head.*"], r"the output projection is wte\.weight here \(model\.tie_head\)"),
        (["blocks.*", "blocks.0.*"], r"groups\.1\.match: earlier groups \('blocks\.\*'\) have all .*move it up"),
        (["blocks.*", "*"], r"optim\.groups: every parameter is frozen"),
    ],
)  # fmt: skip
def test_patterns_that_choose_nothing_are_errors_with_a_way_out(groups, message):
    config = LionConfig(groups=[{"match": match, "freeze": True} for match in groups])
    with pytest.raises(UserError, match=message) as caught:
        match_groups(config, NAMES)
    assert "\n" not in str(caught.value)


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=1, max_size=30))
def test_no_pattern_raises_anything_else(pattern):
    with suppress(UserError):
        match_groups(AdamWConfig(groups=[{"match": pattern, "learning_rate": 1.0}]), NAMES)


@pytest.mark.parametrize(
    ("group", "problem"),
    [
        ({"match": "wte.*", "freeze": True, "learning_rate": 1.0}, "no effect with freeze"),
        ({"freeze": True}, "Field required"),
        ({"match": "", "freeze": True}, "at least 1 character"),
        ({"match": "wte.*", "learning_rate": 0.0}, "greater than 0"),
    ],
)
def test_a_group_with_wrong_options_is_an_error(group, problem):
    with pytest.raises(ValidationError, match=problem):
        AdamWConfig(groups=[group])


def test_a_frozen_tied_embedding_and_a_decay_that_erases_are_said(config):
    frozen = {"type": "adamw", "groups": [{"match": "wte.*", "freeze": True}]}
    (line,) = notices(config(optim=frozen))
    assert line.startswith("optim.groups: wte.weight is also the output projection (model.tie_head)")
    assert not list(notices(config(optim=frozen, model={"n_positions": 32, "tie_head": False})))
    (line,) = notices(config(optim={"groups": [{"match": "*", "learning_rate": 2.0, "weight_decay": 0.5}]}))
    assert line.startswith("optim.groups.0.weight_decay: ")


# --- whole runs ---------------------------------------------------------------------------------------


def optim_of(kind: str, **changes) -> dict:
    return {"type": kind, "average": {"decay": 0.5}, "groups": GROUPS} | changes


def weights_of(folder, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoints/step-{step:08d}/model.safetensors")


def is_frozen(name: str) -> bool:
    return name.startswith(("blocks.0.ffn.experts.up", "blocks.1."))


@pytest.mark.parametrize("kind", ["adamw", "muon", "lion"])
def test_a_run_keeps_frozen_weights_and_resumes_bit_for_bit(kind, run, config, at_step, capsys):
    options = {"optim": optim_of(kind, average={"decay": 0.5, "final": True}), "checkpoint": {"every": 1, "keep": 9}}
    through = run(name="through", **options)
    assert "groups" in capsys.readouterr().out
    first, last = weights_of(through, 1), weights_of(through, 8)
    # `selection_bias` and `load` are no parameters: experts stay balanced.
    assert {name for name, tensor in last.items() if torch.equal(tensor, first[name])} == set(filter(is_frozen, last))
    state = load_file(through / "checkpoints/step-00000008/optimizer.safetensors")
    of_state = {key.rpartition("/")[0] for key in state}
    assert of_state == {name for name in model_stats(config().resolved().model.model_copy(
        update={"vocab_size": 320})).kinds if not is_frozen(name)}  # fmt: skip
    rates = [row["learning_rates"] for row in rows(through) if "learning_rates" in row]
    assert len(rates) == 2 and rates[0]["blocks.*.ffn.router.*"] / rates[0]["blocks.0.mixer.out.weight"] == (
        pytest.approx(5.0)
    )
    stopped = config(name="stopped", **options)
    at_step.send(5)
    assert train(stopped) != 0
    assert train(stopped) == 0
    assert rows(stopped.run_dir) == rows(through) and tensors(stopped.run_dir, 8) == tensors(through, 8)
    assert (stopped.run_dir / "model/model.safetensors").read_bytes() == (
        through / "model/model.safetensors"
    ).read_bytes()
    changed = config(name="through", steps=9, **options | {"optim": optim_of(kind, groups=GROUPS[1:])})
    with pytest.raises(UserError, match=r"holds a run with other options: .*optim\.groups\.0\.freeze: False -> True"):
        train(changed)


def test_frozen_weights_get_no_gradient_and_do_not_count_in_its_norm(build_run):
    whole, run = build_run(name="whole"), build_run(optim=optim_of("adamw"), logging={"every": 1, "histogram_every": 1})
    seen = {}

    def norm_of(run, *, without_frozen):
        """Return the norm of the first step's gradients, and those names that have none."""
        step = run.optimizer.step

        def see(*args, **kwargs):
            seen.update({name: p.grad and None if p.grad is None else p.grad.clone()
                         for name, p in run.model.named_parameters()})  # fmt: skip
            step(*args, **kwargs)

        seen.clear()
        run.optimizer.step = see
        run.train_step()
        kept = {name: g for name, g in seen.items() if g is not None and not (without_frozen and is_frozen(name))}
        return torch.stack([g.double().norm() for g in kept.values()]).norm(), {n for n, g in seen.items() if g is None}

    expected, none = norm_of(whole, without_frozen=True)
    factor = min(1.0, 1.0 / whole.rows()[0]["grad_norm"])
    ours, missing = norm_of(run, without_frozen=False)
    (row,) = run.rows()
    assert not none and missing == set(filter(is_frozen, seen))
    assert row["grad_norm"] == pytest.approx(float(expected) / factor, rel=1e-5)
    assert float(ours) == pytest.approx(min(1.0, row["grad_norm"]), rel=1e-5)  # clipped by that norm
    assert (
        row["layers"]["grad_norm"][1] == 0 and row["layers"]["update_ratio"][1] == 0 < row["layers"]["weight_norm"][1]
    )


def test_ranks_compute_the_same_groups_in_every_layout(processes, options, config, tmp_path):
    changes = {"optim": optim_of("muon"), "steps": 5, "micro_batch": 2}
    _, weights = train_and_return(config(name="alone", **changes), World(0, 1, torch.device("cpu")))
    meshes = {"copies": {}, "shards": {"shard": 2}, "experts": {"expert": 2}, "both": {"shard": 2, "expert": 2}}
    paths = [
        write_config(tmp_path / f"{name}.yaml", options(name=name, parallel={"device": "cpu", "mesh": mesh}, **changes))
        for name, mesh in meshes.items()
    ]
    frozen_experts = {"optim": {"type": "adamw", "groups": [{"match": "blocks.0.*", "freeze": True}]}}
    more = options(name="frozen", parallel={"device": "cpu", "mesh": {"shard": 2, "expert": 2}}, **changes)
    paths.append(write_config(tmp_path / "frozen.yaml", more | frozen_experts))
    ended = processes.run("trajectory:main", str(tmp_path), *map(str, paths), n_ranks=2)
    assert ended.returncode == 0, ended.stderr
    for path in paths[:-1]:
        ours = load_file(path.with_suffix(".safetensors"))
        assert ours.keys() == weights.keys()
        for name, tensor in ours.items():
            assert (tensor - weights[name]).abs().max() < 1e-5, (path.stem, name)
            assert not is_frozen(name) or torch.equal(tensor, weights[name]), (path.stem, name)
    _, weights = train_and_return(config(name="alone-2", **changes | frozen_experts), World(0, 1, torch.device("cpu")))
    for name, tensor in load_file(paths[-1].with_suffix(".safetensors")).items():
        assert (tensor - weights[name]).abs().max() < 1e-5, name


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_computes_the_same_with_frozen_layers(recompute, config):
    groups = [{"match": "w?e.*", "freeze": True}, {"match": "blocks.0.*", "freeze": True}]
    results = []
    for name in ("none", recompute):
        options = {"optim": {"groups": groups}, "steps": 3, "parallel": {"device": "cpu", "recompute": name}}
        results.append(train_and_return(config(name=name, **options), World(0, 1, torch.device("cpu"))))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(tensor, results[1][1][name]) for name, tensor in results[0][1].items())


def test_a_run_may_train_the_experts_of_an_upcycled_model_alone(run, finished):
    """The dense weights, and what they make of a text, stay; the experts' copies and their router learn."""
    dense = finished(name="dense", model={"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32})
    frozen = [{"match": pattern, "freeze": True} for pattern in ("w?e.*", "blocks.*.mixer.*", "*norm_?.*")]
    moe = {"type": "moe", "n_experts": 2, "top_k": 2}
    folder = run(
        name="experts", init_from=str(dense / "model"), model={"blocks": [{"ffn": moe}]}, optim={"groups": frozen}
    )
    before, after = weights_of(dense, 8), weights_of(folder, 8)
    before["wte.weight"] = before["wte.weight"][: len(after["wte.weight"])]  # an export has no padding
    changed = {name for name, tensor in after.items() if name not in before or not torch.equal(tensor, before[name])}
    assert changed and all(".ffn." in name for name in changed)
    assert len(after) - len(changed) == sum(".ffn." not in name for name in before)
    assert json.loads((folder / "summary.json").read_text())["val_loss"] > 0


@pytest.mark.parametrize("name", ["loop", "grouped", "reference"])
def test_frozen_experts_pass_the_gradient_on(name):
    kernel, generator = TORCH_EXPERTS[name], torch.Generator().manual_seed(0)
    x_NC, w_EFC = (torch.randn(shape, generator=generator) for shape in ((6, 8), (3, 8, 8)))
    dispatch = sort_by_expert(torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1], [0, 2], [2, 1]]), 3)
    gradients = []
    for is_trained in (True, False):
        x, w = x_NC.clone().requires_grad_(), w_EFC.clone().requires_grad_(is_trained)
        kernel.up(x, (w,), dispatch)[0].square().sum().backward()
        gradients.append(x.grad)
        assert (w.grad is not None) == is_trained
    assert torch.equal(*gradients)


def test_the_config_of_the_issue_is_accepted():
    groups = [{"match": "blocks.*.ffn.router.*", "learning_rate": 5e-3, "weight_decay": 0},
              {"match": "wte.*", "freeze": True}]  # fmt: skip
    config = Config.model_validate({"data": {"sources": [{"type": "stdlib"}]}, "optim": {"groups": groups}})
    assert config.optim.groups[0].weight_decay == 0.0

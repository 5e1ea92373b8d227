"""Every option has a help text and a valid default, and the rules between options hold."""

import json
import re
from typing import get_args

import pytest
from conftest import ROOT, SHIPPED, minimal_value
from pydantic import ValidationError

from training.config import (
    CHANGEABLE_ON_RESUME,
    AttentionConfig,
    BlockConfig,
    Config,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    StdlibSource,
)
from training.optim.schedule import lr_factor
from training.options.cli import dump_config, load_config
from training.options.notices import notices, schedule_notices
from training.options.schema import (
    all_groups,
    find_option,
    json_schema,
    sections,
    type_name,
)
from training.options.validate import describe_expected

CONFIGS = ROOT / "configs"
DATA = {"sources": [{"type": "stdlib"}]}
OPTIONS = [
    pytest.param(
        field, id=".".join([*group.path, *([type_name(group.section)] * (type_name(group.section) is not None)), name])
    )
    for group in all_groups()
    for name, field in group.section.model_fields.items()
    if name != "type"
]


@pytest.mark.parametrize("field", OPTIONS)
def test_every_option_has_a_help_text_and_a_description_of_its_values(field):
    assert field.description
    assert len(field.description) <= 160
    assert field.description.isascii()
    assert describe_expected(field.annotation, field.metadata)


@pytest.mark.parametrize("field", OPTIONS)
def test_every_count_has_a_unit(field):
    counts = int in (field.annotation, *get_args(field.annotation))
    if counts and field is not Config.model_fields["seed"]:
        assert field.json_schema_extra["unit"]


@pytest.mark.parametrize("section", dict.fromkeys(group.section for group in all_groups()))
def test_every_default_is_valid(section):
    defaults = {name: field.default for name, field in section.model_fields.items() if not field.is_required()}
    least = minimal_value(section) | {
        name: minimal_value(f.annotation) for name, f in section.model_fields.items() if f.is_required()
    }
    if "dataset" in section.model_fields:  # a task needs it or paths
        least |= {"paths": ["items.jsonl"]}
    least |= {names[0]: 1 for names, default in getattr(section, "alternatives", ()) if default is None}
    assert section.model_validate(defaults | least) == section.model_validate(least)
    assert section.__doc__


def test_sections_are_frozen():
    with pytest.raises(ValidationError):
        MLPConfig().hidden = 3


@pytest.mark.parametrize(
    ("tree", "problem"),
    [
        ({"model": {"n_head": 7}}, "n_head"),
        ({"model": {"position": "rope", "n_embd": 12, "n_head": 4}}, "rope needs an even head width"),
        ({"model": {"n_layer": 2, "blocks": [{"repeat": 3}]}}, "3 layers long"),
        ({"model": {"blocks": [{"ffn": {"type": "moe", "n_experts": 2, "top_k": 3}}]}}, "more than n_experts 2"),
        ({"data": {"sources": [{"type": "stdlib", "weight": 1}, {"type": "stdlib"}]}}, "a weight, or none"),
        ({"optim": {"learning_rate": 1e39}}, r"learning_rate: 1e\+39 is more than a float32 holds"),
        ({"steps": 10**20}, r"steps: 1e\+20 is more than an integer of 64 bits holds"),
        ({"model": {"n_layer": 10**9}}, "less than or equal to 10000"),
        ({"batch_tokens": 1000}, "not a multiple of model.n_positions 1024"),
    ],
)
def test_rules_between_options_hold_without_a_file(tree, problem):
    with pytest.raises(ValidationError, match=problem):
        Config.model_validate({"data": DATA} | tree)


@pytest.mark.parametrize(
    ("ffn", "is_renormalized"),
    [({}, True), ({"top_k": 1}, False), ({"top_k": 1, "renormalize": True}, True), ({"renormalize": False}, False)],
)
def test_renormalize_follows_from_top_k_unless_it_is_given(ffn, is_renormalized):
    model = ModelConfig.model_validate({"blocks": [{"ffn": {"type": "moe"} | ffn}]})
    assert model.blocks[0].ffn.is_renormalized == is_renormalized
    assert model.with_explicit_sizes().blocks[0].ffn.renormalize is is_renormalized


ONE_OF_EIGHT = {"type": "moe", "top_k": 1, "renormalize": True}
ONLY_LOSSES = "learns only from its auxiliary losses"


@pytest.mark.parametrize(
    ("tree", "notice"),
    [
        ({"model": {"blocks": [{"ffn": ONE_OF_EIGHT}]}}, f"model.blocks.0.ffn.renormalize: .*{ONLY_LOSSES}"),
        ({"model": {"blocks": [{}, {"ffn": ONE_OF_EIGHT | {"z_loss_weight": 0.0}}]}}, "model.blocks.1.*learns nothing"),
        ({"model": {"blocks": [{"ffn": {"type": "moe", "n_experts": 1, "top_k": 1}}]}}, f"n_experts: .*{ONLY_LOSSES}"),
        ({"model": {"blocks": [{"ffn": {"type": "moe", "capacity_factor": 0.25}}]}}, "capacity_factor: .*at least 75%"),
        ({"model": {"blocks": [{"mixer": {"window": 1}}]}}, "mixer.window: 1 .*use 2 or more"),
        ({"model": {"blocks": [{"mixer": {"softcap": 0.01}}]}}, "mixer.softcap: 0.01 .*uniform"),
        ({"model": {"n_embd": 4, "n_head": 4, "blocks": [{"mixer": {"qk_norm": True}}]}}, "mixer.qk_norm: .* sign"),
        ({"model": {"blocks": [{"mixer": {"type": "latent", "kv_rank": 1}}]}}, "mixer.kv_rank: .* 2 or more"),
        ({"model": {"blocks": [{"mixer": {"type": "latent", "q_rank": 1}}]}}, "mixer.q_rank: .* 2 or more"),
        ({"model": {"n_embd": 1, "n_head": 1}}, "model.n_embd: 1 .* 2 or more"),
        ({"model": {"n_positions": 1}}, "model.n_positions: 1 .* 2 or more"),
        ({"model": {"logit_softcap": 0.01}}, "model.logit_softcap: 0.01 "),
        ({"optim": {"learning_rate": 10.0}}, "optim.weight_decay: 0.1 x learning_rate 10 is 1 or more"),
        ({"optim": {"type": "muon", "muon_learning_rate": 10.0}}, "weight_decay: 0.1 x muon_learning_rate 10 "),
        ({"optim": {"grad_clip": 1e-8}}, "optim.grad_clip: 1e-08 is not above eps 1e-08"),
        (
            {"data": {"sources": [{"paths": ["a.txt", "b.txt", "a.txt"]}]}},
            "data.sources.0.paths: a.txt is listed more than once, but read once; to repeat text, list it in several",
        ),
        ({"steps": 100}, "schedule.warmup_steps: 100 does not fit into steps 100; this run uses 49"),
        ({"steps": 9, "schedule": {"type": "wsd", "decay_steps": 8, "warmup_steps": 3}}, "decay_steps: 8 .* uses 7"),
    ],
)
def test_a_notice_names_options_that_change_another_or_keep_a_part_from_learning(tree, notice):
    config = Config.model_validate({"data": DATA} | tree)
    lines = [*notices(config), *schedule_notices(config)]
    assert any(re.search(notice, line) for line in lines)
    assert all(len(line) < 160 for line in lines)


@pytest.mark.parametrize("path", SHIPPED.values(), ids=SHIPPED)
def test_every_shipped_config_has_no_notice_and_trains_for_any_number_of_steps(path):
    config = load_config(path)
    assert not [*notices(config), *schedule_notices(config)]
    for steps in (1, 2, 3, 10, 11):
        config = load_config(path, {"steps": str(steps)})
        changed = {line.split(":")[0] for line in schedule_notices(config)}
        assert changed == {
            f"schedule.{name}"
            for name, value in config.schedule
            if name.endswith("_steps") and value not in (None, getattr(config.resolved().schedule, name))
        }
        schedule = config.resolved().schedule
        factors = [lr_factor(schedule, step, steps) for step in range(steps)]
        assert max(factors) == 1.0 and (steps == 1 or factors[-1] == getattr(schedule, "final_ratio", factors[-1]))
        assert sum(getattr(schedule, name, 0) for name in ("warmup_steps", "decay_steps")) <= steps


def test_the_pattern_of_blocks_is_repeated_to_n_layer():
    moe = BlockConfig(ffn=MoEConfig())
    model = ModelConfig(n_layer=5, blocks=(BlockConfig(repeat=2), moe))
    assert [type(block.ffn) for block in model.layers()] == [MLPConfig, MLPConfig, MoEConfig, MLPConfig, MLPConfig]


def test_a_variant_is_selected_by_its_type_and_the_first_is_the_default():
    config = Config.model_validate(
        {"data": DATA, "model": {"blocks": [{"ffn": {"type": "moe"}}, {"ffn": {"gated": True}}]}}
    )
    assert [type(block.ffn) for block in config.model.blocks] == [MoEConfig, MLPConfig]
    assert type(config.model.blocks[0].mixer) is AttentionConfig
    assert type(config.data.sources[0]) is StdlibSource


def test_options_changeable_on_resume_exist():
    assert all(find_option(tuple(name.split("."))) for name in CHANGEABLE_ON_RESUME)


def test_variants_of_a_union_have_different_types():
    for group in all_groups():
        for field in group.section.model_fields.values():
            types = [type_name(section) for section in sections(field.annotation)]
            assert len(set(types)) == len(types)


def test_the_schema_for_editors_is_current():
    current = json.loads((CONFIGS / "schema.json").read_text())
    assert current == json.loads(json_schema()), "run: python -m training.options.cli schema > configs/schema.json"


def test_the_schema_describes_every_option_and_matches_one_variant():
    tree = json.loads(json_schema())
    for section in (tree, *tree["$defs"].values()):
        for name, option in section["properties"].items():
            assert name == "type" or option["description"]
            first, *others = (
                tree["$defs"][variant["$ref"].rpartition("/")[2]]
                for variant in option.get("oneOf", option.get("items", {}).get("oneOf", [{"$ref": "MLPConfig"}]))
            )
            assert "type" not in first.get("required", [])
            assert all(other["required"].count("type") == 1 for other in others)


def test_every_shipped_config_survives_a_round_trip(tmp_path):
    for path in CONFIGS.glob("*.yaml"):
        config = load_config(path)
        (tmp_path / path.name).write_text(dump_config(config))
        assert load_config(tmp_path / path.name) == config
        assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n")

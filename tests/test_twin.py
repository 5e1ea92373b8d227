"""The dense twin of a Mixture of Experts costs a token the same FLOPs, and is otherwise the same run."""

import pytest

from training.config import BlockConfig, Config, MLPConfig
from training.errors import UserError
from training.model import model_stats
from training.options import cli
from training.twin import main, twin

MOE = {"type": "moe", "n_experts": 8, "top_k": 2, "hidden": 48, "activation": "silu", "gated": True}
SIZES = {"n_layer": 4, "n_head": 2, "n_embd": 32, "n_positions": 16, "vocab_size": 64, "bias": False}


def config_of(*ffns, **changes) -> Config:
    model = SIZES | {"blocks": [{"ffn": ffn} for ffn in ffns]}
    options = {"batch_tokens": 64, "data": {"sources": [{"type": "stdlib"}]}, "model": model} | changes
    return Config.model_validate(options)


@pytest.mark.parametrize(
    "ffn",
    [
        MOE,
        MOE | {"n_shared": 3, "top_k": 5},
        MOE | {"gated": False, "hidden": None},
        MOE | {"n_experts": 1, "top_k": 1, "scoring": "sigmoid"},
    ],
    ids=str,
)
def test_the_twin_costs_a_token_the_same_flops(ffn):
    config = config_of(ffn, {"type": "mlp", "hidden": 40})
    ours, theirs = (model_stats(one.model).flops_per_token for one in (config, twin(config)))
    routers = 6 * 2 * 32 * ffn["n_experts"]
    assert ours - routers == theirs


def test_the_twin_is_otherwise_the_same_run():
    config = config_of(MOE, {"type": "mlp", "hidden": 40}, seed=3, name="mine")
    dense = twin(config)
    assert dense.name == "mine-dense"
    assert dense.model.blocks[0] == BlockConfig(ffn=MLPConfig(hidden=96, activation="silu", gated=True))
    assert dense.model.blocks[1] == config.model.blocks[1]
    same = {"name": "mine", "model": config.model}
    assert dense.model_copy(update=same) == config
    assert dense.model.model_copy(update={"blocks": config.model.blocks}) == config.model


def test_the_written_file_is_the_twin_with_a_summary(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moe.yaml").write_text(cli.dump_config(config_of(MOE)))
    assert main(["--config", "moe.yaml", "--out", "twin.yaml", "--seed", "5"]) == 0
    assert capsys.readouterr().out.startswith("twin.yaml: dense twin of gpt2: 4 layers of experts, 2 of 8 per token, ")
    written = cli.load_config(tmp_path / "twin.yaml")
    assert written == twin(config_of(MOE, seed=5))
    assert main(["--config", "moe.yaml", "--seed", "5"]) == 0
    assert capsys.readouterr().out == (tmp_path / "twin.yaml").read_text()


def test_a_folder_is_not_replaced_by_the_twin(tmp_path, capsys):
    path = tmp_path / "moe.yaml"
    path.write_text(cli.dump_config(config_of(MOE)))
    assert main(["--config", str(path), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: --out {tmp_path}: a folder; name a file\n" and path.exists()


def test_a_run_without_a_twin_is_an_error(tmp_path, capsys):
    (tmp_path / "dense.yaml").write_text(cli.dump_config(config_of({"type": "mlp"})))
    assert main(["--config", str(tmp_path / "dense.yaml")]) == 2
    assert capsys.readouterr().err.startswith("error: model.blocks: no layer has experts")
    with pytest.raises(UserError, match="init_from"):
        twin(config_of(MOE, init_from="models/gpt2"))

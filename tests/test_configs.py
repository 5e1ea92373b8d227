"""Every shipped config loads, survives a round trip, and builds its model."""

from pathlib import Path

import pytest
from conftest import SHIPPED

from training.model import model_stats
from training.options import cli

# The recipe beside configs/gpt2_124m.yaml trains in a folder of another name.
NAMES = {path: path.stem for path in SHIPPED.values()} | {SHIPPED["recipes/gpt2_124m"]: "gpt2_124m_modern"}
TOKENS = {"bpe": lambda tokenizer: tokenizer.vocab_size, "byte": lambda _: 257, "huggingface": lambda _: 50257}


@pytest.fixture(params=SHIPPED.values(), ids=SHIPPED)
def path(request) -> Path:
    return request.param


def test_it_loads_and_survives_a_round_trip(path, tmp_path):
    config = cli.load_config(path)
    again = tmp_path / "again.yaml"
    again.write_text(cli.dump_config(config))
    assert cli.load_config(again) == config
    assert config.name == NAMES[path]


def test_its_model_can_be_built(path):
    config = cli.load_config(path)
    tokenizer = config.data.tokenizer
    size = config.model.vocab_size or TOKENS[tokenizer.type](tokenizer)
    stats = model_stats(config.model.model_copy(update={"vocab_size": size}))
    is_sparse = config.model.bigram_rows is not None or any(block.ffn.type == "moe" for block in config.model.blocks)
    assert (stats.n_active_parameters < stats.n_parameters) == is_sparse
    assert config.batch_tokens % config.model.n_positions == 0


def test_its_header_has_the_command_and_the_result(path):
    first, *header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    schema = "schema.json" if path.parent.name == "configs" else "../configs/schema.json"
    assert first == f"# yaml-language-server: $schema={schema}"
    text = "\n".join(header)
    assert f"--config {path.parent.name}/{path.name}" in text
    assert "Not run" in text or "bits/byte" in text


def test_the_parameter_counts_in_headers_are_true():
    for name, counts in {
        "configs/gpt2_moe_8x124m": ("323M", "153M"),
        "configs/gpt2_124m": ("124M", "124M"),
        "recipes/gpt2_124m": ("124M", "124M"),
        "recipes/gpt2_moe": ("494M", "124M"),
    }.items():
        stats = model_stats(cli.load_config(SHIPPED[name]).model)
        assert tuple(f"{n / 1e6:.0f}M" for n in (stats.n_parameters, stats.n_active_parameters)) == counts

"""Models exported to Transformers 4.57 and 5, and read back: the same logits, gradients and bits."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command, environment
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.config import ModelConfig
from training.data.tokenizer import build_byte_tokenizer
from training.errors import UserError
from training.model import GPT, init_weights
from training.weights import hf
from training.weights.hf import gpt2, llama, model_folder
from training.weights.hf.architecture import BALANCING, computed_options, first_difference, pattern
from training.weights.hf.custom import CustomArchitecture
from training.weights.hf.tables import ACTIVATIONS

V4 = Path(sys.prefix, "transformers-4")  # the Makefile installs Transformers 4.57 there

SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 24, "vocab_size": 320}
ROTARY = SIZES | {"n_layer": 3, "position": "rope", "norm": "rmsnorm", "bias": False}
GATED = {"type": "mlp", "hidden": 40, "activation": "silu", "gated": True}
MOE = {"type": "moe", "n_experts": 5, "top_k": 2, "hidden": 24, "activation": "silu", "gated": True, "balance": "none"}
GROUPED = {"n_kv_head": 2, "head_dim": 12}
NORMED = GROUPED | {"qk_norm": True}
LATENT = {"type": "latent", "kv_rank": 16, "q_rank": 20, "rope_dim": 8, "head_dim": 10, "value_dim": 6}
SIGMOID = MOE | {"top_k": 3, "scoring": "sigmoid", "route_scale": 1.7, "n_shared": 2, "balance": "bias"}
BALANCED = MOE | {"top_k": 3, "n_shared": 2, "balance": "both"}
SIX_HEADS = ROTARY | {"n_layer": 4, "n_head": 6, "rope_theta": 700.0, "norm_eps": 1e-6}  # 6 does not divide n_embd


def blocks(mixer: dict, *ffns: dict, **others) -> dict:
    """Return options of a model whose blocks have this mixer and these feed-forward layers."""
    return {"blocks": [{"mixer": mixer, "ffn": ffn} for ffn in ffns]} | others


# name: (model_type of its export, options of the model)
CASES: dict[str, tuple[str, dict]] = {
    "gpt2, 12 layers": ("gpt2", SIZES | {"n_layer": 12}),
    "gpt2, untied": ("gpt2", SIZES | {"tie_head": False}),
    "gpt2, large epsilon": ("gpt2", SIZES | {"norm_eps": 1e-3}),
    "gpt2, exact gelu": ("gpt2", SIZES | {"blocks": [{"ffn": {"type": "mlp", "hidden": 48, "activation": "gelu"}}]}),
    "gpt2, relu2": ("gpt2", SIZES | {"blocks": [{"ffn": {"type": "mlp", "activation": "relu2"}}]}),
    "llama": ("llama", ROTARY | blocks({}, GATED, rope_theta=500.0)),
    "llama, grouped, untied": ("llama", ROTARY | blocks(GROUPED, GATED, tie_head=False, norm_eps=1e-3)),
    "llama, gelu": ("llama", ROTARY | blocks({}, GATED | {"activation": "gelu_tanh"})),
    "qwen3": ("qwen3", ROTARY | blocks(NORMED, GATED)),
    "qwen3, windows in some layers": (
        "qwen3",
        ROTARY
        | {"tie_head": False, "rope_theta": 1e6, "n_embd": 30}
        | {"blocks": [{"mixer": NORMED | {"window": 5}, "ffn": GATED}, {"mixer": NORMED, "ffn": GATED}]},
    ),
    "qwen3, windows everywhere": ("qwen3", ROTARY | blocks(NORMED | {"window": 6}, GATED)),
    "qwen3_moe": ("qwen3_moe", ROTARY | blocks(NORMED, MOE)),
    "qwen3_moe, dense layers": (
        "qwen3_moe",
        ROTARY | blocks(NORMED | {"window": 7}, GATED, *[MOE | {"renormalize": False}] * 2, tie_head=False),
    ),
    "mixtral": ("mixtral", ROTARY | blocks(GROUPED, MOE)),
    "mixtral, windows": (
        "mixtral",
        SIX_HEADS | blocks(GROUPED | {"window": 7}, MOE | {"activation": "gelu"}, tie_head=False),
    ),
    "ernie4_5_moe": ("ernie4_5_moe", SIX_HEADS | blocks(GROUPED, GATED, BALANCED, BALANCED, GATED)),
    "ernie4_5_moe, no shared experts": (
        "ernie4_5_moe",
        ROTARY | blocks(GROUPED, BALANCED | {"n_shared": 0}, tie_head=False),
    ),
    "dots1": ("dots1", SIX_HEADS | blocks(NORMED, GATED, *[SIGMOID] * 3)),
    "dots1, windows in some layers": (
        "dots1",
        ROTARY
        | {
            "tie_head": False,
            "blocks": [
                {"mixer": mixer, "ffn": SIGMOID | {"n_shared": 1, "renormalize": False}}
                for mixer in (NORMED | {"window": 5}, NORMED)
            ],
        },
    ),
    "dots1, no shared experts": ("dots1", ROTARY | blocks(NORMED, SIGMOID | {"n_shared": 0})),
    "glm4_moe": ("glm4_moe", SIX_HEADS | blocks(GROUPED, GATED, *[SIGMOID] * 3)),
    "glm4_moe, untied": ("glm4_moe", ROTARY | blocks(GROUPED, SIGMOID, tie_head=False)),
    "deepseek_v3": ("deepseek_v3", SIX_HEADS | blocks(LATENT, GATED, *[SIGMOID] * 3)),
    "deepseek_v3, full-rank queries": (
        "deepseek_v3",
        ROTARY
        | blocks(
            LATENT | {"q_rank": None, "head_dim": None, "value_dim": None},
            SIGMOID | {"renormalize": False, "n_shared": 0},
            norm_eps=1e-6,
            tie_head=False,
        ),
    ),
}
BIASED = {"ernie4_5_moe", "dots1", "glm4_moe", "deepseek_v3"}  # these can store a selection bias
ALSO = {  # further architectures for the same model
    "mixtral": ["ernie4_5_moe"],
    "dots1": ["glm4_moe"],
    "dots1, no shared experts": ["glm4_moe"],
}
N_VOCAB = 300

# torch warns when it initializes the shared experts of width 0.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")


def add_noise(model: GPT) -> GPT:
    """Add noise, so that no bias is 0 and no norm is 1: trivial values would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    for tensor in [*model.parameters(), *biases]:
        tensor.data += 0.1 * torch.randn(tensor.shape, generator=generator)
    return model


def build(options: dict) -> GPT:
    """Return a model with noise in it; selection biases that `balance` moves decide many choices."""
    model = add_noise(init_weights(GPT(ModelConfig.model_validate(options)), 0))
    generator = torch.Generator().manual_seed(4)
    for block, layer in zip(model.blocks, model.config.layers(), strict=True):
        if getattr(layer.ffn, "balance", None) in ("bias", "both"):
            block.ffn.router.weight.data *= 3  # or a few experts would get all tokens, and others no gradient
            block.ffn.selection_bias += 0.1 * torch.randn(block.ffn.selection_bias.shape, generator=generator)
    return model


def saved_names(name: str, model: GPT) -> set[str]:
    """Return the names of the tensors of a case's model that a file holds."""
    biases = {key for key in model.state_dict() if key.endswith("selection_bias") and CASES[name][0] in BIASED}
    return {key for key, _ in model.named_parameters()} | biases


def tokens(rows: int = 2) -> Tensor:
    return torch.randint(0, N_VOCAB, (rows, 24), generator=torch.Generator().manual_seed(2))


def greedy(model: GPT, x_BT: Tensor, n: int) -> list[int]:
    """Return the likeliest continuation within the first N_VOCAB tokens, without a cache."""
    for _ in range(n):
        x_BT = torch.cat([x_BT, model.logits(x_BT)[:, -1:, :N_VOCAB].argmax(-1)], dim=1)
    return x_BT[0, -n:].tolist()


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, Path]:
    """Export every case's model without padding rows, with a file of inputs and logits beside each folder."""
    root, folders, types = tmp_path_factory.mktemp("exports"), {}, set()
    for n, (name, (model_type, options)) in enumerate(CASES.items()):
        model, folders[name] = build(options), root / f"case-{n}"
        hf.write_model(folders[name], model.state_dict(), model.config, end_of_text=256, n_vocab=N_VOCAB)
        if model_type not in types:  # the documented calls of Transformers need a tokenizer
            build_byte_tokenizer().save(folders[name], model.config.n_positions)
            types.add(model_type)
        with torch.no_grad():
            logits_BTV = model.logits(tokens())[..., :N_VOCAB].contiguous()
        save_file({"x_BT": tokens(), "logits_BTV": logits_BTV}, folders[name].with_suffix(".expected"))
    return folders


@pytest.fixture(scope="module")
def opened_by_4(exports) -> dict[str, dict]:
    """Open the exports with Transformers 4.57."""
    if not V4.is_dir():
        pytest.skip(f"no Transformers 4.57 in {V4}; the Makefile installs it")
    done = subprocess.run(
        [sys.executable, "tests/open_exports.py", *map(str, exports.values())],
        cwd=ROOT, env=environment() | {"PYTHONPATH": str(V4)}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(exports, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.fixture(scope="module")
def opened_by_5(exports) -> dict[str, dict]:
    """Open the exports with the installed Transformers."""
    pytest.importorskip("transformers")
    from open_exports import open_export

    return {name: open_export(folder) for name, folder in exports.items()}


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("name", CASES)
def test_an_export_opens_with_equal_logits_in_both_versions(request, exports, name, version):
    opened = request.getfixturevalue(f"opened_by_{version}")[name]
    model_type, options = CASES[name]
    model = build(options)
    assert opened["version"].startswith(f"{version}.")
    class_name = opened["class"].removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    assert class_name.lower().replace("_", "") == model_type.replace("_", "")
    assert opened["dtype"] == "torch.float32"
    assert opened["difference"] < 1e-4
    with torch.no_grad():
        assert opened["generated"] == greedy(model, tokens(1)[:, :4], 12)  # with their cache
    # This package reads the copy that Transformers saved, bit for bit.
    again = exports[name].with_suffix(".again")
    architecture, config = hf.read_config(again)
    weights = hf.read_weights(again, architecture, config)
    assert same_model(config, model.config.model_copy(update={"vocab_size": N_VOCAB}))
    expected = without_padding(model.state_dict())
    assert all(torch.equal(value, expected[key]) for key, value in weights.items())


def same_model(one: ModelConfig, other: ModelConfig) -> bool:
    """Return True if two configurations compute the same; a file does not say how experts are balanced."""
    return first_difference(one, other) is first_difference(other, one) is None


def without_padding(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t[:N_VOCAB] if name in ("wte.weight", "head.weight") else t for name, t in tensors.items()}


def assert_same_gradients(tmp_path: Path, ours: GPT, theirs, n_vocab: int) -> None:
    """Compare logits, and gradients of all parameters: each side saves its gradients as if they were weights."""
    x_BT = tokens()
    weight_BTV = torch.randn(2, 24, n_vocab, generator=torch.Generator().manual_seed(3))
    logits_BTV, their_logits_BTV = ours.logits(x_BT)[..., :n_vocab], theirs(x_BT).logits
    torch.testing.assert_close(their_logits_BTV, logits_BTV, rtol=0, atol=1e-4)
    (logits_BTV * weight_BTV).sum().backward()
    (their_logits_BTV * weight_BTV).sum().backward()
    buffers = {name: tensor for name, tensor in ours.state_dict().items() if "ffn." in name}
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    hf.write_model(tmp_path / "ours", buffers | gradients, ours.config, end_of_text=5, n_vocab=n_vocab)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.grad is not None:  # a selection bias has none
                parameter.copy_(parameter.grad)
    theirs.save_pretrained(tmp_path / "theirs")
    mine, known = (load_file(tmp_path / side / "model.safetensors") for side in ("ours", "theirs"))
    assert mine.keys() == known.keys()
    for name, gradient in known.items():
        if gradient.numel():  # shared experts of width 0 have no elements
            assert gradient.norm() > 0, name
            assert (mine[name] - gradient).norm() < 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("n_vocab", [N_VOCAB, None], ids=["padding cut", "all rows"])
@pytest.mark.parametrize("name", CASES)
def test_an_export_has_equal_gradients(tmp_path, name, n_vocab):
    transformers = pytest.importorskip("transformers")
    model_type, options = CASES[name]
    model = build(options)
    assert (
        hf.write_model(tmp_path / "it", model.state_dict(), model.config, end_of_text=5, n_vocab=n_vocab) == model_type
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "it")
    assert theirs.get_input_embeddings().padding_idx is None  # or a token's embedding would get no gradient
    assert_same_gradients(tmp_path, model, theirs, n_vocab or 320)


THEIR_SIZES = {
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 40,
    "max_position_embeddings": 24,
}
DEEPSEEK = THEIR_SIZES | {
    "n_routed_experts": 4,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 2,
    "routed_scaling_factor": 2.5,
}
THEIRS = {  # configurations of Transformers with values that this package would not write
    "gpt2": (
        "GPT2Config",
        {"n_layer": 12, "n_head": 4, "n_embd": 32, "n_positions": 24, "n_inner": 40, "resid_pdrop": 0.3},
    ),
    "llama": (
        "LlamaConfig",
        {
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "hidden_size": 32,
            "intermediate_size": 40,
            "max_position_embeddings": 24,
            "rms_norm_eps": 1e-3,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": (
        "Qwen3Config",
        {
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "hidden_size": 32,
            "intermediate_size": 40,
            "head_dim": 6,
            "max_position_embeddings": 24,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 777.0},
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "hidden_size": 32,
            "intermediate_size": 40,
            "head_dim": 6,
            "max_position_embeddings": 24,
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "hidden_act": "gelu",
        },
    ),
    "mixtral": (
        "MixtralConfig",
        THEIR_SIZES | {"num_local_experts": 4, "sliding_window": 5, "router_jitter_noise": 0.1},
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        THEIR_SIZES
        | {
            "moe_num_experts": 4,
            "moe_k": 3,
            "moe_intermediate_size": 20,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 2,
            "pad_token_id": None,  # or the first token's embedding would get no gradient
        },
    ),
    "dots1": (
        "Dots1Config",
        DEEPSEEK | {"n_shared_experts": 2, "norm_topk_prob": True, "sliding_window": 4, "max_window_layers": 2},
    ),
    "glm4_moe": ("Glm4MoeConfig", DEEPSEEK | {"use_qk_norm": True, "partial_rotary_factor": 1.0, "head_dim": 6}),
    "deepseek_v3": (
        "DeepseekV3Config",
        DEEPSEEK
        | {
            "num_key_value_heads": None,
            "n_group": 1,
            "topk_group": 1,
            "kv_lora_rank": 12,
            "q_lora_rank": 14,
            "qk_rope_head_dim": 6,
            "qk_nope_head_dim": 10,
            "v_head_dim": 5,
        },
    ),
}


@pytest.mark.parametrize("model_type", THEIRS)
def test_a_model_of_transformers_is_read_with_equal_logits_and_gradients(tmp_path, model_type):
    transformers = pytest.importorskip("transformers")
    name, fields = THEIRS[model_type]
    config = getattr(transformers, name)(vocab_size=N_VOCAB, **fields)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = add_noise(transformers.AutoModelForCausalLM.from_config(config)).eval()
    theirs.save_pretrained(tmp_path / "it")
    architecture, config = hf.read_config(tmp_path / "it")
    ours = GPT(config)
    ours.load_state_dict(ours.state_dict() | hf.read_weights(tmp_path / "it", architecture, config))
    assert_same_gradients(tmp_path, ours, theirs, N_VOCAB)


@pytest.mark.parametrize("name", CASES)
def test_writing_and_reading_changes_no_bit(tmp_path, name):
    model = build(CASES[name][1])
    hf.write_model(tmp_path, model.state_dict(), model.config, end_of_text=5)
    architecture, config = hf.read_config(tmp_path)
    assert same_model(config, model.config)
    weights = hf.read_weights(tmp_path, architecture, config)
    assert weights.keys() == saved_names(name, model)
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items() if key in weights)


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_has_exactly_one_place_in_the_table_of_names(name):
    model = build(CASES[name][1])
    counts = {key: torch.zeros_like(model.state_dict()[key]) for key in saved_names(name, model)}
    names = hf.ARCHITECTURES[CASES[name][0]].names(model.config)
    for entry in names:
        for part in entry.parts(counts):
            part += 1
    assert all((count == 1).all() for count in counts.values())
    assert len({entry.theirs for entry in names}) == len(names)


def test_a_large_model_is_written_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(model_folder, "SHARD_BYTES", 20_000)
    model = build(CASES["qwen3_moe"][1])
    hf.write_model(tmp_path, model.state_dict(), model.config, end_of_text=5)
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    architecture, config = hf.read_config(tmp_path)
    weights = hf.read_weights(tmp_path, architecture, config)
    assert all(torch.equal(weights[key], value) for key, value in model.named_parameters())


def test_the_model_of_a_run_opens_with_its_tokenizer(config, tmp_path):
    transformers = pytest.importorskip("transformers")
    from training.train import train

    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32}
    assert train(config(model=sizes, steps=4)) == 0
    folder = tmp_path / "runs/small/model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "def f(x):\n    return x"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer) == 257  # without padding rows
    new = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert new.shape == (1, ids.shape[1] + 5)
    done = command(
        "-m", "training.generate", "--run", str(tmp_path / "runs/small"),
        "--prompt", text, "--tokens", "5", "--temperature", "0",
    )  # fmt: skip
    # `generate` starts a document with its end-of-text token.
    document = torch.cat([torch.tensor([[tokenizer.eos_token_id]]), ids], dim=1)
    theirs = model.generate(document, max_new_tokens=5, do_sample=False)[0, document.shape[1] :]
    assert done.stdout == text + tokenizer.decode(theirs) + "\n"


# --- the choice of an architecture ------------------------------------------------------------------

GPT2_UNSUPPORTED = [
    ({"blocks": [{"ffn": {"type": "moe"}}]}, "ffn.type: moe"),
    ({"blocks": [{"ffn": {"type": "mlp", "gated": True}}]}, "ffn.gated: True"),
    ({"blocks": [{}, {"ffn": {"type": "mlp", "hidden": 8}}]}, "ffn.hidden: 8"),
    ({"blocks": [{}, {"ffn": {"type": "mlp", "hidden": 3072}}]}, None),
    ({"blocks": [{"mixer": {"qk_norm": True}}]}, "mixer.qk_norm: True"),
    ({"blocks": [{"short_conv": 4}]}, "short_conv: 4"),
    ({"blocks": [{"mixer": {"n_kv_head": 4}}]}, "mixer.n_kv_head: 4"),
    ({"blocks": [{"mixer": {"n_kv_head": 12, "head_dim": 64}}]}, None),
    ({"blocks": [{"mixer": {"head_dim": 32}}]}, "mixer.head_dim: 32"),
    ({"blocks": [{"mixer": {"window": 8}}]}, "mixer.window: 8"),
    ({"blocks": [{"mixer": {"softcap": 50.0}}]}, "mixer.softcap: 50.0"),
    ({"blocks": [{"mixer": {"type": "latent"}}]}, "mixer.type: latent"),
    ({"blocks": [{}, {"mixer": {"type": "differential"}}]}, "mixer.type: differential"),
    ({"logit_softcap": 30.0}, "logit_softcap: 30.0"),
    ({"bigram_rows": 64}, "bigram_rows: 64"),
    ({"position": "rope"}, "position: rope"),
    ({"position": "none"}, "position: none"),
    ({"norm": "rmsnorm"}, "norm: rmsnorm"),
    ({"bias": False}, "bias: False"),
    ({"rope_theta": 5.0}, None),  # unused
    ({"isolate_documents": True}, None),
    ({}, None),
]
ALL_ROTARY = [
    ({"position": "learned"}, "position: learned"),
    ({"position": "none"}, "position: none"),
    ({"norm": "layernorm"}, "norm: layernorm"),
    ({"bias": True}, "bias: True"),
    ({"logit_softcap": 30.0}, "logit_softcap: 30.0"),
    ({"mixer": {"softcap": 50.0}}, "mixer.softcap: 50.0"),
    ({"mixer": {"rope": False}}, "mixer.rope: False"),
    ({"mixer": {"type": "latent", "qk_norm": None}}, "mixer.type: latent"),
    ({"mixer": {"type": "differential"}}, "mixer.type: differential"),
    ({"ffn": {"gated": False}}, "ffn.gated: False"),
    ({"second": {"mixer": {"n_kv_head": 1}}}, "mixer.n_kv_head: 1"),
    ({"isolate_documents": True}, None),
    ({"tie_head": False}, None),
    ({}, None),
]
DENSE = [*ALL_ROTARY, ({"ffn": MOE}, "ffn.type: moe"), ({"second": {"ffn": {"hidden": 8}}}, "ffn.hidden: 8")]
ROUTED = [  # changes of the architectures with experts, and the reason for each
    *ALL_ROTARY,
    ({"ffn": None}, "no layer has experts"),
    ({"an expert": {"ffn": {"top_k": 1}}}, "ffn.top_k: 2|ffn.top_k: 3"),
    ({"an expert": {"ffn": {"n_experts": 7}}}, "ffn.n_experts: 5"),
    ({"an expert": {"ffn": {"hidden": 7}}}, "ffn.hidden: 24"),
    ({"an expert": {"ffn": {"renormalize": False}}}, "ffn.renormalize: True|ffn.renormalize: False"),
    ({"an expert": {"ffn": {"n_shared": 5}}}, "ffn.n_shared: 0|ffn.n_shared: 2|ffn.n_shared: 5"),
    ({"an expert": {"ffn": {"route_scale": 3.0}}}, "ffn.route_scale: 1.7|ffn.route_scale: 3.0"),
    ({"an expert": {"ffn": {"activation": "gelu"}}}, "ffn.activation: gelu|ffn.activation: silu"),
    ({"an expert": {"ffn": {"z_loss_weight": 0.5, "jitter": 0.1, "capacity_factor": 1.5}}}, None),
]
DENSE_TOO = [
    ({"dense": {"ffn": {"hidden": 7}}}, "ffn.hidden: 40"),
    ({"dense": {"ffn": {"activation": "gelu"}}}, "ffn.activation: gelu"),
]
NO_BIAS = [
    ({"ffn": {"balance": "bias"}}, "ffn.balance: bias (a selection bias)"),
    ({"an expert": {"ffn": {"balance": "both"}}}, "ffn.balance: both (a selection bias)"),
    ({"an expert": {"ffn": {"balance": "switch"}}}, None),
    ({"ffn": {"n_shared": 1}}, "ffn.n_shared: 1"),
]
SOFTMAX = [
    ({"ffn": {"scoring": "sigmoid"}}, "ffn.scoring: sigmoid"),
    ({"ffn": {"route_scale": 2.5}}, "ffn.route_scale: 2.5"),
]
RENORMALIZED = ({"ffn": {"renormalize": False}}, "ffn.renormalize: False")
QK_NORM, NO_QK_NORM = ([({"mixer": {"qk_norm": value}}, f"mixer.qk_norm: {value}")] for value in (False, True))
ONE_WINDOW = [({"mixer": {"window": 5}}, None), ({"second": {"mixer": {"window": 5}}}, "mixer.window: 5")]
SOME_WINDOWS = [
    ({"second": {"mixer": {"window": 5}}}, None),
    ({"mixer": {"window": 4}, "second": {"mixer": {"window": 5}}}, "mixer.window: 5"),
]
NO_WINDOW = ({"second": {"mixer": {"window": 5}}}, "mixer.window: 5")
SIGMOIDS = [
    *DENSE_TOO,
    ({"ffn": {"scoring": "softmax"}}, "ffn.scoring: softmax"),
    ({"ffn": {"n_experts": 1, "top_k": 1}}, "n_experts: 1"),
    ({"fourth": {"ffn": GATED}}, "ffn.type: moe"),
    ({"ffn": {"renormalize": False, "route_scale": 0.3, "n_shared": 0}}, None),
    ({"ffn": {"balance": "none"}}, None),
]
UNSUPPORTED = {
    "llama": [*DENSE, *NO_QK_NORM, NO_WINDOW, ({"n_embd": 30}, "n_head 4 does not divide n_embd 30")],
    "qwen3": [*DENSE, *QK_NORM, *SOME_WINDOWS, ({"n_embd": 30}, None)],
    "qwen3_moe": [
        *(*ROUTED, *DENSE_TOO, *NO_BIAS, *SOFTMAX, *ONE_WINDOW, *QK_NORM),
        ({"ffn": {"renormalize": False}}, None),
    ],
    "mixtral": [
        *(*ROUTED, *NO_BIAS, *SOFTMAX, *ONE_WINDOW, RENORMALIZED, *NO_QK_NORM),
        ({"second": {"ffn": GATED}}, "ffn.type: mlp"),
    ],
    "ernie4_5_moe": [
        *(*ROUTED, *DENSE_TOO, *SOFTMAX, NO_WINDOW, RENORMALIZED, *NO_QK_NORM),
        ({"third": {"ffn": GATED}, "fourth": {"ffn": MOE}}, "ffn.type: mlp"),
        ({"first": {"ffn": MOE}}, None),
        ({"ffn": {"balance": "bias", "n_shared": 3}}, None),
    ],
    "dots1": [*ROUTED, *SIGMOIDS, *QK_NORM, *SOME_WINDOWS],
    "glm4_moe": [*ROUTED, *SIGMOIDS, NO_WINDOW, ({"mixer": {"qk_norm": True}}, None)],
    "deepseek_v3": [
        *(case for case in ROUTED if "mixer" not in case[0] and "second" not in case[0]),
        *(*SIGMOIDS, NO_WINDOW),
        ({"second": {"mixer": {"rope_dim": 6}}}, "mixer.rope_dim: 6"),
        ({"mixer": dict.fromkeys(LATENT) | {"type": "attention"}}, "mixer.type: attention"),
        ({"mixer": {"q_rank": None}}, None),
        ({"norm_eps": 1e-5}, "rms_norm_eps: 1e-05 is not supported, only 1e-06"),
    ],
}
# "d": a dense layer, "e": a layer of experts with the options of MOE and these.
LAYOUTS = {
    **dict.fromkeys(("llama", "qwen3"), ("dddd", {})),
    "qwen3_moe": ("eedd", {}),
    "mixtral": ("eeee", {}),
    "ernie4_5_moe": ("deed", {}),
    **dict.fromkeys(("dots1", "glm4_moe", "deepseek_v3"), ("ddee", SIGMOID)),
}


def changed_model(model_type: str, changes: dict) -> ModelConfig:
    """Return a model of four layers. `mixer` changes every layer, `ffn` all layers of experts if any; others one."""
    layout, routed = ("dddd", {}) if changes.get("ffn", ()) is None else LAYOUTS[model_type]
    mixer, ffn = changes.get("mixer", {}), changes.get("ffn") or {}
    base = {"head_dim": 12, "qk_norm": model_type in ("qwen3", "qwen3_moe", "dots1")}
    base = (LATENT if model_type == "deepseek_v3" else base) | mixer
    base = {key: value for key, value in base.items() if value is not None}
    places = dict(zip(("first", "second", "third", "fourth"), range(4), strict=True))
    places |= {"an expert": layout.find("e"), "dense": layout.find("d")}
    layers = []
    for i, kind in enumerate(layout):
        special = next((changes[name] for name, place in places.items() if name in changes and place == i), {})
        own = (ffn if kind == "e" or "e" not in layout or "gated" in ffn else {}) | special.get("ffn", {})
        complete = {} if "type" in own else MOE | routed if kind == "e" else GATED
        layers.append({"mixer": base | special.get("mixer", {}), "ffn": complete | own})
    options = {key: value for key, value in changes.items() if key not in {"mixer", "ffn", *places}}
    eps = {"norm_eps": 1e-6} if model_type == "deepseek_v3" else {}
    return ModelConfig.model_validate(ROTARY | {"n_layer": 4, "blocks": layers} | eps | options)


def test_the_first_option_that_an_architecture_does_not_have_is_named():
    cases = [("gpt2", {"n_layer": 2, "vocab_size": 320} | changes, words) for changes, words in GPT2_UNSUPPORTED]
    cases += [(model_type, *case) for model_type, group in UNSUPPORTED.items() for case in group]
    wrong = []
    for model_type, changes, words in cases:
        config = ModelConfig.model_validate(changes) if model_type == "gpt2" else changed_model(model_type, changes)
        reason = hf.ARCHITECTURES[model_type].reason_unsupported(config)
        reason = reason and re.sub(r" of layer \d+", "", reason)
        if reason not in ([None] if words is None else words.split("|")):
            wrong.append((model_type, changes, words, reason))
    assert len(cases) > 150 and wrong == []


def test_every_option_that_changes_a_logit_is_compared():
    """An option that `computed_options` leaves out would be lost in the export."""
    mixers = [{"type": "attention"}, {"type": "latent"}, {"type": "differential"}]
    ffns = [{"type": "mlp"}, {"type": "moe"}, {"type": "mlp"}]
    layers = [{"mixer": mixer, "ffn": ffn} for mixer, ffn in zip(mixers, ffns, strict=True)]
    config = ModelConfig.model_validate({"n_layer": 3, "position": "rope", "blocks": layers})
    expected = set(ModelConfig.model_fields) - {"blocks", "isolate_documents", "dropout"}
    for i, block in enumerate(config.blocks):
        for part in ("mixer", "ffn"):
            fields = set(type(getattr(block, part)).model_fields) - BALANCING
            expected |= {f"{part}.{name} of layer {i}" for name in fields}
        expected |= {f"{name} of layer {i}" for name in set(type(block).model_fields) - {"repeat", "mixer", "ffn"}}
    assert computed_options(config).keys() == expected


def test_an_export_of_an_earlier_version_opens():
    """Its config.json lacks newer options."""
    config = ModelConfig(n_layer=1, n_head=2, n_embd=16, n_positions=8, vocab_size=10, position="rope")
    fields = CustomArchitecture().to_hf(config)
    del fields["dropout"], fields["bigram_rows"], fields["blocks"][0]["short_conv"]
    assert ModelConfig.model_validate(CustomArchitecture().from_hf(fields)) == config
    del fields["rope_theta"]
    with pytest.raises(UserError, match="rope_theta is missing"):
        CustomArchitecture().from_hf(fields)


@pytest.mark.parametrize("name", CASES)
def test_each_model_has_one_architecture(name):
    config = ModelConfig.model_validate(CASES[name][1])
    expressing = [kind for kind, one in hf.ARCHITECTURES.items() if one.reason_unsupported(config) is None]
    assert expressing == [CASES[name][0], *ALSO.get(name, [])]


@pytest.mark.parametrize("name", ALSO)
def test_a_model_of_two_architectures_is_the_same_in_both(tmp_path, monkeypatch, name):
    transformers = pytest.importorskip("transformers")
    (other,) = ALSO[name]
    others = {kind: one for kind, one in hf.ARCHITECTURES.items() if kind != CASES[name][0]}
    monkeypatch.setattr(model_folder, "ARCHITECTURES", others)
    model = build(CASES[name][1])
    assert hf.write_model(tmp_path, model.state_dict(), model.config, end_of_text=5) == other
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs(tokens()).logits, model.logits(tokens()), rtol=0, atol=1e-4)


def test_any_other_model_is_written_under_our_own_names(tmp_path):
    model = build(SIZES | {"blocks": [{"ffn": {"type": "moe", "hidden": 8}}]})
    assert hf.write_model(tmp_path, model.state_dict(), model.config, end_of_text=5) == "training_gpt"
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["model_type"] == "training_gpt"
    again = GPT(ModelConfig.model_validate({k: fields[k] for k in ModelConfig.model_fields}, strict=False))
    tensors = load_file(tmp_path / "model.safetensors")
    again.load_state_dict({name.removeprefix("gpt."): tensor for name, tensor in tensors.items()})
    x = torch.randint(0, 320, (1, 24), generator=torch.Generator().manual_seed(2))
    assert torch.equal(again.logits(x), model.logits(x))
    architecture, config = hf.read_config(tmp_path)
    assert config == model.config
    read = hf.read_weights(tmp_path, architecture, config)
    assert all(torch.equal(read[name], tensor) for name, tensor in model.state_dict().items())


def test_fields_are_spelled_for_both_versions(exports):
    """One version reads fields that the other does not, and other programs read either."""
    written = {name: json.loads((folder / "config.json").read_text()) for name, folder in exports.items()}
    assert all(fields["bos_token_id"] == fields["eos_token_id"] == 256 for fields in written.values())
    for name, folder in exports.items():
        generation = json.loads((folder / "generation_config.json").read_text())
        ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 256)
        assert generation == ids | {"max_length": 25}  # the context of 24, and the token that follows it
        if CASES[name][0] != "gpt2":
            assert written[name]["rope_parameters"] == {
                "rope_theta": written[name]["rope_theta"],
                "rope_type": "default",
            }
    moe = written["qwen3_moe, dense layers"]
    assert (moe["num_experts"], moe["num_local_experts"], moe["mlp_only_layers"]) == (5, 5, [0])
    windows = written["qwen3, windows in some layers"]
    assert windows["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]
    assert written["qwen3_moe"]["sliding_window"] is None and not written["qwen3_moe"]["use_sliding_window"]
    for name in ("dots1", "glm4_moe", "deepseek_v3"):  # read by other programs, not by Transformers
        fields = {key: written[name][key] for key in ("scoring_func", "topk_method", "moe_layer_freq")}
        assert fields == {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
    assert (written["ernie4_5_moe"]["moe_layer_start_index"], written["ernie4_5_moe"]["moe_layer_end_index"]) == (1, 2)


def test_a_selection_bias_that_the_run_does_not_balance_is_not_lost(tmp_path):
    """A run without bias balancing may start from weights with a selection bias."""
    model = build(CASES["qwen3_moe"][1])
    model.blocks[1].ffn.selection_bias[2] = 0.1
    assert hf.write_model(tmp_path, model.state_dict(), model.config, end_of_text=5) == "training_gpt"
    read = hf.read_weights(tmp_path, *hf.read_config(tmp_path))
    assert torch.equal(read["blocks.1.ffn.selection_bias"], model.blocks[1].ffn.selection_bias)


def test_layers_become_the_shortest_pattern():
    shortest = {"aaaa": "1a", "abab": "1a1b", "abba": "1a2b", "abb": "1a2b", "aaab": "3a1b", "a": "1a"}
    for layers, expected in shortest.items():
        blocks = pattern([{"ffn": letter} for letter in layers])
        assert "".join(f"{block['repeat']}{block['ffn']}" for block in blocks) == expected


# --- config.json, read -----------------------------------------------------------------------------


class Recording(dict):
    """A dictionary that records which keys are read."""

    def __init__(self, content: dict):
        super().__init__(content)
        self.read: set[str] = set()

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.read.add(key)
        return super().get(key, default)

    def __contains__(self, key) -> bool:
        self.read.add(key)
        return super().__contains__(key)

    def __or__(self, other):
        return self._merged({**self, **other})

    def __ror__(self, other):
        return self._merged({**other, **self})

    def _merged(self, content: dict) -> "Recording":
        merged = Recording(content)
        merged.read = self.read
        return merged


# Fields that change no logit: generation, initial values, dropout (this package has none), other heads, and the choice
# between equal implementations.
HARMLESS = {
    *("model_type", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "pretraining_tp"),
    *("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout", "reorder_and_upcast_attn"),
    *("summary_type", "summary_use_proj", "summary_activation", "summary_first_dropout", "summary_proj_to_labels"),
    *("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
    *("num_nextn_predict_layers", "num_mtp_layers"),  # multi-token prediction by further layers
}


@pytest.mark.parametrize("version", [4, 5])
def test_every_field_of_transformers_is_read_or_known_to_be_harmless(request, exports, version):
    opened = request.getfixturevalue(f"opened_by_{version}")
    for model_type in THEIRS:
        read = set()
        for name in (name for name, case in CASES.items() if case[0] == model_type):
            written = json.loads((exports[name] / "config.json").read_text())
            for left_out in ("nothing", "layer_types"):
                fields = Recording({key: value for key, value in written.items() if key != left_out})
                hf.ARCHITECTURES[model_type].from_hf(fields)
                read |= fields.read
        assert set(opened[name]["fields"]) - read <= HARMLESS, model_type


@pytest.mark.parametrize("version", [4, 5])
def test_defaults_of_missing_fields_are_those_of_transformers(request, version):
    opened = request.getfixturevalue(f"opened_by_{version}")
    for name in (next(name for name, case in CASES.items() if case[0] == model_type) for model_type in THEIRS):
        architecture, expected = hf.ARCHITECTURES[CASES[name][0]], opened[name]["defaults"]
        defaults = gpt2.DEFAULTS if CASES[name][0] == "gpt2" else llama.DEFAULTS | architecture.defaults
        for field, value in defaults.items():
            if field == "sliding_window" and "use_sliding_window" in defaults:  # shown as null while that is false
                continue
            if field == "moe_layer_end_index":  # shown as the last layer
                value = expected["num_hidden_layers"] - 1
            assert expected[field] == value, (name, field)
        if CASES[name][0] != "gpt2":
            theta = expected["rope_theta"] if version == 4 else expected["rope_parameters"]["rope_theta"]
            assert theta == architecture.rope_theta, name


def test_activations_have_the_names_of_transformers():
    activations = pytest.importorskip("transformers").activations
    from training.model.layers import ACTIVATIONS as OURS

    x = torch.linspace(-5, 5, 101)
    for theirs, ours in ACTIVATIONS.items():
        torch.testing.assert_close(activations.ACT2FN[theirs](x), OURS[ours](x), rtol=0, atol=1e-6)


REFUSED = [
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: True"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights: False"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention: True"),
    ("gpt2", {"activation_function": "tanh"}, "activation_function: 'tanh'"),
    ("gpt2", {"n_inner": "wide"}, "n_inner: 'wide' is not a whole number"),
    ("gpt2", {"n_embd": None}, "n_embd is missing"),
    ("gpt2", {"n_head": True}, "n_head: True is not a whole number"),
    ("gpt2", {"n_head": 5}, "n_head: 5 heads do not divide n_embd 32"),
    ("gpt2", {"n_layer": 0}, "n_layer: "),
    ("gpt2", {"n_layer": 10**9}, "n_layer: 1000000000 is too large"),
    ("gpt2", {"vocab_size": 10**30}, "vocab_size: 1000000000000000000000000000000 is too large"),
    ("gpt2", {"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon: '1e-5' is not a number"),
    ("gpt2", {"tie_word_embeddings": 1}, "tie_word_embeddings: 1 is not true or false"),
    ("gpt2", {"quantization_config": {"bits": 4}}, "quantization_config: "),
    ("gpt2", {"pruned_heads": {"0": [1]}}, "pruned_heads: "),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling: "),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: "),
    ("llama", {"rope_scaling": {"type": ["linear"]}}, "rope_scaling: "),
    ("llama", {"rope_scaling": 2.0}, "rope_scaling: "),
    ("qwen3", {"num_hidden_layers": 0, "layer_types": []}, "n_layer: "),
    ("llama", {"rope_parameters": {"rope_theta": 500.0, "rope_type": "yarn"}}, "rope_parameters: "),
    ("llama", {"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}}, "rope_parameters: "),
    ("llama", {"rope_theta": 9.0}, "rope_theta: 9 and rope_parameters.rope_theta: 500 differ"),
    ("llama", {"attention_bias": True}, "attention_bias: True"),
    ("llama", {"mlp_bias": True}, "mlp_bias: True"),
    ("llama", {"hidden_act": "relu"}, "hidden_act: 'relu'"),
    ("llama", {"sliding_window": 5}, "sliding_window: 5"),
    ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: 50.0"),
    ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping: 30.0"),
    ("llama", {"is_causal": False}, "is_causal: False"),
    ("llama", {"per_layer_config": {"0": {"hidden_size": 5}}}, "per_layer_config: "),
    ("llama", {"num_key_value_heads": 3}, "n_kv_head: 3 does not divide n_head 4"),
    ("qwen3", {"layer_types": ["full_attention"]}, "layer_types: "),
    ("qwen3", {"layer_types": ["linear_attention"] * 3}, "layer_types: "),
    ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "layer_types: sliding_attention without"),
    ("qwen3", {"attention_bias": True}, "attention_bias: True"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 0, "layer_types": None, "max_window_layers": 0}, "window"),
    ("qwen3_moe", {"num_experts": 3}, "num_experts: 3 and num_local_experts: 5 differ"),
    ("qwen3_moe", {"num_experts": None, "num_local_experts": None}, "num_experts is missing"),
    ("qwen3_moe", {"num_experts_per_tok": 9}, "top_k: 9 is more than n_experts 5"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step: 0"),
    ("qwen3_moe", {"mlp_only_layers": 3}, "mlp_only_layers: 3 is not a list"),
    ("qwen3_moe", {"layer_types": ["full_attention"] * 3}, "layer_types: "),
    ("mixtral", {"num_experts": 3}, "num_local_experts: 5 and num_experts: 3 differ"),
    ("mixtral", {"num_local_experts": None}, "num_local_experts is missing"),
    ("mixtral", {"num_experts_per_tok": 6}, "top_k: 6 is more than n_experts 5"),
    ("mixtral", {"num_experts_per_tok": None}, "num_experts_per_tok is missing"),
    ("mixtral", {"intermediate_size": 24.0}, "intermediate_size: 24.0 is not a whole number"),
    ("mixtral", {"sliding_window": 0}, "window"),
    ("mixtral", {"layer_types": ["sliding_attention"] * 3}, "layer_types: "),
    ("mixtral", {"attention_bias": True}, "attention_bias: True"),
    ("mixtral", {"rope_theta": 1e6}, "rope_theta: 1e+06 and rope_parameters.rope_theta: 10000 differ"),
    ("ernie4_5_moe", {"use_bias": True}, "use_bias: True"),
    ("ernie4_5_moe", {"moe_norm_min": 1e-3}, "moe_norm_min: 0.001"),
    ("ernie4_5_moe", {"moe_layer_interval": 2}, "moe_layer_interval: 2"),
    ("ernie4_5_moe", {"moe_layer_start_index": None}, "moe_layer_start_index is missing"),
    ("ernie4_5_moe", {"num_experts": 9}, "moe_num_experts: 5 and num_experts: 9 differ"),
    ("ernie4_5_moe", {"num_experts_per_tok": 1}, "moe_k: 3 and num_experts_per_tok: 1 differ"),
    ("ernie4_5_moe", {"moe_num_shared_experts": -1}, "n_shared"),
    ("ernie4_5_moe", {"sliding_window": 5}, "sliding_window: 5"),
    *(
        (model_type, *case)
        for model_type in ("dots1", "glm4_moe", "deepseek_v3")
        for case in (
            ({"n_group": 2}, "n_group: 2"),
            ({"topk_group": 2}, "topk_group: 2"),
            ({"scoring_func": "softmax"}, "scoring_func: 'softmax'"),
            ({"topk_method": "greedy"}, "topk_method: 'greedy'"),
            ({"moe_layer_freq": 2}, "moe_layer_freq: 2"),
            ({"attention_bias": True}, "attention_bias: True"),
            ({"n_shared_experts": None}, "n_shared_experts is missing"),
            ({"n_routed_experts": None}, "n_routed_experts is missing"),
            ({"num_local_experts": 9}, "n_routed_experts: 5 and num_local_experts: 9 differ"),
            ({"routed_scaling_factor": 0}, "route_scale"),
            ({"routed_scaling_factor": "1.7"}, "routed_scaling_factor: '1.7' is not a number"),
            ({"first_k_dense_replace": True}, "first_k_dense_replace: True is not a whole number"),
            ({"norm_topk_prob": None}, "norm_topk_prob is missing"),
            ({"rope_scaling": {"type": "yarn", "factor": 40}}, "rope_scaling: "),
            ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
        )
    ),
    ("dots1", {"layer_types": ["sliding_attention"] * 4}, "layer_types: sliding_attention without"),
    ("dots1", {"layer_types": ["chunked_attention"] * 4}, "layer_types: "),
    ("glm4_moe", {"partial_rotary_factor": None}, "partial_rotary_factor is missing, which means 0.5"),
    ("glm4_moe", {"use_qk_norm": 1}, "use_qk_norm: 1 is not true or false"),
    ("glm4_moe", {"sliding_window": 5}, "sliding_window: 5"),
    ("deepseek_v3", {"rope_interleave": False}, "rope_interleave: False"),
    ("deepseek_v3", {"rms_norm_eps": 1e-5}, "rms_norm_eps: 1e-05 is not supported, only 1e-06"),
    ("deepseek_v3", {"num_key_value_heads": 3}, "num_key_value_heads: 3 is not supported, only 6"),
    ("deepseek_v3", {"head_dim": 16}, "head_dim: 16 is not supported, only 8"),
    ("deepseek_v3", {"qk_head_dim": 10}, "qk_head_dim: 10 is not supported, only 18"),
    ("deepseek_v3", {"v_head_dim": None}, "v_head_dim is missing"),
    ("deepseek_v3", {"q_lora_rank": "no"}, "q_lora_rank: 'no' is not a whole number"),
    ("deepseek_v3", {"qk_rope_head_dim": 7}, "rope_dim"),
    ("deepseek_v3", {"layer_types": ["full_attention"] * 4}, "layer_types: "),
]


def test_a_field_that_is_not_supported_is_an_error_that_names_it(tmp_path):
    path, wrong = tmp_path / "config.json", []
    for model_type, changes, words in REFUSED:
        name = next(name for name, case in CASES.items() if case[0] == model_type)
        model = ModelConfig.model_validate(CASES[name][1])
        fields = {"model_type": model_type} | hf.ARCHITECTURES[model_type].to_hf(model)
        path.write_text(json.dumps(fields))
        assert same_model(hf.read_config(tmp_path)[1], model)
        path.write_text(json.dumps(fields | changes))
        try:
            hf.read_config(tmp_path)
            message = "nothing"
        except UserError as error:
            message = str(error)
        if not message.startswith(f"{path}: ") or words not in message or "\n" in message:
            wrong.append((model_type, changes, words, message))
    assert len(REFUSED) > 100 and wrong == []


def test_max_window_layers_says_which_layers_have_the_window(tmp_path):
    """Older files have no layer_types."""
    transformers = pytest.importorskip("transformers")
    for first in range(4):
        fields = THEIRS["qwen3"][1] | {"max_window_layers": first}
        transformers.Qwen3Config(**fields).save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        _, with_types = hf.read_config(tmp_path)
        del written["layer_types"]
        (tmp_path / "config.json").write_text(json.dumps(written))
        assert hf.read_config(tmp_path)[1] == with_types
        assert [block.mixer.window for block in with_types.layers()] == [None] * first + [4] * (3 - first)


def test_a_file_of_few_fields_is_completed_by_defaults(tmp_path):
    """The first LLaMA files have no num_key_value_heads and no rope_theta; the first GPT-2 files no n_inner."""
    fields = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    fields |= {"intermediate_size": 40, "max_position_embeddings": 24, "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    _, config = hf.read_config(tmp_path)
    assert (config.rope_theta, config.norm_eps, config.tie_head) == (10_000.0, 1e-6, False)
    assert config.blocks[0].mixer.n_kv_head is None and config.blocks[0].ffn.activation == "silu"
    fields = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 24, "n_ctx": 24, "vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps(fields | {"model_type": "gpt2", "resid_pdrop": 0.1}))
    _, config = hf.read_config(tmp_path)
    assert same_model(config, ModelConfig.model_validate(SIZES | {"vocab_size": 300}))


# --- weights, read ---------------------------------------------------------------------------------


def test_gpt2s_first_files_are_read(tmp_path):
    """openai-community/gpt2 has no prefix, and holds the causal masks and the tied head as well."""
    model = build(SIZES)
    hf.write_model(tmp_path, model.state_dict(), model.config, end_of_text=5)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for i in range(2):
        old |= {f"h.{i}.attn.bias": torch.ones(1, 1, 24, 24).tril(), f"h.{i}.attn.masked_bias": torch.tensor(-1e4)}
    old["lm_head.weight"] = old["wte.weight"].clone()
    save_file(old, tmp_path / "model.safetensors")
    architecture, config = hf.read_config(tmp_path)
    weights = hf.read_weights(tmp_path, architecture, config)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_bf16_weights_are_read_exactly(tmp_path):
    model = build(CASES["llama"][1])
    hf.write_model(tmp_path, model.state_dict(), model.config, end_of_text=5, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    weights = hf.read_weights(tmp_path, *hf.read_config(tmp_path))
    assert all(torch.equal(weights[name], tensor.bfloat16().float()) for name, tensor in model.named_parameters())


def test_a_selection_bias_is_not_rounded(tmp_path):
    """Its steps of bias_rate are too small for bf16."""
    transformers = pytest.importorskip("transformers")
    model = build(CASES["dots1"][1])
    hf.write_model(tmp_path, model.state_dict(), model.config, end_of_text=5, dtype=torch.bfloat16)
    weights = hf.read_weights(tmp_path, *hf.read_config(tmp_path))
    for name, tensor in model.state_dict().items():
        if not name.endswith("ffn.load"):
            assert torch.equal(weights[name], tensor if "selection_bias" in name else tensor.bfloat16().float())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    bias = theirs.model.layers[2].mlp.gate.e_score_correction_bias
    assert torch.equal(bias, model.blocks[2].ffn.selection_bias)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        ({"model.layers.2.mlp.gate.e_score_correction_bias": None}, "missing tensors"),
        ({"model.layers.2.mlp.shared_experts.up_proj.weight": None}, "missing tensors"),
        ({"model.layers.2.mlp.shared_experts.up_proj.weight": (24, 32)}, r"has shape \(24, 32\); config.json needs"),
        ({"model.layers.0.mlp.gate.e_score_correction_bias": (5,)}, "unknown tensors"),
        ({"model.layers.4.mlp.gate.weight": (5, 32)}, "unknown tensors"),  # multi-token prediction
        ({"model.layers.2.mlp.gate.e_score_correction_bias": (1, 5)}, r"has shape \(1, 5\); config.json needs \(5,\)"),
    ],
    ids=str,
)
def test_weights_that_do_not_fit_config_json_are_an_error(tmp_path, harm, reason):
    model = build(CASES["dots1"][1])
    hf.write_model(tmp_path, model.state_dict(), model.config, end_of_text=5)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {name: torch.ones(shape) for name, shape in harm.items() if shape is not None}
    save_file({k: v for k, v in tensors.items() if harm.get(k, ()) is not None}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=reason):
        hf.read_weights(tmp_path, *hf.read_config(tmp_path))

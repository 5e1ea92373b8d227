"""Models go out to Transformers, of both versions, and come in from it: the same logits, gradients and bits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command, environment
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.config import AttentionConfig, BlockConfig, LatentConfig, MLPConfig, ModelConfig, MoEConfig
from training.errors import UserError
from training.model import GPT, init_weights
from training.weights import hf
from training.weights.hf import deepseek, ernie, files, gpt2, llama, mixtral, qwen3
from training.weights.hf.fields import ACTIVATIONS
from training.weights.hf.layers import pattern, with_explicit_sizes

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
SIX = ROTARY | {"n_layer": 4, "n_head": 6, "rope_theta": 700.0, "norm_eps": 1e-6}  # heads, which do not divide n_embd
# By the dense layers before and after those with experts.
DENSE_FIRST = [{"ffn": GATED}, {"ffn": SIGMOID, "repeat": 3}]

# What it is written as, and what differs from the sizes above.
CASES: dict[str, tuple[str, dict]] = {
    "gpt2, 12 layers": ("gpt2", SIZES | {"n_layer": 12}),
    "gpt2, untied": ("gpt2", SIZES | {"tie_head": False}),
    "gpt2, large epsilon": ("gpt2", SIZES | {"norm_eps": 1e-3}),
    "gpt2, exact gelu": ("gpt2", SIZES | {"blocks": [{"ffn": {"type": "mlp", "hidden": 48, "activation": "gelu"}}]}),
    "gpt2, relu2": ("gpt2", SIZES | {"blocks": [{"ffn": {"type": "mlp", "activation": "relu2"}}]}),
    "llama": ("llama", ROTARY | {"blocks": [{"ffn": GATED}], "rope_theta": 500.0}),
    "llama, grouped, untied": (
        "llama",
        ROTARY | {"tie_head": False, "norm_eps": 1e-3, "blocks": [{"mixer": GROUPED, "ffn": GATED}]},
    ),
    "llama, gelu": ("llama", ROTARY | {"blocks": [{"ffn": GATED | {"activation": "gelu_tanh"}}]}),
    "qwen3": ("qwen3", ROTARY | {"blocks": [{"mixer": NORMED, "ffn": GATED}]}),
    "qwen3, windows in some layers": (
        "qwen3",
        ROTARY
        | {
            "tie_head": False,
            "rope_theta": 1e6,
            "n_embd": 30,
            "blocks": [{"mixer": NORMED | {"window": 5}, "ffn": GATED}, {"mixer": NORMED, "ffn": GATED}],
        },
    ),
    "qwen3, windows everywhere": ("qwen3", ROTARY | {"blocks": [{"mixer": NORMED | {"window": 6}, "ffn": GATED}]}),
    "qwen3_moe": ("qwen3_moe", ROTARY | {"blocks": [{"mixer": NORMED, "ffn": MOE}]}),
    "qwen3_moe, dense layers": (
        "qwen3_moe",
        ROTARY
        | {
            "tie_head": False,
            "blocks": [
                {"mixer": NORMED | {"window": 7}, "ffn": GATED},
                {"mixer": NORMED | {"window": 7}, "ffn": MOE | {"renormalize": False}, "repeat": 2},
            ],
        },
    ),
    "mixtral": ("mixtral", ROTARY | {"blocks": [{"mixer": GROUPED, "ffn": MOE}]}),
    "mixtral, windows": (
        "mixtral",
        SIX | {"tie_head": False, "blocks": [{"mixer": GROUPED | {"window": 7}, "ffn": MOE | {"activation": "gelu"}}]},
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        SIX
        | {
            "blocks": [
                {"mixer": GROUPED, "ffn": GATED},
                {"mixer": GROUPED, "ffn": BALANCED, "repeat": 2},
                {"mixer": GROUPED, "ffn": GATED},
            ]
        },
    ),
    "ernie4_5_moe, no shared experts": (
        "ernie4_5_moe",
        ROTARY | {"tie_head": False, "blocks": [{"mixer": GROUPED, "ffn": BALANCED | {"n_shared": 0}}]},
    ),
    "dots1": ("dots1", SIX | {"blocks": [{"mixer": NORMED} | block for block in DENSE_FIRST]}),
    "dots1, windows in some layers": (
        "dots1",
        ROTARY
        | {
            "tie_head": False,
            "blocks": [
                {"mixer": NORMED | {"window": 5}, "ffn": SIGMOID | {"n_shared": 1, "renormalize": False}},
                {"mixer": NORMED, "ffn": SIGMOID | {"n_shared": 1, "renormalize": False}},
            ],
        },
    ),
    "dots1, no shared experts": ("dots1", ROTARY | {"blocks": [{"mixer": NORMED, "ffn": SIGMOID | {"n_shared": 0}}]}),
    "glm4_moe": ("glm4_moe", SIX | {"blocks": [{"mixer": GROUPED} | block for block in DENSE_FIRST]}),
    "glm4_moe, untied": ("glm4_moe", ROTARY | {"tie_head": False, "blocks": [{"mixer": GROUPED, "ffn": SIGMOID}]}),
    "deepseek_v3": ("deepseek_v3", SIX | {"blocks": [{"mixer": LATENT} | block for block in DENSE_FIRST]}),
    "deepseek_v3, whole queries": (
        "deepseek_v3",
        ROTARY
        | {
            "norm_eps": 1e-6,
            "tie_head": False,
            "blocks": [
                {
                    "mixer": LATENT | {"q_rank": None, "head_dim": None, "value_dim": None},
                    "ffn": SIGMOID | {"renormalize": False, "n_shared": 0},
                }
            ],
        },
    ),
}
BIASED = {"ernie4_5_moe", "dots1", "glm4_moe", "deepseek_v3"}  # those with a place for a selection bias
ALSO = {  # cases that another expresses just as well
    "mixtral": ["ernie4_5_moe"],
    "dots1": ["glm4_moe"],
    "dots1, no shared experts": ["glm4_moe"],
}
N_VOCAB = 300

# Of shared experts that there are not; torch says so when it would give them initial values.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")


def perturbed(model: GPT) -> GPT:
    """No bias zero, no norm one: what is initialised trivially hides mistakes."""
    generator = torch.Generator().manual_seed(1)
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    for tensor in [*model.parameters(), *biases]:
        tensor.data += 0.1 * torch.randn(tensor.shape, generator=generator)
    return model


def made(options: dict) -> GPT:
    """A model with nothing trivial in it; where its balance moves a selection bias, that rules many a choice."""
    model = perturbed(init_weights(GPT(ModelConfig.model_validate(options)), 0))
    generator = torch.Generator().manual_seed(4)
    for ffn in (block.ffn for block in model.blocks):
        if getattr(ffn, "section", None) is not None and ffn.section.balance in ("bias", "both"):
            ffn.router.weight.data *= 3  # or a few experts would have all tokens, and others no gradient
            ffn.selection_bias += 0.1 * torch.randn(ffn.selection_bias.shape, generator=generator)
    return model


def kept(name: str, model: GPT) -> set[str]:
    """The tensors of a case's model that are in a file."""
    biases = {key for key in model.state_dict() if key.endswith("selection_bias") and CASES[name][0] in BIASED}
    return {key for key, _ in model.named_parameters()} | biases


def tokens(rows: int = 2) -> Tensor:
    return torch.randint(0, N_VOCAB, (rows, 24), generator=torch.Generator().manual_seed(2))


def greedy(model: GPT, x_BT: Tensor, n: int) -> list[int]:
    """The likeliest continuation among the first N_VOCAB tokens, without a cache."""
    for _ in range(n):
        x_BT = torch.cat([x_BT, model.logits(x_BT)[:, -1:, :N_VOCAB].argmax(-1)], dim=1)
    return x_BT[0, -n:].tolist()


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, Path]:
    """Every case's model in a folder, its padding rows cut, and what it computes beside that."""
    root, folders = tmp_path_factory.mktemp("exports"), {}
    for n, (name, (_, options)) in enumerate(CASES.items()):
        model, folders[name] = made(options), root / f"case-{n}"
        hf.write_model(folders[name], model.state_dict(), model.config, end_of_text=5, n_vocab=N_VOCAB)
        with torch.no_grad():
            logits_BTV = model.logits(tokens())[..., :N_VOCAB].contiguous()
        save_file({"x_BT": tokens(), "logits_BTV": logits_BTV}, folders[name].with_suffix(".expected"))
    return folders


@pytest.fixture(scope="module")
def opened_by_4(exports) -> dict[str, dict]:
    """What Transformers 4.57 makes of the exports."""
    if not V4.is_dir():
        pytest.skip(f"no Transformers 4.57 in {V4}; the Makefile installs it")
    done = subprocess.run(
        [sys.executable, "tests/opener.py", *map(str, exports.values())],
        cwd=ROOT, env=environment() | {"PYTHONPATH": str(V4)}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(exports, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.fixture(scope="module")
def opened_by_5(exports) -> dict[str, dict]:
    """What the Transformers that is installed makes of them."""
    pytest.importorskip("transformers")
    from opener import opened

    return {name: opened(folder) for name, folder in exports.items()}


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("name", CASES)
def test_an_export_opens_with_equal_logits_in_both_versions(request, exports, name, version):
    found = request.getfixturevalue(f"opened_by_{version}")[name]
    model_type, options = CASES[name]
    model = made(options)
    assert found["version"].startswith(f"{version}.")
    named = found["class"].removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    assert named.lower().replace("_", "") == model_type.replace("_", "")
    assert found["dtype"] == "torch.float32"
    assert found["difference"] < 1e-4
    with torch.no_grad():
        assert found["generated"] == greedy(model, tokens(1)[:, :4], 12)  # theirs with their cache
    # What they save is read back to the bit.
    again = exports[name].with_suffix(".again")
    architecture, config = hf.read_config(again, hf.READABLE)
    weights = hf.read_weights(again, architecture, config)
    assert same_model(config, model.config.model_copy(update={"vocab_size": N_VOCAB}))
    assert all(torch.equal(weights[key], value) for key, value in cut(model.state_dict()).items() if key in weights)


def same_model(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether two configurations compute the same; how experts are balanced is not in a file."""

    def plain(config: ModelConfig) -> tuple:
        layers = [block.model_dump() for block in with_explicit_sizes(config)]
        for layer in layers:
            for name in ("balance", "switch_weight", "bias_rate", "z_loss_weight", "jitter", "capacity_factor"):
                layer["ffn"].pop(name, None)
        return config.model_dump(exclude={"blocks"}), layers

    return plain(one) == plain(other)


def cut(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t[:N_VOCAB] if name in ("wte.weight", "head.weight") else t for name, t in tensors.items()}


def assert_same_gradients(tmp_path: Path, ours: GPT, theirs, n_vocab: int) -> None:
    """Logits, and gradients of all parameters: a gradient is as a model is, so each side writes its own as one."""
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
            if parameter.grad is not None:  # unlike a selection bias's
                parameter.copy_(parameter.grad)
    theirs.save_pretrained(tmp_path / "theirs")
    mine, known = (load_file(tmp_path / side / "model.safetensors") for side in ("ours", "theirs"))
    assert mine.keys() == known.keys()
    for name, gradient in known.items():
        if gradient.numel():  # unlike a shared expert that there is not
            assert gradient.norm() > 0, name
            assert (mine[name] - gradient).norm() < 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("n_vocab", [N_VOCAB, None], ids=["padding cut", "all rows"])
@pytest.mark.parametrize("name", CASES)
def test_an_export_has_equal_gradients(tmp_path, name, n_vocab):
    transformers = pytest.importorskip("transformers")
    model_type, options = CASES[name]
    model = made(options)
    assert (
        hf.write_model(tmp_path / "it", model.state_dict(), model.config, end_of_text=5, n_vocab=n_vocab) == model_type
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "it")
    assert theirs.get_input_embeddings().padding_idx is None  # a token whose embedding would take none
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
THEIRS = {  # their own configurations, with fields that are not what we would write
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
            "pad_token_id": None,  # or the first token's embedding would take no gradient
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
def test_their_model_comes_in_with_equal_logits_and_gradients(tmp_path, model_type):
    transformers = pytest.importorskip("transformers")
    name, fields = THEIRS[model_type]
    config = getattr(transformers, name)(vocab_size=N_VOCAB, **fields)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = perturbed(transformers.AutoModelForCausalLM.from_config(config)).eval()
    theirs.save_pretrained(tmp_path / "it")
    architecture, config = hf.read_config(tmp_path / "it", hf.READABLE)
    ours = GPT(config)
    ours.load_state_dict(ours.state_dict() | hf.read_weights(tmp_path / "it", architecture, config))
    assert_same_gradients(tmp_path, ours, theirs, N_VOCAB)


@pytest.mark.parametrize("name", CASES)
def test_out_and_in_again_changes_no_bit(tmp_path, name):
    model = made(CASES[name][1])
    hf.write_model(tmp_path, model.state_dict(), model.config, end_of_text=5)
    architecture, config = hf.read_config(tmp_path, hf.READABLE)
    assert same_model(config, model.config)
    found = hf.read_weights(tmp_path, architecture, config)
    assert found.keys() == kept(name, model)
    assert all(torch.equal(found[key], value) for key, value in model.state_dict().items() if key in found)


@pytest.mark.parametrize("name", CASES)
def test_a_table_of_names_has_a_place_for_everything_once(name):
    model = made(CASES[name][1])
    counts = {key: torch.zeros_like(model.state_dict()[key]) for key in kept(name, model)}
    names = hf.ARCHITECTURES[CASES[name][0]].names(model.config)
    for entry in names:
        for part in entry.parts(counts):
            part += 1
    assert all((count == 1).all() for count in counts.values())
    assert len({entry.theirs for entry in names}) == len(names)


def test_a_large_model_is_written_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SHARD_BYTES", 20_000)  # 5 GB are too many for a test
    model = made(CASES["qwen3_moe"][1])
    hf.write_model(tmp_path, model.state_dict(), model.config, end_of_text=5)
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    architecture, config = hf.read_config(tmp_path, hf.READABLE)
    found = hf.read_weights(tmp_path, architecture, config)
    assert all(torch.equal(found[key], value) for key, value in model.named_parameters())


def test_the_model_of_a_run_opens_with_its_tokenizer(config, tmp_path):
    transformers = pytest.importorskip("transformers")
    from training.train import train

    made = config(model={"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32}, steps=4)
    assert train(made) == 0
    folder = tmp_path / "runs/small/model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "def f(x):\n    return x"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer) == 257  # without the rows that spell nothing
    new = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert new.shape == (1, ids.shape[1] + 5)
    done = command(
        "-m", "training.generate", "--run", str(tmp_path / "runs/small"),
        "--prompt", text, "--tokens", "5", "--temperature", "0",
    )  # fmt: skip
    # Ours begins a document with its end-of-text token, so only the length can be compared with a bare prompt.
    begun = torch.cat([torch.tensor([[tokenizer.eos_token_id]]), ids], dim=1)
    theirs = model.generate(begun, max_new_tokens=5, do_sample=False)[0, begun.shape[1] :]
    assert done.stdout == text + tokenizer.decode(theirs) + "\n"


# --- what each can express -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"blocks": [{"ffn": {"type": "moe"}}]}, "experts"),
        ({"blocks": [{"ffn": {"type": "mlp", "gated": True}}]}, "gated layers"),
        ({"blocks": [{}, {"ffn": {"type": "mlp", "hidden": 8}}]}, "blocks that differ"),
        ({"blocks": [{}, {"ffn": {"type": "mlp", "hidden": 3072}}]}, None),
        ({"blocks": [{"mixer": {"qk_norm": True}}]}, "QK-norm"),
        ({"blocks": [{"mixer": {"n_kv_head": 4}}]}, "grouped queries"),
        ({"blocks": [{"mixer": {"n_kv_head": 12, "head_dim": 64}}]}, None),
        ({"blocks": [{"mixer": {"head_dim": 32}}]}, "heads of another width"),
        ({"blocks": [{"mixer": {"window": 8}}]}, "a window"),
        ({"blocks": [{"mixer": {"softcap": 50.0}}]}, "a soft-cap"),
        ({"blocks": [{"mixer": {"type": "latent"}}]}, "latent attention"),
        ({"blocks": [{}, {"mixer": {"type": "differential"}}]}, "differential attention"),
        ({"logit_softcap": 30.0}, "a soft-cap"),
        ({"position": "rope"}, "rope positions"),
        ({"position": "none"}, "none positions"),
        ({"norm": "rmsnorm"}, "rmsnorm"),
        ({"bias": False}, "no biases"),
        ({"isolate_documents": True}, None),
        ({}, None),
    ],
)
def test_what_gpt2_does_not_have_is_named(changes, reason):
    assert hf.ARCHITECTURES["gpt2"].reason_unsupported(ModelConfig.model_validate({"n_layer": 2} | changes)) == reason


ALL_ROTARY = [
    ({"position": "learned"}, "learned positions"),
    ({"position": "none"}, "none positions"),
    ({"norm": "layernorm"}, "layernorm"),
    ({"bias": True}, "biases"),
    ({"logit_softcap": 30.0}, "a soft-cap"),
    ({"mixer": {"softcap": 50.0}}, "a soft-cap"),
    ({"mixer": {"rope": False}}, "layers without rope"),
    ({"mixer": {"type": "latent", "qk_norm": None}}, "latent attention"),
    ({"mixer": {"type": "differential"}}, "differential attention"),
    ({"ffn": {"gated": False}}, "layers that are not gated"),
    ({"second": {"mixer": {"n_kv_head": 1}}}, "attention that differs between layers"),
    ({"isolate_documents": True}, None),
    ({"tie_head": False}, None),
    ({}, None),
]
DENSE = [
    *ALL_ROTARY,
    ({"ffn": MOE}, "experts"),
    ({"second": {"ffn": {"hidden": 8}}}, "feed-forward layers that differ"),
]
ROUTED = [  # with layers of experts
    *ALL_ROTARY,
    ({"ffn": None}, "no experts"),
    ({"an expert": {"ffn": {"top_k": 1}}}, "experts that differ between layers"),
    ({"an expert": {"ffn": {"n_experts": 7}}}, "experts that differ between layers"),
    ({"an expert": {"ffn": {"hidden": 7}}}, "experts that differ between layers"),
    ({"an expert": {"ffn": {"renormalize": False}}}, "experts that differ between layers"),
    ({"an expert": {"ffn": {"n_shared": 5}}}, "experts that differ between layers"),
    ({"an expert": {"ffn": {"route_scale": 3.0}}}, "experts that differ between layers"),
    ({"an expert": {"ffn": {"activation": "gelu"}}}, "several activations"),
    ({"an expert": {"ffn": {"z_loss_weight": 0.5, "jitter": 0.1, "capacity_factor": 1.5}}}, None),
]
DENSE_TOO = [
    ({"dense": {"ffn": {"hidden": 7}}}, "dense layers that differ"),
    ({"dense": {"ffn": {"activation": "gelu"}}}, "several activations"),
]
PLAIN = [  # routers
    ({"ffn": {"balance": "bias"}}, "a selection bias (balance: bias)"),
    ({"an expert": {"ffn": {"balance": "both"}}}, "a selection bias (balance: both)"),
    ({"an expert": {"ffn": {"balance": "switch"}}}, None),
    ({"ffn": {"n_shared": 1}}, "shared experts"),
]
SOFTMAX = [
    ({"ffn": {"scoring": "sigmoid"}}, "experts' weights of another kind (sigmoid, times 1)"),
    ({"ffn": {"route_scale": 2.5}}, "experts' weights of another kind (softmax, times 2.5)"),
]
RENORMALIZED = ({"ffn": {"renormalize": False}}, "experts' weights that do not sum to one")
ONE_WINDOW = [
    ({"mixer": {"window": 5}}, None),
    ({"second": {"mixer": {"window": 5}}}, "windows that differ between layers"),
]
NO_WINDOW = ({"second": {"mixer": {"window": 5}}}, "a window")
SIGMOIDS = [
    *DENSE_TOO,
    ({"ffn": {"scoring": "softmax"}}, "softmax scores"),
    ({"ffn": {"n_experts": 1, "top_k": 1}}, "a single expert"),
    ({"fourth": {"ffn": GATED}}, "dense layers after experts"),
    ({"ffn": {"renormalize": False, "route_scale": 0.3, "n_shared": 0}}, None),
    ({"ffn": {"balance": "none"}}, None),
]
UNSUPPORTED = {
    "llama": [
        *DENSE,
        ({"mixer": {"qk_norm": True}}, "QK-norm"),
        ({"second": {"mixer": {"window": 5}}}, "a window"),
        ({"n_embd": 30}, "n_head that does not divide n_embd"),
    ],
    "qwen3": [
        *DENSE,
        ({"mixer": {"qk_norm": False}}, "no QK-norm"),
        ({"second": {"mixer": {"window": 5}}}, None),
        ({"mixer": {"window": 4}, "second": {"mixer": {"window": 5}}}, "windows of several widths"),
        ({"n_embd": 30}, None),
    ],
    "qwen3_moe": [
        *ROUTED,
        *DENSE_TOO,
        *PLAIN,
        *SOFTMAX,
        *ONE_WINDOW,
        ({"mixer": {"qk_norm": False}}, "no QK-norm"),
        ({"ffn": {"renormalize": False}}, None),
    ],
    "mixtral": [
        *ROUTED,
        *PLAIN,
        *SOFTMAX,
        *ONE_WINDOW,
        RENORMALIZED,
        ({"mixer": {"qk_norm": True}}, "QK-norm"),
        ({"second": {"ffn": GATED}}, "dense layers"),
    ],
    "ernie4_5_moe": [
        *ROUTED,
        *DENSE_TOO,
        *SOFTMAX,
        NO_WINDOW,
        RENORMALIZED,
        ({"mixer": {"qk_norm": True}}, "QK-norm"),
        ({"third": {"ffn": GATED}, "fourth": {"ffn": MOE}}, "dense layers between experts"),
        ({"first": {"ffn": MOE}}, None),
        ({"ffn": {"balance": "bias", "n_shared": 3}}, None),
    ],
    "dots1": [
        *ROUTED,
        *SIGMOIDS,
        ({"mixer": {"qk_norm": False}}, "no QK-norm"),
        ({"second": {"mixer": {"window": 5}}}, None),
        ({"mixer": {"window": 4}, "second": {"mixer": {"window": 5}}}, "windows of several widths"),
    ],
    "glm4_moe": [*ROUTED, *SIGMOIDS, NO_WINDOW, ({"mixer": {"qk_norm": True}}, None)],
    "deepseek_v3": [
        *(case for case in ROUTED if "mixer" not in case[0] and "second" not in case[0]),
        *SIGMOIDS,
        NO_WINDOW,
        ({"second": {"mixer": {"rope_dim": 6}}}, "attention that differs between layers"),
        ({"mixer": dict.fromkeys(LATENT) | {"type": "attention"}}, "attention that is not latent"),
        ({"mixer": {"q_rank": None}}, None),
        ({"norm_eps": 1e-5}, "norm_eps 1e-05, where the latent vectors' is 1e-06"),
    ],
}
# Of each of the four layers: dense, or experts; and what is in those beyond MOE.
LAYOUTS = {
    **dict.fromkeys(("llama", "qwen3"), ("dddd", {})),
    "qwen3_moe": ("eedd", {}),
    "mixtral": ("eeee", {}),
    "ernie4_5_moe": ("deed", {}),
    **dict.fromkeys(("dots1", "glm4_moe", "deepseek_v3"), ("ddee", SIGMOID)),
}


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [(model_type, *case) for model_type, cases in UNSUPPORTED.items() for case in cases],
    ids=str,
)
def test_what_the_others_do_not_have_is_named(model_type, changes, reason):
    """`mixer` changes every layer, `ffn` every layer of experts where there are some; the others one layer."""
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
        whole = {} if "type" in own else MOE | routed if kind == "e" else GATED
        layers.append({"mixer": base | special.get("mixer", {}), "ffn": whole | own})
    options = {key: value for key, value in changes.items() if key not in {"mixer", "ffn", *places}}
    eps = {"norm_eps": 1e-6} if model_type == "deepseek_v3" else {}
    config = ModelConfig.model_validate(ROTARY | {"n_layer": 4, "blocks": layers} | eps | options)
    assert hf.ARCHITECTURES[model_type].reason_unsupported(config) == reason


def test_no_option_was_added_that_nobody_thought_of_here():
    """An option of the network that an architecture does not ask about would be lost on the way out."""
    asked = {
        ModelConfig: "n_layer n_head n_embd n_positions vocab_size position rope_theta norm norm_eps bias tie_head "
        "logit_softcap isolate_documents blocks",
        BlockConfig: "repeat mixer ffn",
        AttentionConfig: "type head_dim window n_kv_head softcap qk_norm rope",
        LatentConfig: "type head_dim window kv_rank q_rank rope_dim value_dim",
        MLPConfig: "type hidden activation gated",
        MoEConfig: "type n_experts top_k n_shared hidden activation gated scoring renormalize route_scale "
        "jitter balance bias_rate switch_weight z_loss_weight capacity_factor",
    }
    for section, names in asked.items():
        assert set(section.model_fields) == set(names.split()), section.__name__


@pytest.mark.parametrize("name", CASES)
def test_each_model_has_one_architecture(name):
    config = ModelConfig.model_validate(CASES[name][1])
    found = [kind for kind, one in hf.ARCHITECTURES.items() if one.reason_unsupported(config) is None]
    assert found == [CASES[name][0], *ALSO.get(name, [])]


@pytest.mark.parametrize("name", ALSO)
def test_what_two_architectures_express_is_the_same_in_both(tmp_path, monkeypatch, name):
    """The first is the one that is written; that is a choice, and no matter of what fits."""
    transformers = pytest.importorskip("transformers")
    (other,) = ALSO[name]
    # Another dictionary: put back into the same one, it would be the last in order.
    monkeypatch.setattr(
        hf, "ARCHITECTURES", {kind: one for kind, one in hf.ARCHITECTURES.items() if kind != CASES[name][0]}
    )
    model = made(CASES[name][1])
    assert hf.write_model(tmp_path, model.state_dict(), model.config, end_of_text=5) == other
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs(tokens()).logits, model.logits(tokens()), rtol=0, atol=1e-4)


def test_another_model_is_written_under_our_own_names(tmp_path):
    model = made(SIZES | {"blocks": [{"ffn": {"type": "moe", "hidden": 8}}]})
    assert hf.write_model(tmp_path, model.state_dict(), model.config, end_of_text=5) == "training_gpt"
    found = json.loads((tmp_path / "config.json").read_text())
    assert found["model_type"] == "training_gpt"
    again = GPT(ModelConfig.model_validate({k: found[k] for k in ModelConfig.model_fields}, strict=False))
    tensors = load_file(tmp_path / "model.safetensors")
    again.load_state_dict({name.removeprefix("gpt."): tensor for name, tensor in tensors.items()})
    x = torch.randint(0, 320, (1, 24), generator=torch.Generator().manual_seed(2))
    assert torch.equal(again.logits(x), model.logits(x))
    architecture, config = hf.read_config(tmp_path, hf.READABLE)
    assert config == model.config
    read = hf.read_weights(tmp_path, architecture, config)
    assert all(torch.equal(read[name], tensor) for name, tensor in model.state_dict().items())


def test_fields_are_spelled_for_both_versions(exports):
    """What one version alone reads today the other may read tomorrow, and other programs read either."""
    written = {name: json.loads((folder / "config.json").read_text()) for name, folder in exports.items()}
    assert all(fields["bos_token_id"] == fields["eos_token_id"] == 5 for fields in written.values())
    for name, folder in exports.items():
        generation = json.loads((folder / "generation_config.json").read_text())
        assert generation == {"bos_token_id": 5, "eos_token_id": 5}
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
    for name in ("dots1", "glm4_moe", "deepseek_v3"):  # what other programs ask, and Transformers does not
        said = {key: written[name][key] for key in ("scoring_func", "topk_method", "moe_layer_freq")}
        assert said == {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
    assert (written["ernie4_5_moe"]["moe_layer_start_index"], written["ernie4_5_moe"]["moe_layer_end_index"]) == (1, 2)


def test_a_selection_bias_that_nothing_moves_any_more_is_not_lost(tmp_path):
    """As where a run that balances otherwise begins with a checkpoint of one that had it."""
    model = made(CASES["qwen3_moe"][1])
    model.blocks[1].ffn.selection_bias[2] = 0.1
    assert hf.write_model(tmp_path, model.state_dict(), model.config, end_of_text=5) == "training_gpt"
    read = hf.read_weights(tmp_path, *hf.read_config(tmp_path, hf.READABLE))
    assert torch.equal(read["blocks.1.ffn.selection_bias"], model.blocks[1].ffn.selection_bias)


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        ("aaaa", [("a", 1)]),
        ("abab", [("a", 1), ("b", 1)]),
        ("abba", [("a", 1), ("b", 2)]),
        ("abb", [("a", 1), ("b", 2)]),
        ("aaab", [("a", 3), ("b", 1)]),
        ("a", [("a", 1)]),
    ],
)
def test_layers_become_the_shortest_pattern(layers, wanted):
    assert pattern([{"ffn": letter} for letter in layers]) == [{"ffn": a, "repeat": n} for a, n in wanted]


# --- config.json, read -----------------------------------------------------------------------------


class Recording(dict):
    """A dictionary that knows what was asked of it."""

    def __init__(self, content: dict):
        super().__init__(content)
        self.asked: set[str] = set()

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key) -> bool:
        self.asked.add(key)
        return super().__contains__(key)

    def __ror__(self, other):
        merged = Recording({**other, **self})
        merged.asked = self.asked
        return merged


# Fields that change no logit: generation, initial values, dropout (there is none here), other heads, and how, not what,
# is computed.
HARMLESS = {
    *("model_type", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "pretraining_tp"),
    *("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout", "reorder_and_upcast_attn"),
    *("summary_type", "summary_use_proj", "summary_activation", "summary_first_dropout", "summary_proj_to_labels"),
    *("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
    *("num_nextn_predict_layers", "num_mtp_layers"),  # further tokens, guessed by layers of their own
}


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("model_type", THEIRS)
def test_every_field_of_theirs_is_read_or_known_to_be_harmless(request, exports, model_type, version):
    found, asked = request.getfixturevalue(f"opened_by_{version}"), set()
    for name in (name for name, case in CASES.items() if case[0] == model_type):
        written = json.loads((exports[name] / "config.json").read_text())
        for left_out in ("nothing", "layer_types"):
            fields = Recording({key: value for key, value in written.items() if key != left_out})
            hf.ARCHITECTURES[model_type].from_hf(fields)
            asked |= fields.asked
    assert set(found[name]["fields"]) - asked <= HARMLESS


DEFAULTS = {
    "gpt2, 12 layers": gpt2.DEFAULTS,
    "llama": llama.DEFAULTS,
    "qwen3": qwen3.DEFAULTS,
    "qwen3_moe": qwen3.MOE_DEFAULTS,
    "mixtral": mixtral.DEFAULTS,
    "ernie4_5_moe": ernie.DEFAULTS,
    "dots1": deepseek.DOTS1_DEFAULTS,
    "glm4_moe": deepseek.GLM4_DEFAULTS,
    "deepseek_v3": deepseek.DEEPSEEK_DEFAULTS,
}


@pytest.mark.parametrize("version", [4, 5])
def test_what_a_file_leaves_out_is_what_transformers_takes(request, version):
    found = request.getfixturevalue(f"opened_by_{version}")
    for case, defaults in DEFAULTS.items():
        known = found[case]["defaults"]
        for name, value in defaults.items():
            if name == "sliding_window" and "use_sliding_window" in defaults:  # null is shown while that is false
                continue
            if name == "moe_layer_end_index":  # the last layer is shown
                value = known["num_hidden_layers"] - 1
            assert known[name] == value, (case, name)
        if case != "gpt2, 12 layers":
            theta = {"mixtral": mixtral.ROPE_THETA, "ernie4_5_moe": ernie.ROPE_THETA}.get(case, 10_000.0)
            assert (known["rope_theta"] if version == 4 else known["rope_parameters"]["rope_theta"]) == theta, case


def test_activations_are_what_transformers_calls_so():
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
    ("llama", {"rope_theta": 9.0}, "rope_theta: 9, rope_parameters.rope_theta: 500: which is meant?"),
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
    ("qwen3_moe", {"num_experts": 3}, "num_experts: not num_local_experts"),
    ("qwen3_moe", {"num_experts": None, "num_local_experts": None}, "num_experts: missing"),
    ("qwen3_moe", {"num_experts_per_tok": 9}, "top_k: 9 is more than n_experts 5"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step: 0"),
    ("qwen3_moe", {"mlp_only_layers": 3}, "mlp_only_layers: 3 is not a list"),
    ("qwen3_moe", {"layer_types": ["full_attention"] * 3}, "layer_types: "),
    ("mixtral", {"num_experts": 3}, "num_local_experts: not num_experts: which is meant?"),
    ("mixtral", {"num_local_experts": None}, "num_local_experts: missing"),
    ("mixtral", {"num_experts_per_tok": 6}, "top_k: 6 is more than n_experts 5"),
    ("mixtral", {"num_experts_per_tok": None}, "num_experts_per_tok is missing"),
    ("mixtral", {"intermediate_size": 24.0}, "intermediate_size: 24.0 is not a whole number"),
    ("mixtral", {"sliding_window": 0}, "window"),
    ("mixtral", {"layer_types": ["sliding_attention"] * 3}, "layer_types: "),
    ("mixtral", {"attention_bias": True}, "attention_bias: True"),
    ("mixtral", {"rope_theta": 1e6}, "rope_theta: 1e+06, rope_parameters.rope_theta: 10000: which is meant?"),
    ("ernie4_5_moe", {"use_bias": True}, "use_bias: True"),
    ("ernie4_5_moe", {"moe_norm_min": 1e-3}, "moe_norm_min: 0.001"),
    ("ernie4_5_moe", {"moe_layer_interval": 2}, "moe_layer_interval: 2"),
    ("ernie4_5_moe", {"moe_layer_start_index": None}, "moe_layer_start_index is missing"),
    ("ernie4_5_moe", {"num_experts": 9}, "moe_num_experts: not num_experts: which is meant?"),
    ("ernie4_5_moe", {"num_experts_per_tok": 1}, "moe_k: not num_experts_per_tok: which is meant?"),
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
            ({"n_routed_experts": None}, "n_routed_experts: missing"),
            ({"num_local_experts": 9}, "n_routed_experts: not num_local_experts: which is meant?"),
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
    ("glm4_moe", {"partial_rotary_factor": None}, "partial_rotary_factor: missing, which means 0.5"),
    ("glm4_moe", {"use_qk_norm": 1}, "use_qk_norm: 1 is not true or false"),
    ("glm4_moe", {"sliding_window": 5}, "sliding_window: 5"),
    ("deepseek_v3", {"rope_interleave": False}, "rope_interleave: False"),
    ("deepseek_v3", {"rms_norm_eps": 1e-5}, "rms_norm_eps: 1e-05 cannot be computed here, only 1e-06"),
    ("deepseek_v3", {"num_key_value_heads": 3}, "num_key_value_heads: 3 cannot be computed here, only 6"),
    ("deepseek_v3", {"head_dim": 16}, "head_dim: 16 cannot be computed here, only 8"),
    ("deepseek_v3", {"qk_head_dim": 10}, "qk_head_dim: 10 cannot be computed here, only 18"),
    ("deepseek_v3", {"v_head_dim": None}, "v_head_dim is missing"),
    ("deepseek_v3", {"q_lora_rank": "no"}, "q_lora_rank: 'no' is not a whole number"),
    ("deepseek_v3", {"qk_rope_head_dim": 7}, "rope_dim"),
    ("deepseek_v3", {"layer_types": ["full_attention"] * 4}, "layer_types: "),
]


@pytest.mark.parametrize(("model_type", "changes", "words"), REFUSED, ids=str)
def test_what_cannot_be_computed_here_is_refused_by_its_field(tmp_path, model_type, changes, words):
    name = next(name for name, case in CASES.items() if case[0] == model_type)
    model = ModelConfig.model_validate(CASES[name][1])
    fields = {"model_type": model_type} | hf.ARCHITECTURES[model_type].to_hf(model)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert same_model(hf.read_config(tmp_path, hf.READABLE)[1], model)
    (tmp_path / "config.json").write_text(json.dumps(fields | changes))
    with pytest.raises(UserError) as raised:
        hf.read_config(tmp_path, hf.READABLE)
    assert str(raised.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_max_window_layers_says_which_layers_have_the_window(tmp_path):
    """As files say it that were written before there were layer_types."""
    transformers = pytest.importorskip("transformers")
    for first in range(4):
        fields = THEIRS["qwen3"][1] | {"max_window_layers": first}
        transformers.Qwen3Config(**fields).save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        _, with_types = hf.read_config(tmp_path, hf.READABLE)
        del written["layer_types"]
        (tmp_path / "config.json").write_text(json.dumps(written))
        assert hf.read_config(tmp_path, hf.READABLE)[1] == with_types
        assert [block.mixer.window for block in with_types.layers()] == [None] * first + [4] * (3 - first)


def test_a_small_file_means_what_the_classes_defaults_say(tmp_path):
    """As older files are: LLaMA's first had no heads of keys and values, no rope_theta; GPT-2's no n_inner."""
    fields = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    fields |= {"intermediate_size": 40, "max_position_embeddings": 24, "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    _, found = hf.read_config(tmp_path, hf.READABLE)
    assert (found.rope_theta, found.norm_eps, found.tie_head) == (10_000.0, 1e-6, False)
    assert found.blocks[0].mixer.n_kv_head is None and found.blocks[0].ffn.activation == "silu"
    fields = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 24, "n_ctx": 24, "vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps(fields | {"model_type": "gpt2", "resid_pdrop": 0.1}))
    _, found = hf.read_config(tmp_path, hf.READABLE)
    assert same_model(found, ModelConfig.model_validate(SIZES | {"vocab_size": 300}))


# --- weights, read ---------------------------------------------------------------------------------


def test_gpt2s_first_files_are_read(tmp_path):
    """openai-community/gpt2: no prefix, the causal masks among the tensors, the tied head written too."""
    model = made(SIZES)
    hf.write_model(tmp_path, model.state_dict(), model.config, end_of_text=5)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for i in range(2):
        old |= {f"h.{i}.attn.bias": torch.ones(1, 1, 24, 24).tril(), f"h.{i}.attn.masked_bias": torch.tensor(-1e4)}
    old["lm_head.weight"] = old["wte.weight"].clone()
    save_file(old, tmp_path / "model.safetensors")
    architecture, config = hf.read_config(tmp_path, hf.READABLE)
    found = hf.read_weights(tmp_path, architecture, config)
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def test_weights_of_half_the_width_are_read_exactly(tmp_path):
    model = made(CASES["llama"][1])
    hf.write_model(tmp_path, model.state_dict(), model.config, end_of_text=5, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    found = hf.read_weights(tmp_path, *hf.read_config(tmp_path, hf.READABLE))
    assert all(torch.equal(found[name], tensor.bfloat16().float()) for name, tensor in model.named_parameters())


def test_a_selection_bias_is_not_rounded(tmp_path):
    """It moves by bias_rate at a time, which bf16 would not see."""
    transformers = pytest.importorskip("transformers")
    model = made(CASES["dots1"][1])
    hf.write_model(tmp_path, model.state_dict(), model.config, end_of_text=5, dtype=torch.bfloat16)
    found = hf.read_weights(tmp_path, *hf.read_config(tmp_path, hf.READABLE))
    for name, tensor in model.state_dict().items():
        if not name.endswith("ffn.load"):
            assert torch.equal(found[name], tensor if "selection_bias" in name else tensor.bfloat16().float())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    bias = theirs.model.layers[2].mlp.gate.e_score_correction_bias
    assert torch.equal(bias, model.blocks[2].ffn.selection_bias)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        ({"model.layers.2.mlp.gate.e_score_correction_bias": None}, "tensors that are missing"),
        ({"model.layers.2.mlp.shared_experts.up_proj.weight": None}, "tensors that are missing"),
        ({"model.layers.2.mlp.shared_experts.up_proj.weight": (24, 32)}, r"is \(24, 32\) there, and \(48, 32\) by"),
        ({"model.layers.0.mlp.gate.e_score_correction_bias": (5,)}, "tensors that are not known"),
        ({"model.layers.4.mlp.gate.weight": (5, 32)}, "tensors that are not known"),  # as of further guesses
        ({"model.layers.2.mlp.gate.e_score_correction_bias": (1, 5)}, r"is \(1, 5\) there, and \(5,\) by"),
    ],
    ids=str,
)
def test_weights_that_are_not_those_of_config_json_are_refused(tmp_path, harm, reason):
    model = made(CASES["dots1"][1])
    hf.write_model(tmp_path, model.state_dict(), model.config, end_of_text=5)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {name: torch.ones(shape) for name, shape in harm.items() if shape is not None}
    save_file({k: v for k, v in tensors.items() if harm.get(k, ()) is not None}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=reason):
        hf.read_weights(tmp_path, *hf.read_config(tmp_path, hf.READABLE))

"""`gpt2`: GPT2LMHeadModel. Its layers store transposed matrices (Conv1D), and query, key and value as one."""

import re
from typing import Any

from training.config import Activation, ModelConfig
from training.weights.hf.architecture import Architecture
from training.weights.hf.tables import Field, Name, check_neutral, read_fields, write_fields

MODEL = (
    *(Field(name, name, int) for name in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")),
    Field("layer_norm_epsilon", "norm_eps", float),
    Field("tie_word_embeddings", "tie_head", bool),
)
MLP = (Field("n_inner", "hidden", int, nullable=True), Field("activation_function", "activation", Activation))
# GPT2Config's values for fields that older files leave out.
DEFAULTS = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}
NEUTRAL = {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (None, False)}

NORMS = {"ln_1": ("norm_1",), "ln_2": ("norm_2",)}
MATRICES = {
    "attn.c_attn": ("mixer.query", "mixer.key", "mixer.value"),
    "attn.c_proj": ("mixer.out",),
    "mlp.c_fc": ("ffn.up",),
    "mlp.c_proj": ("ffn.down",),
}


class GPT2Architecture(Architecture):
    """GPT-2."""

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        return {
            "architectures": ["GPT2LMHeadModel"],
            **write_fields(config, MODEL),
            **write_fields(config.with_explicit_sizes().layers()[0].ffn, MLP),
            "attn_pdrop": 0.0,
            **dict.fromkeys(("embd_pdrop", "resid_pdrop"), config.dropout),
        }

    def from_hf(self, hf: dict[str, Any]) -> dict[str, Any]:
        check_neutral(hf, NEUTRAL)
        hf = DEFAULTS | hf
        return read_fields(hf, MODEL) | {"blocks": [{"ffn": {"type": "mlp"} | read_fields(hf, MLP)}]}

    def names(self, config: ModelConfig) -> list[Name]:
        table = [Name("transformer.wte.weight", ("wte.weight",)), Name("transformer.wpe.weight", ("wpe.weight",))]
        if not config.tie_head:
            table.append(Name("lm_head.weight", ("head.weight",)))
        for kind in ("weight", "bias"):
            table.append(Name(f"transformer.ln_f.{kind}", (f"norm_f.{kind}",)))
            for i in range(config.n_layer):
                for theirs, parts in (NORMS | MATRICES).items():
                    ours = tuple(f"blocks.{i}.{part}.{kind}" for part in parts)
                    transposed = theirs in MATRICES and kind == "weight"
                    table.append(Name(f"transformer.h.{i}.{theirs}.{kind}", ours, transposed))
        return table


GPT2 = GPT2Architecture(
    prefix="transformer.",
    harmless=re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"),  # the causal mask
)

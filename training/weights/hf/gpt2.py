"""`gpt2`: GPT2LMHeadModel. Its layers store transposed matrices (Conv1D), and query, key and value as one."""

import re
from dataclasses import dataclass
from typing import Any

from training.config import Activation, ModelConfig
from training.weights.hf.architecture import Architecture
from training.weights.hf.fields import Field, check_neutral, read_fields, write_fields
from training.weights.hf.names import Name

MODEL = (
    *(Field(name, name, int) for name in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")),
    Field("layer_norm_epsilon", "norm_eps", float),
    Field("tie_word_embeddings", "tie_head", bool),
)
MLP = (Field("n_inner", "hidden", int, nullable=True), Field("activation_function", "activation", Activation))
# GPT2Config's values for fields that older files leave out.
DEFAULTS = {
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}
NEUTRAL = {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (None, False)}


@dataclass(frozen=True, kw_only=True)
class GPT2Architecture(Architecture):
    """GPT-2."""

    prefix: str = "transformer."
    harmless: re.Pattern[str] = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")  # the causal mask

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        return {
            "architectures": ["GPT2LMHeadModel"],
            **write_fields(config, MODEL),
            **write_fields(config.with_explicit_sizes().layers()[0].ffn, MLP),
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
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
            matrix = kind == "weight"
            for i in range(config.n_layer):
                theirs, ours = f"transformer.h.{i}", f"blocks.{i}"
                qkv = tuple(f"{ours}.mixer.{name}.{kind}" for name in ("query", "key", "value"))
                table += [
                    Name(f"{theirs}.ln_1.{kind}", (f"{ours}.norm_1.{kind}",)),
                    Name(f"{theirs}.ln_2.{kind}", (f"{ours}.norm_2.{kind}",)),
                    Name(f"{theirs}.attn.c_attn.{kind}", qkv, matrix),
                    Name(f"{theirs}.attn.c_proj.{kind}", (f"{ours}.mixer.out.{kind}",), matrix),
                    Name(f"{theirs}.mlp.c_fc.{kind}", (f"{ours}.ffn.up.{kind}",), matrix),
                    Name(f"{theirs}.mlp.c_proj.{kind}", (f"{ours}.ffn.down.{kind}",), matrix),
                ]
        return table


GPT2 = GPT2Architecture()

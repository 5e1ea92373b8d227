"""The network as a model of Transformers: `AutoModelForCausalLM` opens it, `generate` runs it with its cache.

An export contains this file and all that it imports from this package (`custom.py`). These files may import only torch
and transformers (4.57 or later).
"""

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from training.config import BlockConfig, ModelConfig
from training.kernels.attention.masks import Documents, left_padded
from training.kernels.experts import PORTABLE
from training.kernels.interface import Kernels
from training.model.cache import Cache
from training.model.gpt import FEED_FORWARDS, GPT, MIXERS
from training.model.layers import BigramEmbedding, ShortConvolution

OPTIONS = ModelConfig().model_dump(mode="json")  # every option of the network and its default
KINDS = {kind().type: kind for kind in (*MIXERS, *FEED_FORWARDS)}


def model_config(options: dict[str, Any]) -> ModelConfig:
    """Return the configuration of the network; an export has no pydantic that would do it."""
    blocks = [
        values | {name: KINDS[values[name]["type"]](**values[name]) for name in ("mixer", "ffn")}
        for values in options["blocks"]
    ]
    return ModelConfig(**(options | {"blocks": tuple(BlockConfig(**block) for block in blocks)}))


class TrainingGPTConfig(PretrainedConfig):
    """The options of the network, with the names and values of the run's `model` section."""

    model_type = "training_gpt"
    attribute_map = {  # noqa: RUF012 (the base class says so)
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    }

    def __init__(self, **options: Any):
        for name, default in OPTIONS.items():
            setattr(self, name, options.pop(name, default))
        super().__init__(**{"tie_word_embeddings": False} | options)  # a tied head has no parameter to tie


class GenerationCache(Cache):
    """Our cache, with the methods that `generate` calls."""

    is_compileable = False
    reorder_cache = Cache.select

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 (Transformers' signature)
        return self.n_tokens


class TrainingGPTForCausalLM(PreTrainedModel, GenerationMixin):
    """The network with its head."""

    config_class = TrainingGPTConfig
    base_model_prefix = "gpt"
    _is_stateful = True  # our own cache cannot drop tokens

    def __init__(self, config: TrainingGPTConfig):
        super().__init__(config)
        options = {name: getattr(config, name) for name in OPTIONS}
        self.gpt = GPT(model_config(options), Kernels(experts=PORTABLE))
        if any(block.ffn.type == "moe" for block in self.gpt.config.blocks):
            self._keep_in_fp32_modules_strict = ["router"]  # routing is float32 in any dtype
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _init_weights(self, module: nn.Module) -> None:
        """Set GPT-2's initial weights, for a model that is not loaded."""
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, BigramEmbedding | ShortConvolution):
                nn.init.zeros_(parameter)
            elif parameter.ndim > 1 and not name.endswith("bias"):
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.constant_(parameter, 1.0 if name == "weight" and "Norm" in type(module).__name__ else 0.0)

    def get_input_embeddings(self) -> nn.Module:
        return self.gpt.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.gpt.wte = value

    def get_output_embeddings(self) -> nn.Module | None:
        return self.gpt.head

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: GenerationCache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = True,
        **_: Any,
    ) -> dict[str, Any]:
        n_read = 0 if past_key_values is None else past_key_values.get_seq_length()
        passed = {"past_key_values": past_key_values, "attention_mask": attention_mask, "use_cache": use_cache}
        return {"input_ids": input_ids[:, n_read:], "logits_to_keep": 1, **passed}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: GenerationCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **loss_options: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Return logits (B, T, V), or of the last `logits_to_keep` tokens, and the loss if there are `labels`.

        Zeros at the start of `attention_mask` (B, S) are padding. `position_ids` (B, T) that restart at 0 separate
        packed documents. Raises ValueError for outputs that are not supported.
        """
        for name in ("output_hidden_states", "output_attentions"):
            if loss_options.pop(name, None):
                raise ValueError(f"{name} is not supported")
        self.gpt.dtype = self.gpt.wte.weight.dtype
        n_padding_B = None if attention_mask is None else (attention_mask.cumsum(1) == 0).sum(1)
        documents = None
        if past_key_values is None and use_cache:
            if n_padding_B is None and position_ids is not None and bool((position_ids[:, 1:] == 0).any()):
                raise ValueError("packed documents (position_ids that restart at 0) need use_cache=False")
            past_key_values = GenerationCache(len(self.gpt.blocks), n_padding_B)
        elif past_key_values is None and position_ids is not None:
            position_BT = position_ids.expand_as(input_ids)
            documents = Documents((position_BT == 0).cumsum(1), position_BT)
        elif past_key_values is None and n_padding_B is not None and bool(n_padding_B.any()):
            documents = left_padded(n_padding_B, 0, input_ids.shape[1])
        logits_BTV = self.gpt.logits(input_ids, past_key_values, documents, n_last=logits_to_keep)
        n_vocab = self.gpt.config.vocab_size
        loss = None if labels is None else self.loss_function(logits_BTV, labels, n_vocab, **loss_options)
        output = CausalLMOutputWithPast(loss=loss, logits=logits_BTV, past_key_values=past_key_values)
        return output if return_dict is not False else output.to_tuple()


def register() -> None:
    """Let Transformers' Auto classes open these models with this package's own code."""
    AutoConfig.register(TrainingGPTConfig.model_type, TrainingGPTConfig, exist_ok=True)
    AutoModelForCausalLM.register(TrainingGPTConfig, TrainingGPTForCausalLM, exist_ok=True)

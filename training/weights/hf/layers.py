"""The layers of a model with every size that null stands for written out, and back to a pattern of blocks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from training.config import AttentionConfig, BlockConfig, LatentConfig, MixerConfig, MLPConfig, ModelConfig, MoEConfig


def with_explicit_sizes(config: ModelConfig) -> list[BlockConfig]:
    """Every layer's block, so that two are equal where they compute the same.

    `hidden`, `head_dim`, `n_kv_head` and `value_dim` are numbers; `rope` is whether positions are turned there.
    """

    def explicit(block: BlockConfig) -> BlockConfig:
        mixer = block.mixer
        width = mixer.head_dim or config.n_embd // config.n_head
        changes = {"head_dim": width}
        if isinstance(mixer, AttentionConfig):
            changes |= {
                "n_kv_head": mixer.n_kv_head or config.n_head,
                "rope": mixer.rope and config.position == "rope",
            }
        elif isinstance(mixer, LatentConfig):
            changes |= {"value_dim": mixer.value_dim or width}
        ffn = block.ffn.model_copy(update={"hidden": block.ffn.hidden or 4 * config.n_embd})
        return BlockConfig(mixer=mixer.model_copy(update=changes), ffn=ffn)

    return [explicit(block) for block in config.layers()]


def other_kinds(layers: list[BlockConfig], attention: type[MixerConfig] = AttentionConfig) -> Iterator[str]:
    """The kinds of mixers other than `attention`, and of feed-forward layers that no architecture here has."""
    for block in layers:
        # The very type: what is derived from a kind that is known computes something else.
        if type(block.mixer) is not attention:
            yield f"{block.mixer.type} attention"
        if type(block.ffn) not in (MLPConfig, MoEConfig):
            yield f"{block.ffn.type} feed-forward layers"


def pattern(layers: list[dict]) -> list[dict]:
    """The shortest pattern of blocks, as options, whose repetition is these layers."""
    periods = (n for n in range(1, len(layers)) if all(layers[i] == layers[i - n] for i in range(n, len(layers))))
    period = next(periods, len(layers))
    runs = [list(run) for _, run in groupby(layers[:period])]
    return [run[0] | {"repeat": len(run)} for run in runs]

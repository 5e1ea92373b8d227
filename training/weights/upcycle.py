"""Upcycling: a dense model's feed-forward layers as experts that together compute the same (arXiv:2212.05055).

A dense layer's F hidden channels are split into S + G shards of an expert's width h: F = (S + G) h. The S shared
experts hold the first S shards; expert e holds shard e mod G of the other G. Each G neighboring experts are a virtual
group (arXiv:2410.07524), which holds these G shards. Their router rows are equal, so a token picks whole groups and
weights the members of a group equally. A token's K weights sum to route_scale, so those of each shard sum to
route_scale / G; multiplying `down` by G / route_scale compensates. With G = 1 and S = 0, every expert is a copy.

Shapes: C channels, F and h hidden channels of the dense layer and of an expert, E experts, K experts per token,
G experts per group, T tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from math import gcd
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from training.batch import Batch
from training.config import MLPConfig, ModelConfig, MoEConfig
from training.errors import UserError
from training.model import GPT
from training.model.layers import normal_from_key

MAX_LOGIT_CHANGE = 1e-4  # rounding changes a logit by less
MAX_TIED_SHARE = 1e-3  # of the tokens; by chance about one in a million ties

Layers = dict[int, tuple[MoEConfig, int]]  # by index: config with explicit sizes, G


class Change(NamedTuple):
    """The effect of upcycling on a model's outputs."""

    loss_before: float  # nats per token
    loss_after: float
    max_logit_change: float
    n_tied: int  # tokens that got a part of a group; their and later logits of the sample are not compared
    n_tokens: int

    @property
    def is_exact(self) -> bool:
        """True if rounding explains the change; False for NaN."""
        return self.max_logit_change <= MAX_LOGIT_CHANGE and self.n_tied <= MAX_TIED_SHARE * self.n_tokens

    def __str__(self) -> str:
        tied = f", {self.n_tied} of {self.n_tokens:,} tokens tied between equal scores" if self.n_tied else ""
        return (
            f"loss {self.loss_before:.4f} before, {self.loss_after:.4f} after, "
            f"largest change of a logit {self.max_logit_change:.1e}{tied}"
        )


def resolve_experts(moe: MoEConfig, dense: MLPConfig, n_embd: int, layer: int, where: str) -> MoEConfig:
    """Return `moe` with the dense layer's activation. Raises UserError if its experts cannot equal it."""

    def error(option: str, problem: str) -> UserError:
        return UserError(f"model.blocks: ffn.{option} of layer {layer} {problem}")

    for option in ("activation", "gated"):
        ours, theirs = getattr(moe, option), getattr(dense, option)
        if option in moe.model_fields_set and ours != theirs:
            raise error(option, f"is {ours}, but {where} has {theirs}; leave it out")
    if moe.renormalize is False:
        raise error("renormalize", f"is false; upcycling {where} needs true, as weights must have a fixed sum")
    hidden, n_shared, width = moe.hidden or 4 * n_embd, moe.n_shared, dense.hidden or 4 * n_embd
    common = gcd(moe.n_experts, moe.top_k)
    n_shards = [n_shared + group for group in range(1, common + 1) if common % group == 0]
    possible = [width // n for n in n_shards if width % n == 0]
    if hidden not in possible:
        n_routed = width // hidden - n_shared
        problem = f"splits the dense layer's {width} in {where} into {width // hidden}, {n_shared} for shared experts; "
        problem += f"the other {n_routed} must divide top_k {moe.top_k} and n_experts {moe.n_experts}"
        if width % hidden:
            problem = f"does not divide the dense layer's {width} in {where}"
        elif n_routed < 1:
            problem = f"leaves nothing of the dense layer's {width} in {where} beside {n_shared} for shared experts"
        use = f"use {' or '.join(map(str, possible))}" if possible else "no width fits these numbers of experts"
        raise error("hidden", f"is {hidden}, which {problem}: {use}")
    return moe.model_copy(update={"activation": dense.activation, "gated": dense.gated, "renormalize": True})


def upcycled_layers(theirs: ModelConfig, ours: ModelConfig) -> Layers:
    """Return the layers that are dense in theirs and have experts in ours."""
    explicit = (config.with_explicit_sizes().layers() for config in (theirs, ours))
    return {
        i: (moe.ffn, dense.ffn.hidden // moe.ffn.hidden - moe.ffn.n_shared)
        for i, (dense, moe) in enumerate(zip(*explicit, strict=True))
        if (dense.ffn.type, moe.ffn.type) == ("mlp", "moe")
    }


def describe(layers: Layers) -> str:
    """Return a phrase such as "12 layers of 8 experts, groups of 2 and 1 shared"."""
    kinds = dict.fromkeys((moe.n_experts, n_routed, moe.n_shared) for moe, n_routed in layers.values())
    (n_experts, n_routed, n_shared), *others = kinds
    split = "copies" if n_routed + n_shared == 1 else f"groups of {n_routed}"
    split += f" and {n_shared} shared" if n_shared else ""
    split += ", and others" if others else ""
    return f"{len(layers)} layer{'s' * (len(layers) > 1)} of {n_experts} experts, {split}"


def upcycle_weights(dense: dict[str, Tensor], layers: Layers, initial: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the dense model's weights as those of ours; the routers' rows come from `initial`, our initial weights.

    Tensors that no dense model has (selection biases, loads) are left out: they start as in any run.
    """
    weights = dict(dense)
    for i, (moe, n_routed) in layers.items():
        prefix = f"blocks.{i}.ffn."
        layer = {name.removeprefix(prefix): weights.pop(name) for name in dense if name.startswith(prefix)}
        row_EC = initial[f"{prefix}router.weight"].cpu()
        experts = {"router.weight": row_EC[::n_routed].repeat_interleave(n_routed, dim=0)}
        experts |= _split(layer, moe, n_routed)
        weights |= {prefix + name: tensor.contiguous() for name, tensor in experts.items()}
    return weights


def _split(layer: dict[str, Tensor], moe: MoEConfig, n_routed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the experts and of the shared layer, by name."""
    n_copies, n_shared, width = moe.n_experts // n_routed, moe.n_shared, moe.n_shared * moe.hidden
    for name, tensor in layer.items():
        matrix, kind = name.split(".")
        if name == "down.bias":
            # The shared layer adds it once. Without one, a token's experts add it with weights that sum to route_scale.
            shared, expert_C = tensor, torch.zeros_like(tensor) if n_shared else tensor / moe.route_scale
            experts = expert_C.expand(moe.n_experts, -1)
        elif matrix == "down":  # (C, F)
            shared, routed = tensor[:, :width], tensor[:, width:]
            experts = routed.unflatten(1, (n_routed, moe.hidden)).transpose(0, 1) * (n_routed / moe.route_scale)
            experts = experts.repeat(n_copies, 1, 1)
        else:  # (F, C), or (F,)
            shared, routed = tensor[:width], tensor[width:]
            experts = routed.unflatten(0, (n_routed, moe.hidden))
            experts = experts.repeat(n_copies, *(1,) * (experts.ndim - 1))
        yield f"experts.{matrix}{'_bias' if kind == 'bias' else ''}", experts
        if n_shared:
            yield f"shared.{name}", shared


def with_noise(weights: dict[str, Tensor], layers: Layers, relative: float, seed: int) -> dict[str, Tensor]:
    """Return the weights with noise on these layers' experts, `relative` to each matrix's standard deviation.

    Every matrix has its own generator, keyed by seed and name: the noise is the same on every rank.
    """
    noised = dict(weights)
    for name in (f"blocks.{i}.ffn.experts.{matrix}" for i in layers for matrix in ("up", "gate", "down")):
        if name in weights:
            deviation = relative * weights[name].double().std().item()  # float64: the same on any number of threads
            noised[name] = weights[name] + deviation * normal_from_key(f"{seed}/noise/{name}", weights[name].shape)
    return noised


@torch.no_grad()
def compare(dense: GPT, upcycled: GPT, samples: Sequence[Batch]) -> Change:
    """Compare both models' logits on batches of one sample.

    If two groups' scores are equal to the last bit (about one token in a million), top-k takes a part of each group.
    Such a token and those after it in its sample are left out.
    """
    losses, changes, n_tied, n_tokens = [0.0, 0.0], [], 0, 0
    layers = upcycled_layers(dense.config, upcycled.config)
    topk_ids: dict[int, Tensor] = {}  # by layer: every token's experts (N, K) in the last forward
    with ExitStack() as hooks:
        for i in layers:
            experts = upcycled.blocks[i].ffn.experts
            hooks.enter_context(experts.register_forward_pre_hook(lambda _, args, i=i: topk_ids.update({i: args[1]})))
        for sample in samples:
            targets_T = sample.targets_BT[0]
            logits = [model.logits(sample.tokens_BT, documents=sample.documents)[0] for model in (dense, upcycled)]
            for i, logits_TV in enumerate(logits):
                losses[i] += F.cross_entropy(logits_TV, targets_T, ignore_index=-1, reduction="sum").item()
            tied_T = torch.zeros_like(targets_T, dtype=torch.bool)
            for i, (_, n_routed) in layers.items():
                group_TKG = (topk_ids[i].sort(dim=1).values // n_routed).unflatten(1, (-1, n_routed))
                tied_T |= (group_TKG != group_TKG[..., :1]).flatten(1).any(1)
            n_compared = int((tied_T.cumsum(0) == 0).sum())
            n_tied, n_tokens = n_tied + int(tied_T.sum()), n_tokens + len(tied_T)
            if n_compared:
                changes.append((logits[1] - logits[0])[:n_compared].abs().max())
    n_targets = sum(sample.n_local_targets for sample in samples)
    max_change = torch.stack(changes).max().item() if changes else 0.0  # NaN if one is NaN
    return Change(losses[0] / n_targets, losses[1] / n_targets, max_change, n_tied, n_tokens)

"""Upcycling: a dense model's feed-forward layers as experts that together compute the same (arXiv:2212.05055).

A dense layer's F hidden channels are cut in S + G shards of an expert's width, F = (S + G) h: the S shared experts hold
the first ones, expert e holds shard e mod G of the others. G neighbours are a virtual group (arXiv:2410.07524): their
rows of the router are equal, so that a token picks whole groups, and each shard is there in every group. The
weights of a group's members then are equal, and those of all K experts of a token sum to route_scale, so each shard's
sum to route_scale / G: `down` makes up for it by G / route_scale. With G = 1 and nothing shared every expert is a copy.

Shapes: C channels, F and h hidden channels of the dense layer and of an expert, E experts, K experts a token, G experts
a group, B samples, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import gcd
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from training.config import MLPConfig, ModelConfig, MoEConfig
from training.errors import UserError
from training.kernels.attention.masks import Documents
from training.model import GPT
from training.model.layers import normal_from_key
from training.weights.hf.layers import with_explicit_sizes

MAX_LOGIT_CHANGE = 1e-4  # change of a logit that is rounding and nothing else
MAX_TIED_SHARE = 1e-3  # share of tokens: thousands of times what chance makes
Sample = tuple[Tensor, Tensor, Documents | None]  # tokens (1, T), targets (1, T), which tokens are a document


class Change(NamedTuple):
    """What upcycling did to a model's outputs."""

    loss_before: float  # nats a token
    loss_after: float
    difference: float  # the largest, of a logit
    n_tied: int  # tokens that got parts of groups; they and what follows them in their samples is not compared
    n_tokens: int

    @property
    def is_exact(self) -> bool:
        """Whether this is rounding and nothing else; not where a difference is no number."""
        return self.difference <= MAX_LOGIT_CHANGE and self.n_tied <= MAX_TIED_SHARE * self.n_tokens

    def __str__(self) -> str:
        torn = f", {self.n_tied} of {self.n_tokens:,} tokens torn between equal scores" if self.n_tied else ""
        return (
            f"loss {self.loss_before:.4f} before, {self.loss_after:.4f} after, "
            f"largest difference of a logit {self.difference:.1e}{torn}"
        )


def resolve_experts(asked: MoEConfig, dense: MLPConfig, n_embd: int, layer: int, where: str) -> MoEConfig:
    """The experts that are asked for, with what is left out as the dense layer of `where` has it.

    Raises UserError where they cannot compute what the dense layer computes.
    """

    def refuse(option: str, reason: str) -> UserError:
        return UserError(f"model.blocks: ffn.{option} of layer {layer} {reason}")

    for option in ("activation", "gated"):
        mine, known = getattr(asked, option), getattr(dense, option)
        if option in asked.model_fields_set and mine != known:
            raise refuse(option, f"is {mine}, and {where} has {known}; leave it out")
    if not asked.renormalize:
        raise refuse("renormalize", f"is false: upcycling {where} needs true, or a token's weights have any sum")
    hidden, n_shared, width = asked.hidden or 4 * n_embd, asked.n_shared, dense.hidden or 4 * n_embd
    common = gcd(asked.n_experts, asked.top_k)
    cuts = [n_shared + g for g in range(1, common + 1) if common % g == 0]
    fits = [width // n for n in cuts if width % n == 0]
    if hidden not in fits:
        n_routed = width // hidden - n_shared
        why = f"makes {width // hidden} of the dense layer's {width} in {where}, {n_shared} for shared experts; "
        why += f"the other {n_routed} must divide top_k {asked.top_k} and n_experts {asked.n_experts}"
        if width % hidden:
            why = f"does not divide the dense layer's {width} in {where}"
        elif n_routed < 1:
            why = f"leaves nothing of the dense layer's {width} in {where} beside {n_shared} for shared experts"
        use = f"use {' or '.join(map(str, fits))}" if fits else "no width fits these numbers of experts"
        raise refuse("hidden", f"is {hidden}, which {why}: {use}")
    return asked.model_copy(update={"activation": dense.activation, "gated": dense.gated})


def upcycled_layers(theirs: ModelConfig, ours: ModelConfig) -> dict[int, tuple[MoEConfig, int]]:
    """For every layer that is dense in theirs and of experts in ours: its section, sizes written out, and G."""
    found = {}
    for i, (known, mine) in enumerate(zip(with_explicit_sizes(theirs), with_explicit_sizes(ours), strict=True)):
        if known.ffn.type == "mlp" and mine.ffn.type == "moe":
            found[i] = mine.ffn, known.ffn.hidden // mine.ffn.hidden - mine.ffn.n_shared
    return found


def describe(found: dict[int, tuple[MoEConfig, int]]) -> str:
    """What becomes of how many layers, in words."""
    (n_experts, n_routed, n_shared), *others = {
        (section.n_experts, n_routed, section.n_shared): None for section, n_routed in found.values()
    }
    cut = "copies" if n_routed + n_shared == 1 else f"groups of {n_routed}"
    cut += f" and {n_shared} shared" if n_shared else ""
    return f"{len(found)} layer{'s' * (len(found) > 1)} of {n_experts} experts, {cut}{', and others' if others else ''}"


def upcycle_weights(
    dense: dict[str, Tensor], theirs: ModelConfig, ours: ModelConfig, fresh: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The dense model's weights as those of ours; its routers' rows are of `fresh`, our model's initial weights.

    What no dense model has (selection biases, loads) is left out: it begins as in any run.
    """
    found = dict(dense)
    for i, (section, n_routed) in upcycled_layers(theirs, ours).items():
        place = f"blocks.{i}.ffn."
        layer = {name.removeprefix(place): found.pop(name) for name in dense if name.startswith(place)}
        row_EC = fresh[f"{place}router.weight"].cpu()
        made = {"router.weight": row_EC[::n_routed].repeat_interleave(n_routed, dim=0)}
        made |= _experts(layer, section, n_routed)
        found |= {place + name: tensor.contiguous() for name, tensor in made.items()}
    return found


def _experts(layer: dict[str, Tensor], section: MoEConfig, n_routed: int) -> Iterator[tuple[str, Tensor]]:
    """The experts and the shared layer of one dense layer, by name."""
    n_copies, n_shared, width = section.n_experts // n_routed, section.n_shared, section.n_shared * section.hidden
    for name, tensor in layer.items():
        matrix, kind = name.split(".")
        if name == "down.bias":
            # Where there are shared experts, one of them has it; else it comes as often as the weights' sum.
            shared, own_C = tensor, torch.zeros_like(tensor) if n_shared else tensor / section.route_scale
            own = own_C.expand(section.n_experts, -1)
        elif matrix == "down":  # (C, F)
            shared, routed = tensor[:, :width], tensor[:, width:]
            own = routed.unflatten(1, (n_routed, section.hidden)).transpose(0, 1) * (n_routed / section.route_scale)
            own = own.repeat(n_copies, 1, 1)
        else:  # (F, C), or (F,)
            shared, routed = tensor[:width], tensor[width:]
            own = routed.unflatten(0, (n_routed, section.hidden))
            own = own.repeat(n_copies, *(1,) * (own.ndim - 1))
        yield f"experts.{matrix}{'_bias' if kind == 'bias' else ''}", own
        if n_shared:
            yield f"shared.{name}", shared


def with_noise(found: dict[str, Tensor], made: Iterable[int], relative: float, seed: int) -> dict[str, Tensor]:
    """The weights with noise on the experts of the layers `made`, `relative` to the deviation of each matrix.

    Every matrix has a generator of its own, keyed by seed and name: the same on every rank.
    """
    noised = dict(found)
    for name in (f"blocks.{i}.ffn.experts.{matrix}" for i in made for matrix in ("up", "gate", "down")):
        if name in found:
            deviation = relative * found[name].double().std().item()  # float64: the same on any number of threads
            noised[name] = found[name] + deviation * normal_from_key(f"{seed}/noise/{name}", found[name].shape)
    return noised


@torch.no_grad()
def compare(dense: GPT, ours: GPT, samples: Sequence[Sample]) -> Change:
    """Both models on the same samples, one at a time.

    Where two groups' scores are equal to the last bit, which happens to about one token in a million, top-k takes a
    part of each. Such a token and those after it in its sample are left out.
    """
    sums, differences, n_tied, n_tokens = [0.0, 0.0], [], 0, 0
    made = upcycled_layers(dense.config, ours.config)
    for tokens_BT, targets_BT, documents in samples:
        with _choices(ours, made) as chosen:
            logits = [model.logits(tokens_BT, documents=documents)[0] for model in (dense, ours)]
        for i, logits_TV in enumerate(logits):
            sums[i] += F.cross_entropy(logits_TV, targets_BT[0], ignore_index=-1, reduction="sum").item()
        torn_T = torch.zeros_like(targets_BT[0], dtype=torch.bool)
        for i, (_, n_routed) in made.items():
            group_TKG = (chosen[i].sort(dim=1).values // n_routed).unflatten(1, (-1, n_routed))
            torn_T |= (group_TKG != group_TKG[..., :1]).flatten(1).any(1)
        n_whole = int((torn_T.cumsum(0) == 0).sum())
        n_tied, n_tokens = n_tied + int(torn_T.sum()), n_tokens + len(torn_T)
        if n_whole:
            differences.append((logits[1] - logits[0])[:n_whole].abs().max())
    n_targets = sum(int((targets_BT >= 0).sum()) for _, targets_BT, _ in samples)
    difference = torch.stack(differences).max().item() if differences else 0.0  # of what is no number, no number
    return Change(sums[0] / n_targets, sums[1] / n_targets, difference, n_tied, n_tokens)


@contextmanager
def _choices(model: GPT, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """The experts (N, K) of every token in these layers, of the forward that is made meanwhile."""
    found: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for i in layers:
            experts = model.blocks[i].ffn.experts
            hooks.enter_context(experts.register_forward_pre_hook(lambda _, given, i=i: found.update({i: given[1]})))
        yield found

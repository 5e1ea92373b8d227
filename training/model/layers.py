"""Linear layers, normalization, activations and rotary positions: the parts that blocks are built from.

Parameters are float32. A layer computes in the dtype of its input and casts its weights to it on every call.
Shapes: B batch, T tokens, C channels, H heads, D head width.
"""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from training.config import Activation, ModelConfig

# A sample's key is below 2^48; the number of a stream of random numbers is above it. Layer i adds i to its streams, and
# a model has at most 10,000 layers: no two streams are the same.
MIXER_DROPOUT, FFN_DROPOUT, EMBEDDING_DROPOUT = (n << 48 for n in (10_000, 20_000, 30_000))  # jitter: 0


class FeedForwardContext(NamedTuple):
    """Facts about the batch for feed-forward layers. The default is for generation: no losses, no metrics."""

    n_tokens: int | None = None  # divides auxiliary losses; None: compute no losses and no routing metrics
    key_B: Tensor | None = None  # int64: one key per sample for random numbers; needed if is_training
    is_training: bool = False  # add noise, apply dropout and drop tokens beyond the experts' capacity

    def for_layer(self, index: int) -> "FeedForwardContext":
        """Return the context with random keys that differ between layers."""
        return self if self.key_B is None else self._replace(key_B=self.key_B + (index << 48))


def normal_from_key(key: str, shape: torch.Size) -> Tensor:
    """Return standard normal numbers, float32 on the CPU, that depend on the key and the shape only."""
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    return torch.randn(shape, generator=generator)


def uniform_from_keys(key_B: Tensor, n_tokens: int, width: int) -> Tensor:
    """Return hashes of (sample key, token, channel) as numbers in [0, 1), float32 (B, T, C).

    They are the same on every device, in every micro-batch, and when activation checkpointing recomputes the layer.
    """
    return (_random_bits(key_B, n_tokens, width) >> 8).float() / 2**24


def dropout(x_BTC: Tensor, share: float, context: FeedForwardContext, stream: int) -> Tensor:
    """Zero a share of the elements and divide the others by the rest of it, in training; else return `x_BTC` itself.

    An element is a function of (sample key, layer, token, channel), as in `uniform_from_keys`. `stream` is one of the
    constants above. The share is rounded to a multiple of 2^-16, for which half of a hash is enough: one hash decides
    on two elements, the channels c and c + ceil(C / 2). The scale is that of the rounded share, so the mean is kept.
    """
    if not share or not context.is_training:
        return x_BTC
    n_tokens, width = x_BTC.shape[1:]
    threshold = round(share * 2**16)
    bits = _random_bits(context.key_B + stream, n_tokens, -(-width // 2))
    is_dropped_BTC = torch.cat([bits & 0xFFFF, bits >> 16], dim=-1)[..., :width] < threshold
    return (x_BTC * (2**16 / (2**16 - threshold))).masked_fill(is_dropped_BTC, 0.0)


_32_BITS = 0xFFFFFFFF


def _random_bits(key_B: Tensor, n_tokens: int, width: int) -> Tensor:
    """Return hashes of (sample key, token, channel), 32 bits each, int64 (B, T, C)."""
    position_TC = _hash(torch.arange(n_tokens * width, device=key_B.device)).view(n_tokens, width)
    key_B = _hash(_hash(key_B >> 32) ^ key_B & _32_BITS)
    return _hash(key_B[:, None, None] ^ position_TC)


def _hash(x: Tensor) -> Tensor:
    """Map 32 bits to 32 bits (Wellons 2018, nullprogram.com/blog/2018/07/31, "lowbias32")."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ x >> shift) * factor & _32_BITS
    return x ^ x >> 16


class Embedding(nn.Embedding):
    """`nn.Embedding` without initial values: a model's come from `stats.init_weights` or a file."""

    def reset_parameters(self) -> None:
        pass  # PyTorch's initializers load torch._dynamo on the meta device, and take time elsewhere


class BigramEmbedding(nn.Module):
    """An embedding of each token and the one before it, from a table whose row is their hash. It begins as zeros.

    Pairs may share a row. The first token of a document has none before it.
    """

    def __init__(self, n_rows: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_rows, width))

    def forward(self, tokens_BS: Tensor, n_new: int, position_BT: Tensor | None) -> Tensor:
        """Return float32 (B, T, C) of the last `n_new` tokens of `tokens_BS`; before them are earlier ones."""
        recent_BS = tokens_BS[:, -n_new - 1 :].long()  # the hash needs 64 bits
        before_BT = F.pad(recent_BS, (1, 0), value=-1)[:, -n_new - 1 : -1]
        if position_BT is not None:
            before_BT = before_BT.masked_fill(position_BT == 0, -1)
        row_BT = _hash(_hash(before_BT + 1) ^ recent_BS[:, -n_new:]) % len(self.weight)
        return F.embedding(row_BT, self.weight)


class Linear(nn.Linear):
    """`nn.Linear` that computes in the dtype of its input, without initial values."""

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class LayerNorm(nn.LayerNorm):
    """LayerNorm (arXiv:1607.06450) that computes in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), bias, self.eps)


RMSNORM_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # dtypes that `_RMSNormOnCPU` handles


class _RMSNormOnCPU(torch.autograd.Function):
    """RMSNorm in float32 for CPUs, where PyTorch's own runs several slower operations.

    The backward is LayerNorm's with a mean of zero, plus the missing term 1/rms x mean(gradient x weight).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        in_float32 = x.float()
        square = torch.linalg.vector_norm(in_float32, dim=-1, keepdim=True).square_()
        inverse_rms = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        return (in_float32 * inverse_rms).mul_(weight.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        dtype = x.dtype
        x, weight, grad = x.float(), weight.float(), grad.float()
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, weight.shape, torch.zeros_like(inverse_rms), inverse_rms, weight, None, [True, True, False]
        )
        mean = (grad @ weight).div_(x.shape[-1])
        return grad_x.add_(inverse_rms * mean[..., None]).to(dtype), grad_weight.to(dtype), None


class RMSNorm(nn.RMSNorm):
    """RMSNorm (arXiv:1910.07467) that computes in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        if x.device.type == "cpu" and x.dtype in RMSNORM_CPU_DTYPES and not torch.compiler.is_compiling():
            return _RMSNormOnCPU.apply(x, weight, self.eps)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


def build_norm(config: ModelConfig) -> nn.Module:
    """Build the model's normalization over n_embd channels."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, config.norm_eps)
    return LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)


class ShortConvolution(nn.Module):
    """Adds to a token's channels a weighted sum of them and of those of the tokens before it (arXiv:2512.17351).

    It begins as the identity. It does not reach over the start of a document.
    """

    def __init__(self, width: int, n_tokens: int):
        super().__init__()
        self.taps = nn.Parameter(torch.zeros(n_tokens, width))

    def forward(self, x_BSC: Tensor, n_new: int, position_BT: Tensor | None) -> Tensor:
        """Return y_BTC of the last `n_new` tokens of `x_BSC`; before them are earlier ones, from a cache."""
        return _ShortConvolution.apply(x_BSC, self.taps.to(x_BSC.dtype), n_new, position_BT)


class _ShortConvolution(torch.autograd.Function):
    """Shifted sums in place: PyTorch's own backward would make a copy of the whole input for each shift."""

    @staticmethod
    def forward(ctx: Any, x_BSC: Tensor, taps_KC: Tensor, n_new: int, position_BT: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_BSC, taps_KC, position_BT)
        y_BTC = x_BSC[:, -n_new:] * (1 + taps_KC[0])
        for distance in range(1, min(len(taps_KC), x_BSC.shape[1])):
            n = min(n_new, x_BSC.shape[1] - distance)  # tokens that have another so far before them
            earlier = x_BSC[:, -n - distance : -distance]
            y_BTC[:, -n:].addcmul_(within_document(earlier, position_BT, distance), taps_KC[distance])
        return y_BTC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTC: Tensor) -> tuple[Tensor | None, ...]:
        x_BTC, taps_KC, position_BT = ctx.saved_tensors  # in training there is no cache
        grad_x_BTC = grad_BTC * (1 + taps_KC[0])
        grad_taps = [(grad_BTC * x_BTC).sum((0, 1))]
        for distance in range(1, len(taps_KC)):
            later = within_document(grad_BTC[:, distance:], position_BT, distance)
            grad_x_BTC[:, :-distance].addcmul_(later, taps_KC[distance])
            grad_taps.append((later * x_BTC[:, :-distance]).sum((0, 1)))
        return grad_x_BTC, torch.stack(grad_taps), None, None


def within_document(x_BNC: Tensor, position_BT: Tensor | None, distance: int) -> Tensor:
    """Return values of the last N tokens; zeros where the token `distance` before is of another document."""
    if position_BT is None:
        return x_BNC
    return x_BNC * (position_BT[:, -x_BNC.shape[1] :] >= distance).unsqueeze(-1)


class _ReLU2(torch.autograd.Function):
    """max(x, 0)^2 with a backward of two operations instead of five."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return (grad * positive).mul_(2)


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu2": _ReLU2.apply,  # arXiv:2109.08668
    "silu": F.silu,
}


def rotary_table(position: Tensor, width: int, theta: float) -> Tensor:
    """Return cosines and sines (arXiv:2104.09864 eq. 15), float32.

    Positions (T,) give (2, T, D); positions (B, T) give (2, B, 1, T, D), one table for all heads.
    """
    frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float32, device=position.device) / width)
    angle = (position.float()[..., None] * frequency).repeat((1,) * position.ndim + (2,))
    angle = angle if position.ndim == 1 else angle[:, None]
    return torch.stack([angle.cos(), angle.sin()])


class _Rotation(torch.autograd.Function):
    """Rotation of channel pairs; the backward rotates the gradient by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TD, sin_TD)
        return _rotate_pairs(x_BHTD, cos_TD, sin_TD, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHTD: Tensor) -> tuple[Tensor, None, None]:
        return _rotate_pairs(grad_BHTD, *ctx.saved_tensors, -1), None, None


def _rotate_pairs(x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor, direction: int) -> Tensor:
    half = x_BHTD.shape[-1] // 2
    if torch.compiler.is_compiling():  # compiles to one kernel; writing two halves compiles to several
        first_D = torch.arange(2 * half, device=x_BHTD.device) < half
        partner_BHTD = x_BHTD.unflatten(-1, (2, half)).flip(-2).flatten(-2)
        return x_BHTD * cos_TD + partner_BHTD * torch.where(first_D, -direction, direction) * sin_TD
    y_BHTD = x_BHTD * cos_TD
    y_BHTD[..., :half].addcmul_(x_BHTD[..., half:], sin_TD[..., :half], value=-direction)
    y_BHTD[..., half:].addcmul_(x_BHTD[..., :half], sin_TD[..., half:], value=direction)
    return y_BHTD


def rotate(x_BHTD: Tensor, rotation_2TD: Tensor) -> Tensor:
    """Apply RoPE: rotate channel pairs (i, i + D/2) of each head, as Transformers pairs them."""
    return _Rotation.apply(x_BHTD, *rotation_2TD.to(x_BHTD.dtype))

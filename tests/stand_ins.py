"""Stand-ins for the flash-attn packages: their signatures and their documented semantics, on any device.

Signatures and semantics are those of flash-attn 2.7.4 (`flash_attn/flash_attn_interface.py`), flash-attn-3 3.0.0
(`hopper/flash_attn_interface.py`) and flash-attn-4 4.0.0b36 (`flash_attn/cute/interface.py`): shapes, order and names
of arguments, defaults, the value for "no window", results and errors. Like theirs, the computation is a custom
operator, which torch.compile does not trace into.

Shapes: N tokens of all samples, H query heads, G heads of keys and values, D width of queries and keys, E of values.
"""

import sys
from types import ModuleType

import torch
from torch import Tensor

calls: list[dict] = []  # the arguments of each call of a package


def weights(
    q_NHD: Tensor, k_NGD: Tensor, ends: Tensor, left: int, right: int, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """(softmax of the scores, derivative of their soft-cap), both (H, N, N).

    A query at position i of its document sees the keys i - left .. i + right of it; a negative number is no bound.
    """
    place = torch.arange(len(q_NHD))
    document = torch.searchsorted(ends[1:].to(torch.int64), place, right=True)
    ahead = place - place[:, None]  # key position - query position
    visible = (document == document[:, None]) & ((left < 0) | (ahead >= -left)) & ((right < 0) | (ahead <= right))
    k_NHD = k_NGD.repeat_interleave(q_NHD.shape[1] // k_NGD.shape[1], 1)
    scores, slope = torch.einsum("ihd,jhd->hij", q_NHD, k_NHD) * scale, torch.ones(())
    if softcap > 0:
        scores, slope = softcap * torch.tanh(scores / softcap), 1 - torch.tanh(scores / softcap) ** 2
    return scores.masked_fill(~visible, float("-inf")).softmax(-1), slope


@torch.library.custom_op("stand_in::attend", mutates_args=())
def attend(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, left: int, right: int, scale: float, softcap: float
) -> Tensor:
    p_HNN, _ = weights(q, k, ends, left, right, scale, softcap)
    return torch.einsum("hij,jhe->ihe", p_HNN, v.repeat_interleave(q.shape[1] // k.shape[1], 1)).contiguous()


@attend.register_fake
def _(q, k, v, ends, left, right, scale, softcap):  # noqa: ARG001
    return q.new_empty(*q.shape[:2], v.shape[-1])


@torch.library.custom_op("stand_in::attend_backward", mutates_args=())
def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, left: int, right: int, scale: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    p_HNN, slope = weights(q, k, ends, left, right, scale, softcap)
    k_NHD, v_NHE = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    dp_HNN = torch.einsum("ihe,jhe->hij", grad, v_NHE)
    ds_HNN = p_HNN * (dp_HNN - (p_HNN * dp_HNN).sum(-1, keepdim=True)) * slope * scale
    dk_NHD, dv_NHE = torch.einsum("hij,ihd->jhd", ds_HNN, q), torch.einsum("hij,ihe->jhe", p_HNN, grad)
    shared = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (dk_NHD, dv_NHE))
    return torch.einsum("hij,jhd->ihd", ds_HNN, k_NHD).contiguous(), *shared


@attend_backward.register_fake
def _(grad, q, k, v, ends, left, right, scale, softcap):  # noqa: ARG001
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def keep(ctx, inputs, output):  # noqa: ARG001
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def backward(ctx, grad):
    return (*attend_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None, None)


attend.register_autograd(backward, setup_context=keep)


def check(q: Tensor, k: Tensor, v: Tensor, one_width: bool, **options) -> None:
    """Fail on inputs that the packages reject."""
    assert all(x.stride(-1) == 1 for x in (q, k, v)), "the last dimension has to be contiguous"
    assert q.shape[-1] == k.shape[-1] and q.shape[-2] % k.shape[-2] == 0 and k.shape[:-1] == v.shape[:-1]
    assert not one_width or q.shape[-1] == v.shape[-1], "one width only"
    if not torch.compiler.is_compiling():
        calls.append(options | {"q": tuple(q.shape), "k": tuple(k.shape), "v": tuple(v.shape)})


def of_samples(q: Tensor, k: Tensor, v: Tensor, bounds: tuple[int, int], scale: float | None, softcap: float) -> Tensor:
    """(B, T, H, D), (B, T, G, D), (B, T, G, E) -> (B, T, H, E)."""
    ends = ends_of(*q.shape[:2])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return attend(*(x.flatten(0, 1) for x in (q, k, v)), ends, *bounds, scale, softcap).unflatten(0, q.shape[:2])


def ends_of(n_samples: int, n_tokens: int) -> Tensor:
    """Return 0 and the end of each sample, for samples packed one after another."""
    return torch.arange(0, (n_samples + 1) * n_tokens, n_tokens)


def of_documents(
    q: Tensor, k: Tensor, v: Tensor, ends: tuple[Tensor, Tensor], bounds: tuple[int, int], scale, softcap: float
) -> Tensor:
    """(N, H, D), (N, G, D), (N, G, E) -> (N, H, E)."""
    for end in ends:
        assert end.dtype == torch.int32 and end.ndim == 1 and end.is_contiguous()
    return attend(q, k, v, ends[0], *bounds, q.shape[-1] ** -0.5 if scale is None else scale, softcap)


def bounds(causal: bool, window_size: tuple, unbounded: int | None) -> tuple[int, int]:
    """Return (left, right), -1 for no bound; in the package's window_size that is `unbounded`."""
    assert all(size == unbounded if size is None or size < 0 else True for size in window_size)
    left, right = (-1 if size is None else size for size in window_size)
    return left, 0 if causal else right


class Two:
    """flash_attn"""

    @staticmethod
    def flash_attn_func(
        q,
        k,
        v,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        check(q, k, v, True, deterministic=deterministic)
        assert (dropout_p, alibi_slopes, return_attn_probs) == (0.0, None, False)
        return of_samples(q, k, v, bounds(causal, window_size, -1), softmax_scale, softcap)

    @staticmethod
    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        check(q, k, v, True, deterministic=deterministic, ends=cu_seqlens_q, longest=(max_seqlen_q, max_seqlen_k))
        assert (dropout_p, alibi_slopes, return_attn_probs, block_table) == (0.0, None, False, None)
        ends = (cu_seqlens_q, cu_seqlens_k)
        return of_documents(q, k, v, ends, bounds(causal, window_size, -1), softmax_scale, softcap)


class Three:
    """flash_attn_interface"""

    @staticmethod
    def flash_attn_func(
        q,
        k,
        v,
        softmax_scale=None,
        causal=False,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_attn_probs=False,
    ):
        check(q, k, v, True, deterministic=deterministic)
        assert (qv, q_descale, k_descale, v_descale, pack_gqa) == (None,) * 5
        assert (attention_chunk, num_splits, sm_margin, return_attn_probs) == (0, 1, 0, False)
        return of_samples(q, k, v, bounds(causal, window_size, -1), softmax_scale, softcap)

    @staticmethod
    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_q=None,
        seqused_k=None,
        softmax_scale=None,
        causal=False,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_attn_probs=False,
    ):
        check(q, k, v, True, deterministic=deterministic, ends=cu_seqlens_q, longest=(max_seqlen_q, max_seqlen_k))
        assert (seqused_q, seqused_k, qv, q_descale, k_descale, v_descale, pack_gqa) == (None,) * 7
        assert (attention_chunk, num_splits, sm_margin, return_attn_probs) == (0, 1, 0, False)
        ends = (cu_seqlens_q, cu_seqlens_k)
        return of_documents(q, k, v, ends, bounds(causal, window_size, -1), softmax_scale, softcap)


class Four:
    """flash_attn.cute; the arguments after `deterministic` are left out"""

    @staticmethod
    def flash_attn_func(
        q,
        k,
        v,
        qv=None,
        gather_kv_indices=None,
        softmax_scale=None,
        causal=False,
        window_size=(None, None),
        learnable_sink=None,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
    ):
        check(q, k, v, False, deterministic=deterministic)
        assert (qv, gather_kv_indices, learnable_sink, num_splits, pack_gqa) == (None, None, None, 1, None)
        return of_samples(q, k, v, bounds(causal, window_size, None), softmax_scale, softcap), None

    @staticmethod
    def flash_attn_varlen_func(
        q,
        k,
        v,
        qv=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        min_seqlen_k=None,
        seqused_q=None,
        seqused_k=None,
        gather_kv_indices=None,
        page_table=None,
        softmax_scale=None,
        causal=False,
        window_size=(None, None),
        learnable_sink=None,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
    ):
        check(q, k, v, False, deterministic=deterministic, ends=cu_seqlens_q, longest=(max_seqlen_q, max_seqlen_k))
        assert (qv, min_seqlen_k, seqused_q, seqused_k, gather_kv_indices, page_table) == (None,) * 6
        assert (learnable_sink, num_splits, pack_gqa) == (None, 1, None)
        ends = (cu_seqlens_q, cu_seqlens_k)
        return of_documents(q, k, v, ends, bounds(causal, window_size, None), softmax_scale, softcap), None


def install(monkeypatch) -> None:
    """Register the stand-ins under the import names of the packages."""
    calls.clear()
    for package in (Two, Three, Four):
        module = ModuleType(package.__doc__.split(";")[0])
        for name in ("flash_attn_func", "flash_attn_varlen_func"):
            setattr(module, name, getattr(package, name))
        monkeypatch.setitem(sys.modules, module.__name__, module)


def mode() -> tuple[int, bool]:
    """Return PyTorch's deterministic mode, and True if it fills new memory."""
    return torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory


def install_in_torch() -> torch.library.Library:
    """Register CPU operators for torch's own `varlen_attn`, for as long as the returned library is referenced."""
    calls.clear()
    library = torch.library.Library("aten", "IMPL")

    def forward(q, k, v, ends, _, longest, *__, scale=None, window_size_left=None, window_size_right=None, **___):
        check(q, k, v, True, ends=ends, longest=(longest, longest))
        y = attend(q, k, v, ends, window_size_left, window_size_right, scale or q.shape[-1] ** -0.5, 0.0)
        return y, q.new_zeros(q.shape[1], len(q)), q.new_zeros(2), q.new_zeros(0), q.new_zeros(0)

    def backward(grad, q, k, v, y, lse, ends, *_, scale=None, window_size_left=None, window_size_right=None):  # noqa: ARG001
        options = window_size_left, window_size_right, scale or q.shape[-1] ** -0.5, 0.0
        return attend_backward(grad.contiguous(), q, k, v, ends, *options)

    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    install_flash(library)
    return library


def install_flash(library: torch.library.Library) -> None:
    """Register CPU operators for torch's flash kernel: (B, H, T, D); heads may share keys; D % 8 == 0."""

    def heads_first(x):  # other strides than the operator's: callers cannot rely on them
        return x.transpose(1, 2).contiguous()

    def forward(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
        assert is_causal and dropout_p == 0.0 and not return_debug_mask and q.shape[-1] % 8 == 0
        projections = [x.transpose(1, 2) for x in (q, k, v)]
        check(*projections, True)
        y, none = of_samples(*projections, (-1, 0), scale, 0.0), q.new_zeros(0)
        return heads_first(y), q.new_ones(q.shape[:3]), None, None, q.shape[2], k.shape[2], none, none, none

    def backward(grad, q, k, v, y, lse, _, __, n_queries, n_keys, dropout_p, is_causal, *___, scale=None):
        assert is_causal and dropout_p == 0.0 and (n_queries, n_keys) == (q.shape[2], k.shape[2])
        assert y.shape == q.shape and lse.eq(1).all()
        calls.append({"mode": mode()})
        packed = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (grad, q, k, v))
        gradients = attend_backward(*packed, ends_of(len(q), q.shape[2]), -1, 0, scale, 0.0)
        return tuple(heads_first(x.unflatten(0, (len(q), -1))) for x in gradients)

    library.impl("_scaled_dot_product_flash_attention", forward, "CPU")
    library.impl("_scaled_dot_product_flash_attention_backward", backward, "CPU")

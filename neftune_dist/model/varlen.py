"""The operator of `model.attention=varlen`: attention within packed documents, and its gradient.

One operator, opaque to `torch.compile`: PyTorch's FlashAttention for ragged batches on a GPU
(version 3 or 4 where it is installed and fits), its CPU counterpart document by document elsewhere.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neftune_dist.compat.torch import (
    attention_on_cpu,
    attention_on_cpu_backward,
    flash_attention,
    flash_attention_backward,
)

# On a CPU, the backward of a shorter document takes a third of the time in float32, also with
# instructions for bf16 (896 tokens on an AMD EPYC with AVX512-BF16, in documents of 56: 4.5 against
# 13.8 ms, of 256: 9.9 against 11.6, of 1,024: 38 against 29).
_FLOAT32_LENGTH = 256
# Versions of FlashAttention with kernels for a GPU's architecture, the fastest first.
_NEWER = {9: ("FA3", "FA4"), 10: ("FA4",)}


def varlen_kernel(device: torch.device, dtype: str, windowed: bool = False) -> str:
    """Activate the fastest installed kernel for `VARLEN` in this process; return its name.

    PyTorch's own is FlashAttention 2. Newer versions are separate packages.

    Args:
        windowed: whether a layer of the model has a sliding window, for which FlashAttention 4
            has no backward.
    """
    if device.type != "cuda":
        return "varlen (document by document, by FlashAttention for CPUs)"
    if dtype == "fp32":
        return "varlen (document by document: FlashAttention has no float32)"
    for name in _NEWER.get(torch.cuda.get_device_capability(device)[0], ()):
        # The package is missing or has no kernels for this GPU, or torch does not know it.
        unusable = (ImportError, ValueError, AttributeError, RuntimeError)
        if not (windowed and name == "FA4"):
            with suppress(*unusable):
                torch.nn.attention.activate_flash_attention_impl(name)
                return f"varlen ({name})"
    return "varlen (FA2)"


def by_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int,
    dropout: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """The operator's result with dropout and in any dtype, (1, num_tokens, num_heads, head_dim)."""
    outs = []
    for q, k, v in _documents(cu_seqlens, query, key, value):
        mask = _window_mask(q, window)
        if sinks is not None:  # a first key, whose logit is the sink and whose value is 0
            mask = _mask(q, window or q.shape[2])
            column = sinks.to(q.dtype)[:, None, None].expand(-1, q.shape[2], 1)
            mask = torch.cat([column, mask.expand(len(sinks), -1, -1)], dim=2)[None]
            k, v = (F.pad(tensor, (0, 0, 1, 0)) for tensor in (k, v))
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=dropout,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outs.append(out.transpose(1, 2))
    return torch.cat(outs, dim=1)


def _window_mask(query: Tensor, window: int) -> Tensor | None:
    """`_mask`; None where the document fits the window."""
    return _mask(query, window) if 0 < window < query.shape[2] else None


def _mask(query: Tensor, window: int) -> Tensor:
    """The mask to add to a document's logits, (length, length); query: (1, num_heads, length,
    head_dim)."""
    index = torch.arange(query.shape[2], device=query.device)
    distance = index[:, None] - index[None]
    seen = (distance >= 0) & (distance < window)
    return torch.zeros_like(seen, dtype=query.dtype).masked_fill_(~seen, -torch.inf)


@torch.library.custom_op("neftune_dist::varlen_attention", mutates_args=())
def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention within documents.

    Args:
        query: (num_tokens, num_heads, head_dim).
        key, value: (num_tokens, num_key_value_heads, head_dim).
        window: tokens that a token sees, 0: all before it.
        sinks: (num_heads,), a further logit of every token, whose value is 0.

    Returns:
        The attended values, shaped as query; log-sum-exps (num_heads, num_tokens), float32 or
        float64.
    """
    forward = _flash_forward if query.is_cuda else _cpu_forward
    out, lse = forward(query, key, value, cu_seqlens, max_seqlen, scale, window)
    if sinks is None:
        return out, lse
    whole = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    return out.mul_((lse - whole).exp().t()[..., None]), whole


def _cpu_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    _max_seqlen: int,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """The operator on a CPU, document by document."""
    outs, lses = [], []
    for q, k, v in _documents(cu_seqlens, *map(_by_heads, (query, key, value))):
        mask = _window_mask(q, window)
        out, lse = attention_on_cpu(q, k, v, 0.0, mask is None, attn_mask=mask, scale=scale)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)


@torch.library.custom_op("neftune_dist::varlen_attention_backward", mutates_args=())
def _varlen_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    if query.is_cuda:
        return _flash_backward(
            grad, query, key, value, out, lse, cu_seqlens, max_seqlen, scale, window
        )
    grads: tuple[list[Tensor], ...] = ([], [], [])
    ends = cu_seqlens.tolist()
    pieces = _documents(cu_seqlens, *map(_by_heads, (query, key, value, grad, out)))
    for i, piece in enumerate(pieces):
        if piece[0].shape[2] <= _FLOAT32_LENGTH and query.dtype.itemsize < 4:
            piece = [part.float() for part in piece]
        q, k, v, dout, o = piece
        mask = _window_mask(q, window)
        found = attention_on_cpu_backward(
            dout,
            q,
            k,
            v,
            o,
            lse[None, :, ends[i] : ends[i + 1]],
            0.0,
            mask is None,
            attn_mask=mask,
            scale=scale,
        )
        for whole, part in zip(grads, found, strict=True):
            whole.append(part[0].transpose(0, 1).to(query.dtype))
    dq, dk, dv = map(torch.cat, grads)
    return dq, dk, dv


def _flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """The operator on a GPU. FlashAttention's results have the query's strides, but `register_fake`
    promises contiguous ones to compiled graphs. So they are copied where the query was put together
    from parts, as in Phi and GPT-NeoX."""
    out, lse, *_ = flash_attention(
        query,
        key,
        value,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        0.0,
        True,
        False,
        scale=scale,
        **_window_sizes(window),
    )
    return out.contiguous(), lse


def _flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients on a GPU, contiguous."""
    dq, dk, dv = flash_attention_backward(
        grad,
        query,
        key,
        value,
        out,
        lse,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        0.0,
        True,
        torch.zeros(2, dtype=torch.uint64, device=query.device),  # of dropout, which is 0
        torch.empty(0, device=query.device),
        scale=scale,
        **_window_sizes(window),
    )
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _window_sizes(window: int) -> dict[str, int | None]:
    """FlashAttention's arguments for a window. None means no window: FlashAttention 4 refuses sizes
    in its backward."""
    if not window:
        return {"window_size_left": None, "window_size_right": None}
    return {"window_size_left": window - 1, "window_size_right": 0}


def _documents(cu_seqlens: Tensor, *tensors: Tensor) -> Any:
    """Tuples of the documents' parts of tensors (1, heads, num_tokens, head_dim)."""
    lengths = cu_seqlens.diff().tolist()
    return zip(*(tensor.split(lengths, dim=2) for tensor in tensors), strict=True)


def _by_heads(tensor: Tensor) -> Tensor:
    """(num_tokens, heads, head_dim) as (1, heads, num_tokens, head_dim)."""
    return tensor.transpose(0, 1)[None]


@_varlen.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    kind = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_empty((query.shape[1], query.shape[0]), dtype=kind)
    return query.new_empty(query.shape), lse


@_varlen_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, cu_seqlens, *ctx.settings, sinks = inputs
    ctx.save_for_backward(query, key, value, *output, cu_seqlens, sinks)


def _gradient(ctx: Any, grad: Tensor, _grad_lse: Any) -> tuple[Tensor | None, ...]:
    """With sinks, too: the backward needs the probabilities, which it computes from log-sum-exps,
    and the products of the result and its gradient; both are saved with the sinks' part in them."""
    *saved, sinks = ctx.saved_tensors
    found = torch.ops.neftune_dist.varlen_attention_backward(grad, *saved, *ctx.settings)
    return (*found, None, None, None, None, _sinks_gradient(grad, saved[3], saved[4], sinks))


def _sinks_gradient(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor | None:
    """Softmax's gradient for a logit whose value is 0: -p * (out . grad), summed over tokens."""
    if sinks is None:
        return None
    kept = (sinks.to(lse.dtype)[:, None] - lse).exp()
    products = (out.to(lse.dtype) * grad.to(lse.dtype)).sum(-1)
    return -(kept * products.t()).sum(1).to(sinks.dtype)


_varlen.register_autograd(_gradient, setup_context=_keep)


VARLEN_OPERATOR = torch.ops.neftune_dist.varlen_attention.default

"""The operator of `model.attention=varlen`: attention within packed documents, and its gradient.

One operator, opaque to `torch.compile`: FlashAttention for ragged batches on a GPU (`flash`), its
CPU counterpart document by document elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from neftune_dist.compat.torch import attention_on_cpu, attention_on_cpu_backward
from neftune_dist.model.flash import flash_attend, flash_gradients, flash_parts
from neftune_dist.model.ulysses import block_rows

# On a CPU, the backward of a shorter document takes a third of the time in float32, also with
# instructions for bf16 (896 tokens on an AMD EPYC with AVX512-BF16, in documents of 56: 4.5 against
# 13.8 ms, of 256: 9.9 against 11.6, of 1,024: 38 against 29).
_FLOAT32_LENGTH = 256


def by_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int,
    dropout: float,
    sinks: Tensor | None = None,
    blocks: Sequence[int] | None = None,
) -> Tensor:
    """The operator's result with dropout and in any dtype, (1, num_queries, num_heads,
    head_dim)."""
    # Part of the result even without a query, so that autograd's all-to-all exchanges run on every
    # rank.
    empty = torch.cat([tensor[:, :, :0] for tensor in (query, key, value)], dim=1)
    outs, at = [empty[:, : query.shape[1]].transpose(1, 2)], 0
    shared = query.shape[1] != key.shape[1]  # several heads have the same keys
    for rows, tokens, _ in _documents(cu_seqlens, query.shape[2], key.shape[2], blocks):
        q, k, v = query[:, :, rows], key[:, :, tokens], value[:, :, tokens]
        mask = _mask_unless_causal(q, k, window)
        if sinks is not None:  # a first key, whose logit is the sink and whose value is 0
            mask = _mask(q, k, window)
            column = sinks.to(q.dtype)[:, None, None].expand(-1, q.shape[2], 1)
            mask = torch.cat([column, mask.expand(len(sinks), -1, -1)], dim=2)[None]
            k, v = (F.pad(tensor, (0, 0, 1, 0)) for tensor in (k, v))
        attended = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, dropout_p=dropout, scale=scale, enable_gqa=shared
        )
        outs.append(F.pad(attended.transpose(1, 2), (0, 0, 0, 0, rows.start - at, 0)))
        at = rows.stop
    return F.pad(torch.cat(outs, dim=1), (0, 0, 0, 0, 0, query.shape[2] - at))


def _documents(
    cu_seqlens: Tensor, num_queries: int, num_keys: int, blocks: Sequence[int] | None
) -> Iterator[tuple[slice, slice, None]]:
    """For each document, or part of one in a block: the rows of its queries, and the keys that they
    see. The last query is at the position of the last key."""
    ends = cu_seqlens.tolist()
    if ends[-1] != num_keys:
        raise RuntimeError(f"documents of {ends[-1]} tokens in all, and {num_keys} tokens")
    for row, first, end in block_rows(num_queries, blocks or (0, num_queries)):
        for start, stop in pairwise(ends):
            low, high = max(start, first), min(stop, end)
            if low < high:
                yield slice(row + low - first, row + high - first), slice(start, high), None


def _mask_unless_causal(query: Tensor, key: Tensor, window: int) -> Tensor | None:
    """`_mask`; None where it is that of a whole document without a window."""
    is_whole = query.shape[2] == key.shape[2]
    return None if is_whole and not 0 < window < key.shape[2] else _mask(query, key, window)


def _mask(query: Tensor, key: Tensor, window: int) -> Tensor:
    """The mask to add to the logits of a document's last queries, (num_queries, num_keys).

    Args:
        query, key: (1, num_heads, number, head_dim).
        window: tokens that a token sees, 0: all before it.
    """
    index = torch.arange(key.shape[2], device=query.device)
    distance = index[-query.shape[2] :, None] - index[None]
    seen = (distance >= 0) & (distance < (window or key.shape[2]))
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
    blocks: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention within documents.

    Args:
        query: (num_queries, num_heads, head_dim).
        key, value: (num_tokens, num_key_value_heads, head_dim).
        window: tokens that a token sees, 0: all before it.
        sinks: (num_heads,), a further logit of every token, whose value is 0.
        blocks: empty where the queries are those of all tokens. Else they are equally long blocks,
            and this holds each block's first token and the end of its tokens; rows of the block
            beyond them are filling, whose result is 0.

    Returns:
        The attended values, shaped as query; log-sum-exps (num_heads, num_queries), float32 or
        float64.
    """
    settings = cu_seqlens, (max_seqlen, scale, window), blocks
    out, lse = attend(_kernel(query), (query, key, value), *settings)
    if sinks is None:
        return out, lse
    whole = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    return out.mul_((lse - whole).exp().t()[..., None]), whole


class Kernel(NamedTuple):
    """How a device computes attention: part by part, with one call of a kernel for each.

    Attributes:
        parts: yields for each part the rows of its queries, the keys that they see, and its
            documents' lengths as the other two functions take them.
        attend: computes a part's attended values and log-sum-exps.
        gradients: computes the gradients of a part's queries, keys and values.
    """

    parts: Callable[..., Iterator[tuple[slice, slice, Any]]]
    attend: Callable[..., tuple[Tensor, Tensor]]
    gradients: Callable[..., tuple[Tensor, ...]]


def _kernel(query: Tensor) -> Kernel:
    return FLASH if query.is_cuda else CPU


def attend(
    kernel: Kernel,
    qkv: tuple[Tensor, Tensor, Tensor],
    cu_seqlens: Tensor,
    settings: tuple[int, float, int],
    blocks: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    """The operator without sinks; `settings` are its max_seqlen, scale and window.

    FlashAttention's results have the query's strides, but `register_fake` promises contiguous ones
    to compiled graphs. So they are copied where the query was put together from parts, as in Phi
    and GPT-NeoX.
    """
    if kernel is FLASH and not blocks:
        out, lse = kernel.attend(qkv, (cu_seqlens, cu_seqlens), *settings)
        return out.contiguous(), lse
    query, key, value = qkv
    out, lse = query.new_zeros(query.shape), _empty_lse(query).zero_()
    for rows, tokens, lengths in kernel.parts(cu_seqlens, len(query), len(key), blocks):
        part = query[rows], key[tokens], value[tokens]
        out[rows], lse[:, rows] = kernel.attend(part, lengths, *settings)
    return out, lse


def gradients(
    kernel: Kernel,
    given: tuple[Tensor, ...],
    cu_seqlens: Tensor,
    settings: tuple[int, float, int],
    blocks: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values, contiguous.

    Args:
        given: the gradient of the result, query, key, value, the result, log-sum-exps.
    """
    if kernel is FLASH and not blocks:
        found = kernel.gradients(given, (cu_seqlens, cu_seqlens), *settings)
        dq, dk, dv = (part.contiguous() for part in found)
        return dq, dk, dv
    grad, query, key, value, out, lse = given
    # Where several blocks add to them, the gradients of keys are summed in float32 at least.
    dtype = torch.promote_types(key.dtype, torch.float32) if blocks else key.dtype
    dq = query.new_zeros(query.shape)
    dk, dv = (tensor.new_zeros(tensor.shape, dtype=dtype) for tensor in (key, value))
    for rows, tokens, lengths in kernel.parts(cu_seqlens, len(query), len(key), blocks):
        part = grad[rows], query[rows], key[tokens], value[tokens], out[rows], lse[:, rows]
        dq[rows], part_k, part_v = kernel.gradients(part, lengths, *settings)
        dk[tokens] += part_k
        dv[tokens] += part_v
    return dq, dk.to(key.dtype), dv.to(value.dtype)


def _attend_on_cpu(
    qkv: tuple[Tensor, ...], _lengths: None, _max_seqlen: int, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    q, k, v = map(_by_heads, qkv)
    mask = _mask_unless_causal(q, k, window)
    out, lse = attention_on_cpu(q, k, v, 0.0, mask is None, attn_mask=mask, scale=scale)
    return out[0].transpose(0, 1), lse[0]


def _gradients_on_cpu(
    given: tuple[Tensor, ...], _lengths: None, _max_seqlen: int, scale: float, window: int
) -> tuple[Tensor, ...]:
    *parts, lse = given
    key = parts[2]
    if len(key) <= _FLOAT32_LENGTH and key.dtype.itemsize < 4:
        parts = [part.float() for part in parts]
    dout, q, k, v, out = map(_by_heads, parts)
    mask = _mask_unless_causal(q, k, window)
    found = attention_on_cpu_backward(
        *(dout, q, k, v, out, lse[None], 0.0, mask is None), attn_mask=mask, scale=scale
    )
    return tuple(part[0].transpose(0, 1) for part in found)


CPU = Kernel(_documents, _attend_on_cpu, _gradients_on_cpu)
FLASH = Kernel(flash_parts, flash_attend, flash_gradients)


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
    blocks: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    given = grad, query, key, value, out, lse
    return gradients(_kernel(query), given, cu_seqlens, (max_seqlen, scale, window), blocks)


def _empty_lse(query: Tensor) -> Tensor:
    """Memory for log-sum-exps, (num_heads, num_queries)."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty((query.shape[1], query.shape[0]), dtype=dtype)


def _by_heads(tensor: Tensor) -> Tensor:
    """(num_tokens, heads, head_dim) as (1, heads, num_tokens, head_dim)."""
    return tensor.transpose(0, 1)[None]


@_varlen.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), _empty_lse(query)


@_varlen_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, cu_seqlens, *ctx.settings, sinks, blocks = inputs
    ctx.settings.append(blocks)
    ctx.save_for_backward(query, key, value, *output, cu_seqlens, sinks)


def _gradient(ctx: Any, grad: Tensor, _grad_lse: Any) -> tuple[Tensor | None, ...]:
    """The gradients of all inputs; right with sinks too.

    The backward kernel computes the probabilities from the log-sum-exps, and the softmax's
    correction from the result and its gradient. Result and log-sum-exps are saved after the sinks
    have been added to them, so both come out as with sinks.
    """
    *saved, sinks = ctx.saved_tensors
    found = torch.ops.neftune_dist.varlen_attention_backward(grad, *saved, *ctx.settings)
    none = (None,) * 4  # of the lengths, the scale and the window
    return (*found, *none, _sinks_gradient(grad, saved[3], saved[4], sinks), None)


def _sinks_gradient(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor | None:
    """Softmax's gradient for a logit whose value is 0: -p * (out . grad), summed over tokens."""
    if sinks is None:
        return None
    kept = (sinks.to(lse.dtype)[:, None] - lse).exp()
    products = (out.to(lse.dtype) * grad.to(lse.dtype)).sum(-1)
    return -(kept * products.t()).sum(1).to(sinks.dtype)


_varlen.register_autograd(_gradient, setup_context=_keep)


VARLEN_OPERATOR = torch.ops.neftune_dist.varlen_attention.default

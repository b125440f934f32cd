"""Attention within documents that lie packed behind each other in one row.

Registered with transformers' attention interface under `VARLEN` and `FLEX`; where the documents
begin and end comes down to it as arguments of the model's forward (`packed_arguments`). No mask of
tokens x tokens is ever built. `VARLEN` is one operator, opaque to `torch.compile`: PyTorch's
FlashAttention for ragged batches on a GPU (version 3 or 4 where it is installed and fits), its CPU
counterpart document by document elsewhere. `FLEX` is FlexAttention under a mask of blocks.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex
from transformers import AttentionInterface

from neftune_dist.model.ulysses import to_heads, to_slices

VARLEN = "neftune_dist_varlen"
FLEX = "neftune_dist_flex"

_aten: Any = torch.ops.aten


def implementation(attention: str, packing: bool) -> str:
    """transformers' name for `model.attention`: auto is varlen where packed, else sdpa."""
    if attention == "auto":
        attention = "varlen" if packing else "sdpa"
    return {"varlen": VARLEN, "flex": FLEX}.get(attention, attention)


def packed_arguments(model: Any, cu_seqlens: Tensor, longest: int) -> dict[str, Any]:
    """What the forward of a packed model is given beside tokens and positions.

    Args:
        cu_seqlens: int32 (num_documents + 1,), cumulative lengths; on the model's device.
        longest: tokens of the longest document.
    """
    if model.config._attn_implementation == FLEX:
        return {"document_mask": _document_mask(cu_seqlens)}
    # Rounded up: a number that changes from batch to batch would have blocks compiled anew.
    return {"cu_seqlens": cu_seqlens, "max_seqlen": 1 << (longest - 1).bit_length()}


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each document to itself alone.

    Args:
        query: (1, num_heads, num_tokens, head_dim). key, value: (1, num_key_value_heads, ...).
            Where sequences are shared (`ulysses`), this rank's tokens.
        cu_seqlens: int32 (num_documents + 1,), from 0 to num_tokens. max_seqlen: no document is
            longer.
        sliding_window: tokens that a token sees, itself counted.

    Returns:
        (1, num_tokens, num_heads, head_dim), and no weights.

    Raises:
        RuntimeError: the model asks for more than that (a mask, capped logits, attention sinks).
    """
    _refuse(module, cu_seqlens, attention_mask, softcap, s_aux)
    assert cu_seqlens is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = sliding_window or 0
    query, key, value = to_heads(query, key, value)
    if dropout or (query.is_cuda and query.dtype == torch.float32):  # FlashAttention has neither
        out = _by_document(query, key, value, cu_seqlens, scale, window, dropout)
        return to_slices(out), None
    out, _lse = torch.ops.neftune_dist.varlen_attention(
        *(each[0].transpose(0, 1) for each in (query, key, value)),
        cu_seqlens,
        max_seqlen,
        scale,
        window,
    )
    return to_slices(out[None]), None


def flex_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    document_mask: flex.BlockMask | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The same as `varlen_attention`, by FlexAttention; without dropout and sliding windows."""
    _refuse(module, document_mask, attention_mask, softcap, s_aux)
    if dropout or sliding_window:
        raise RuntimeError(
            f"{type(module).__name__} has dropout or a sliding window in its attention, which "
            "model.attention=flex does not: use varlen."
        )
    out = _flex(
        query,
        key,
        value,
        block_mask=document_mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2), None


AttentionInterface.register(VARLEN, varlen_attention)
AttentionInterface.register(FLEX, flex_attention)


def varlen_kernel(device: torch.device, dtype: str) -> str:
    """What `VARLEN` is run by. FlashAttention 3 is switched on for a Hopper GPU, and 4 for a
    Blackwell, where its package is installed; PyTorch's own is 2."""
    if device.type != "cuda":
        return "varlen (document by document, by FlashAttention for CPUs)"
    if dtype == "fp32":
        return "varlen (document by document: FlashAttention has no float32)"
    newest = {9: "FA3", 10: "FA4"}.get(torch.cuda.get_device_capability(device)[0])
    if newest:
        # Without the package, or in a torch that knows nothing of it.
        with suppress(ImportError, ValueError, AttributeError):
            torch.nn.attention.activate_flash_attention_impl(newest)
            return f"varlen ({newest})"
    return "varlen (FA2)"


def _refuse(
    module: nn.Module, documents: Any, mask: Tensor | None, softcap: float | None, sinks: Any
) -> None:
    refused = {
        "hands no documents to": documents is None,
        "hands a mask to": mask is not None,
        "caps the logits of": softcap is not None,
        "uses attention sinks in": sinks is not None,
        "lets tokens see later ones in": not getattr(module, "is_causal", True),
    }
    for what, is_so in refused.items():
        if is_so:
            raise RuntimeError(
                f"{type(module).__name__} {what} its attention: documents of this model cannot be "
                "packed; set data.packing=false."
            )


# FlexAttention is no faster than plain attention unless compiled, and on a CPU has no backward.
def _flex(*args: Any, **kwargs: Any) -> Tensor:
    run = _compiled_flex if args[0].is_cuda else flex.flex_attention
    out: Tensor = run(*args, **kwargs)
    return out


_compiled_flex = torch.compile(flex.flex_attention, dynamic=True)


def _document_mask(cu_seqlens: Tensor) -> flex.BlockMask:
    num_tokens = int(cu_seqlens[-1])
    tokens = torch.arange(num_tokens, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, tokens, right=True)

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (document[query] == document[key]) & (query >= key)

    return flex.create_block_mask(sees, None, None, num_tokens, num_tokens, cu_seqlens.device)


def _by_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int,
    dropout: float,
) -> Tensor:
    """What the operator does, with dropout and in any dtype: (1, num_tokens, num_heads,
    head_dim)."""
    outs = []
    for q, k, v in _documents(cu_seqlens, query, key, value):
        mask = _window_mask(q, window)
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
    """Added to the logits of a document (1, num_heads, length, head_dim) longer than the window."""
    length = query.shape[2]
    if not window or length <= window:
        return None
    index = torch.arange(length, device=query.device)
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
) -> tuple[Tensor, Tensor]:
    """query: (num_tokens, num_heads, head_dim); key, value: (num_tokens, num_key_value_heads,
    head_dim); window: tokens that a token sees, 0: all before it. The attended values like query,
    and the log-sum-exps (num_heads, num_tokens), float32 or float64."""
    if query.is_cuda:
        out, lse, *_ = _aten._flash_attention_forward(
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
            window_size_left=window - 1 if window else -1,
            window_size_right=0,
        )
        return out, lse
    outs, lses = [], []
    for q, k, v in _documents(cu_seqlens, *map(_by_heads, (query, key, value))):
        mask = _window_mask(q, window)
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, mask is None, attn_mask=mask, scale=scale
        )
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
        dq, dk, dv = _aten._flash_attention_backward(
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
            window_size_left=window - 1 if window else -1,
            window_size_right=0,
        )
        return dq, dk, dv
    grads: tuple[list[Tensor], ...] = ([], [], [])
    ends = cu_seqlens.tolist()
    pieces = _documents(cu_seqlens, *map(_by_heads, (query, key, value, grad, out)))
    for i, (q, k, v, dout, o) in enumerate(pieces):
        mask = _window_mask(q, window)
        found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
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
        for whole, piece in zip(grads, found, strict=True):
            whole.append(piece[0].transpose(0, 1))
    dq, dk, dv = map(torch.cat, grads)
    return dq, dk, dv


def _documents(cu_seqlens: Tensor, *tensors: Tensor) -> Any:
    """Each document's part of tensors (1, heads, num_tokens, head_dim)."""
    lengths = cu_seqlens.diff().tolist()
    return zip(*(each.split(lengths, dim=2) for each in tensors), strict=True)


def _by_heads(tensor: Tensor) -> Tensor:
    """(num_tokens, heads, head_dim) as (1, heads, num_tokens, head_dim)."""
    return tensor.transpose(0, 1)[None]


@_varlen.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    kind = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_empty((query.shape[1], query.shape[0]), dtype=kind)
    return query.new_empty(query.shape), lse


@_varlen_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(each.new_empty(each.shape) for each in (query, key, value))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, cu_seqlens, *ctx.settings = inputs
    ctx.save_for_backward(query, key, value, *output, cu_seqlens)


def _gradient(ctx: Any, grad: Tensor, _grad_lse: Any) -> tuple[Tensor | None, ...]:
    found = torch.ops.neftune_dist.varlen_attention_backward(
        grad, *ctx.saved_tensors, *ctx.settings
    )
    return (*found, None, None, None, None)


_varlen.register_autograd(_gradient, setup_context=_keep)


VARLEN_OPERATOR = torch.ops.neftune_dist.varlen_attention.default

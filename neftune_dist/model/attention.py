"""Attention within documents that lie packed one after another in one row.

Registered with transformers' attention interface under `VARLEN` and `FLEX`; where the documents
begin and end comes down to it as arguments of the model's forward (`packed_arguments`). No mask of
tokens x tokens is ever built. `VARLEN` is the operator of `varlen`, `FLEX` FlexAttention under a
mask of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex
from transformers import AttentionInterface

from neftune_dist.compat.transformers import attention_name
from neftune_dist.config import UserError
from neftune_dist.model.families import needs_eager
from neftune_dist.model.modules import own_parameters
from neftune_dist.model.ulysses import own_heads, query_blocks, to_heads, to_slices
from neftune_dist.model.varlen import VARLEN_OPERATOR, by_document

VARLEN = "neftune_dist_varlen"
FLEX = "neftune_dist_flex"
_WIDEST_HEAD = 256  # of FlashAttention; Gemma 4's global layers have 512
# The default of `sliding_window`: the model passes none (Qwen2-MoE), its module's attribute counts.
_OF_MODULE = -1


def implementation(attention: str, packing: bool) -> str:
    """transformers' name for `model.attention`: auto is varlen where packed, else sdpa."""
    if attention == "auto":
        attention = "varlen" if packing else "sdpa"
    return {"varlen": VARLEN, "flex": FLEX}.get(attention, attention)


def with_attention(
    make: Callable[[str], Any], hf_config: Any, attention: str, packing: bool = False
) -> Any:
    """Build a model with `model.attention`. Padded, auto is sdpa, or eager where the model has no
    sdpa or computes it wrongly.

    Args:
        make: builds the model with transformers' attention of a given name.
        hf_config: the model's own configuration.
        attention, packing: the settings.
    """
    name = implementation(attention, packing)
    if attention != "auto" or packing:
        return make(name)
    if needs_eager(hf_config):
        return make("eager")
    try:
        return make(name)
    except ValueError as error:
        if "attn_implementation=" not in str(error):
            raise
        return make("eager")


@contextmanager
def attention_of(model: Any, implementation: str) -> Iterator[None]:
    """Give the model this attention (transformers' name) within the block."""
    usual = attention_name(model)
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


def packed_arguments(model: Any, cu_seqlens: Tensor, longest: int) -> dict[str, Any]:
    """The arguments of a packed model's forward, beside tokens and positions.

    Args:
        model: the transformers model.
        cu_seqlens: int32 (num_documents + 1,), cumulative lengths; on the model's device.
        longest: tokens of the longest document.
    """
    if attention_name(model) == FLEX:
        return {"document_mask": _document_mask(cu_seqlens)}
    # Rounded up: with a number that changes from batch to batch, blocks would recompile.
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
    sliding_window: int | None = _OF_MODULE,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within documents.

    Args:
        query: (1, num_heads, num_tokens, head_dim); this rank's tokens where sequences are shared
            (`ulysses`).
        key, value: (1, num_key_value_heads, num_tokens, head_dim); values may be narrower, as in
            DeepSeek-V3's latent attention.
        cu_seqlens: int32 (num_documents + 1,), from 0 to num_tokens.
        max_seqlen: no document is longer.
        sliding_window: tokens that a token sees, itself counted.
        s_aux: (num_heads,), attention sinks: a logit more, whose weight goes to no token (gpt-oss).

    Returns:
        (1, num_tokens, num_heads, head_dim of the values), and no weights.

    Raises:
        RuntimeError: the model asks for more than that (a mask, capped logits).
    """
    _refuse(module, cu_seqlens, attention_mask, softcap)
    assert cu_seqlens is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = _window(module, sliding_window)
    width, own_tokens = value.shape[-1], query.shape[2]
    # FlashAttention takes one width for all, a multiple of 8.
    common = query.shape[-1] + -query.shape[-1] % 8
    query, key, value = (_widened(tensor, common) for tensor in (query, key, value))
    query, key, value = to_heads(query, key, value)
    blocks = query_blocks(own_tokens)
    sinks = None if s_aux is None else own_heads(s_aux)
    # FlashAttention on a GPU has no dropout, no float32 and no wider heads.
    refused = query.is_cuda and (query.dtype == torch.float32 or common > _WIDEST_HEAD)
    if dropout or refused:
        out = by_document(query, key, value, cu_seqlens, scale, window, dropout, sinks, blocks)
        return to_slices(out, own_tokens)[..., :width], None
    qkv = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    out, _lse = VARLEN_OPERATOR(*qkv, cu_seqlens, max_seqlen, scale, window, sinks, blocks)
    return to_slices(out[None], own_tokens)[..., :width], None


def _widened(tensor: Tensor, width: int) -> Tensor:
    """The tensor with zeros behind it, up to a width; itself where it has that (`pad` copies)."""
    more = width - tensor.shape[-1]
    return F.pad(tensor, (0, more)) if more else tensor


def flex_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    document_mask: flex.BlockMask | None = None,
    sliding_window: int | None = _OF_MODULE,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """`varlen_attention` by FlexAttention, without dropout, sliding windows and sinks."""
    _refuse(module, document_mask, attention_mask, softcap)
    if dropout or _window(module, sliding_window) or s_aux is not None:
        raise RuntimeError(
            f"{type(module).__name__} has dropout, a sliding window or sinks in its attention, "
            "which model.attention=flex does not: use varlen."
        )
    # FlexAttention is no faster than plain attention unless compiled; on a CPU it has no backward.
    attend = _compiled_flex() if query.is_cuda else flex.flex_attention
    is_grouped = query.shape[1] != key.shape[1]
    out: Tensor = attend(
        query, key, value, block_mask=document_mask, scale=scaling, enable_gqa=is_grouped
    )
    return out.transpose(1, 2), None


def check_flex(model: Any) -> None:
    """Raise `UserError` where model.attention=flex would leave out a part of the attention."""
    if attention_name(model) != FLEX:
        return
    # Mistral's modules and their like have no attribute of their own.
    usual_window = getattr(model.config, "sliding_window", None)
    for name, module in model.named_modules():
        parts = {
            "a sliding window": getattr(module, "sliding_window", usual_window),
            "attention sinks": "sinks" in dict(own_parameters(module)),
            "dropout": _drops(module),
        }
        found = [part for part, value in parts.items() if value]
        if found and "is_causal" in vars(module):
            raise UserError(
                f"{name} of the model has {' and '.join(found)}, which model.attention=flex does "
                "not compute: use model.attention=varlen."
            )


def _drops(module: nn.Module) -> bool:
    """Whether an attention module sets weights to zero at random."""
    rates = [v for name, v in vars(module).items() if "drop" in name and isinstance(v, float)]
    parts = [part for name, part in module.named_children() if "att" in name]
    return any(rates) or any(part.p for part in parts if isinstance(part, nn.Dropout))


AttentionInterface.register(VARLEN, varlen_attention)
AttentionInterface.register(FLEX, flex_attention)


def _window(module: nn.Module, given: int | None) -> int:
    """Tokens that a token sees; 0: all before it."""
    return (getattr(module, "sliding_window", None) if given == _OF_MODULE else given) or 0


def _refuse(module: nn.Module, documents: Any, mask: Tensor | None, softcap: float | None) -> None:
    refused = {
        "hands no documents to": documents is None,
        "hands a mask to": mask is not None,
        "caps the logits of": softcap is not None,
        "lets tokens see later ones in": not getattr(module, "is_causal", True),
    }
    for what, is_so in refused.items():
        if is_so:
            raise RuntimeError(
                f"{type(module).__name__} {what} its attention: documents of this model cannot be "
                "packed; set data.packing=false."
            )


@cache
def _compiled_flex() -> Any:
    """FlexAttention, compiled when it is first used: importing the compiler takes half a second."""
    return torch.compile(flex.flex_attention, dynamic=True)


def _document_mask(cu_seqlens: Tensor) -> flex.BlockMask:
    num_tokens = int(cu_seqlens[-1])
    tokens = torch.arange(num_tokens, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, tokens, right=True)

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (document[query] == document[key]) & (query >= key)

    return flex.create_block_mask(sees, None, None, num_tokens, num_tokens, cu_seqlens.device)

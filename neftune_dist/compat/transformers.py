"""Private parts of transformers. Checked against 5.17.0 and 5.23.0."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def attention_name(model: Any) -> str:
    """Return the attention that a model computes; `set_attn_implementation` has no counterpart."""
    return str(model.config._attn_implementation)


def block_class_names(model: Any) -> set[str]:
    """Return the class names of a model's repeated blocks: those it lets nobody split."""
    return set(getattr(model, "_no_split_modules", None) or [])


def mark_initialized(parts: Iterable[nn.Module | nn.Parameter], initialized: bool) -> None:
    """Say what `initialize_weights` is to pass over. It computes buffers in no other way."""
    for part in parts:
        part._is_hf_initialized = initialized  # type: ignore[assignment, union-attr]

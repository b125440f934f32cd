"""Private parts of transformers. Checked against 5.17.0 and 5.23.0."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers.trainer_callback import CallbackHandler, TrainerCallback


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


def call_first(callback: TrainerCallback) -> None:
    """From within an event of a trainer: let a callback be called before the others.

    A trainer puts a user's callbacks after those that report to W&B, TensorBoard and the like, so
    that what they add to the logs would be reported by none. It hands no callback the list that
    they are called from, which is found on the call stack.
    """
    frame = inspect.currentframe()
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
            # A new list: the handler is iterating over the old one.
            others = [other for other in handler.callbacks if other is not callback]
            handler.callbacks = [callback, *others]
            return
        frame = frame.f_back

"""Private parts of transformers. Checked against 5.17.0 and 5.23.0."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)


def attention_name(model: Any) -> str:
    """Return the attention that a model computes; `set_attn_implementation` has no counterpart."""
    return str(model.config._attn_implementation)


def block_class_names(model: Any) -> set[str]:
    """Return the class names of a model's repeated blocks: those it lets nobody split."""
    return set(getattr(model, "_no_split_modules", None) or [])


def mark_initialized(parts: Iterable[nn.Module | nn.Parameter], initialized: bool) -> None:
    """Mark what transformers' `initialize_weights` is to skip. It is the only way to compute a
    model's buffers."""
    for part in parts:
        part._is_hf_initialized = initialized  # type: ignore[assignment, union-attr]


@dataclass(frozen=True)
class StoredPart:
    """How transformers reads one stored tensor.

    Attributes:
        stored: its name in the files.
        parameter: the name of the parameter that it is, or becomes a part of.
        operations: that make a parameter of its parts, by name and dimension; () of a whole one.
        pattern: the place of the part among those that the operations take.
    """

    stored: str
    parameter: str
    operations: tuple[tuple[str, int | None], ...]
    pattern: int


def stored_parts(model: Any, stored: Iterable[str], parameters: Iterable[str]) -> list[StoredPart]:
    """Return how transformers reads stored tensors into parameters, in the order in which it puts
    parts together; without those that are no part of the model."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    owner = {pattern: c for c in converters for pattern in c.source_patterns}
    known = dict.fromkeys(parameters, True)
    parts = []
    for name in sorted(stored, key=dot_natural_key):
        parameter, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, known
        )
        if parameter in known:
            converter = owner[pattern] if pattern else None
            operations = converter.operations if converter else ()
            steps = tuple((type(step).__name__, getattr(step, "dim", None)) for step in operations)
            index = converter.source_patterns.index(pattern) if converter else 0
            parts.append(StoredPart(name, parameter, steps, index))
    return parts


def saved_shapes(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors that `save_pretrained` makes of these parameters."""
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    saved = revert_weight_conversion(model, tensors)
    return {name: tuple(tensor.shape) for name, tensor in saved.items()}


def initialize_weights(model: Any) -> None:
    """Run transformers' initialisation of a model.

    FSDP2 has replaced the model's class by one of torch's, which transformers takes for custom code
    and then skips modules without parameters; so the original class's answer is set meanwhile.
    """
    own: Any = next(c for c in type(model).__mro__ if not c.__module__.startswith("torch."))
    model.is_custom_code = own.is_custom_code
    try:
        model.initialize_weights()
    finally:
        del model.is_custom_code

"""The map from a model's parameters to the tensors in its files.

transformers gives tensors other names than the files do, and stacks the experts of a layer in one
parameter. All its language models but a few do it so that a parameter's elements are those of
stored tensors, one tensor after another. So any range of a parameter is a list of ranges of files,
and an export cuts the parameter into the same tensors again.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from neftune_dist.compat.transformers import StoredPart, saved_shapes, stored_parts
from neftune_dist.config import UserError

Shape = tuple[int, ...]


class StoredTensor(NamedTuple):
    """A tensor of the files: its name and shape."""

    name: str
    shape: Shape


# The stored tensors whose elements, one tensor after another, are those of each parameter.
Layout = dict[str, list[StoredTensor]]


def converted_layout(
    model: Any,
    stored: Mapping[str, Shape],
    aliases: Mapping[str, Iterable[str]],
) -> Layout:
    """The layout of parameters whose tensors have other names than they.

    Args:
        model: the transformers model.
        stored: names and shapes of the tensors in the files.
        aliases: of the parameters, by first name.

    Returns:
        The parameters that are found, in part or whole; where several stored tensors are the whole
        of one, all of them, in the order of its aliases.

    Raises:
        UserError: the model's files hold elements in another order than its parameters.
    """
    first = {alias: name for name, names in aliases.items() for alias in names}
    order = {alias: place for place, alias in enumerate(first)}
    parts: dict[str, list[StoredPart]] = defaultdict(list)
    for part in stored_parts(model, stored, first):
        parts[first[part.parameter]].append(part)
    layout = {}
    for name, found in parts.items():
        found.sort(key=lambda part: order[part.parameter])
        names = _in_order(type(model).__name__, found)
        layout[name] = [StoredTensor(n, stored[n]) for n in names]
    return layout


def _in_order(model_name: str, parts: Sequence[StoredPart]) -> list[str]:
    """The names of a parameter's parts, in the order of its elements."""
    operations = parts[0].operations
    by_pattern: dict[int, list[str]] = defaultdict(list)
    for part in parts:
        by_pattern[part.pattern].append(part.stored)
    patterns = [by_pattern[index] for index in sorted(by_pattern)]
    if not operations:
        return patterns[0]
    if operations in ((("MergeModulelist", 0),), (("Concatenate", 0),)):
        return [name for pattern in patterns for name in pattern]
    if operations == (("MergeModulelist", 0), ("Concatenate", 1)):
        # Of each expert in turn: the gate's matrix, then that of the way up.
        return [name for expert in zip(*patterns, strict=False) for name in expert]
    steps = ", ".join(name for name, _ in operations)
    raise UserError(
        f"{model_name} is not trained here: transformers rearranges the elements of its stored "
        f"tensors as it loads them ({parts[0].stored}: {steps}), and only tensors whose elements "
        "keep their order are read and exported."
    )


def joined_shape(tensors: Sequence[StoredTensor], shape: Shape) -> Shape | None:
    """The shape of the parameter that these tensors are made into; None: they do not fit together.

    Args:
        shape: of the model's parameter, which says whether they are stacked.
    """
    if len(tensors) == 1 and tensors[0].shape == shape:
        return shape
    is_stacked = len(shape) == len(tensors[0].shape) + 1
    per_row = len(tensors) // shape[0] if is_stacked else len(tensors)
    if per_row == 0 or not tensors[0].shape or len(tensors) % per_row:
        return None
    rows = [tensors[i : i + per_row] for i in range(0, len(tensors), per_row)]
    lengths = {sum(tensor.shape[0] for tensor in row) for row in rows}
    others = tensors[0].shape[1:]
    if len(lengths) > 1 or any(tensor.shape[1:] != others for tensor in tensors):
        return None
    return (*((len(rows),) if is_stacked else ()), *lengths, *others)


def split(parameter: Tensor, tensors: Sequence[StoredTensor]) -> dict[str, Tensor]:
    """The tensors, by name, that a parameter is stored as."""
    parts = parameter.flatten().split([math.prod(tensor.shape) for tensor in tensors])
    return {
        tensor.name: part.view(tensor.shape) for tensor, part in zip(tensors, parts, strict=True)
    }


def saved_layout(model: Any, shapes: Mapping[str, Shape]) -> Layout:
    """The layout of the files that `save_pretrained` would write.

    Args:
        shapes: of the parameters, by first name.
    """
    saved = saved_shapes(model, shapes)
    converted = converted_layout(model, saved, {name: [name] for name in shapes})
    own = {name: [StoredTensor(name, shape)] for name, shape in shapes.items() if name in saved}
    return {**converted, **own}


def to_record(layout: Layout) -> dict[str, list[tuple[str, list[int]]]]:
    """What a checkpoint keeps of a layout: parameters that are not stored by their own names."""
    return {
        name: [(tensor.name, list(tensor.shape)) for tensor in tensors]
        for name, tensors in layout.items()
        if [tensor.name for tensor in tensors] != [name]
    }


def from_record(record: Mapping[str, Any], shapes: Mapping[str, Shape]) -> Layout:
    """The layout of parameters of these shapes, as a checkpoint has kept it.

    A parameter that is stored whole has the shape that it has now: training adds tokens.
    """
    layout = {}
    for name, shape in shapes.items():
        tensors = [StoredTensor(n, tuple(s)) for n, s in record.get(name, [(name, shape)])]
        if len(tensors) == 1 and len(tensors[0].shape) == len(shape):
            tensors = [StoredTensor(tensors[0].name, shape)]
        assert sum(math.prod(t.shape) for t in tensors) == math.prod(shape)
        layout[name] = tensors
    return layout

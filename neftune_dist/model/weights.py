"""A model's weights, read by ranges: no rank ever holds a whole model in host memory.

A rank reads the ranges that it keeps straight from the files: safetensors, pickles (with
`weights_only` alone), or the checkpoints of `foreign`. Refused with `UserError`: a missing tensor,
a wrong shape, quantized weights.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from neftune_dist.compat.transformers import stored_parts
from neftune_dist.config import ModelConfig, UserError, user_path
from neftune_dist.model.foreign import Source, open_weights, ranges
from neftune_dist.model.pickles import load_tensors
from neftune_dist.model.stored_tensors import (
    Layout,
    StoredTensor,
    converted_layout,
    joined_shape,
    saved_layout,
)
from neftune_dist.system.model_files import weight_files
from neftune_dist.system.text import first_line

_COMPARED_ELEMENTS = 2**24
_DIGESTED_ELEMENTS = 2**22


def weights_folder(config: ModelConfig, folder: Path) -> Path:
    """The folder of a new run's weights: `model.weights`, or the model's own directory."""
    if config.weights is None:
        return folder
    elsewhere = user_path(config.weights, "model.weights")
    if not elsewhere.is_dir():
        raise UserError(f"model.weights={config.weights} is no directory.")
    return elsewhere


class WeightFiles:
    """The weights of a model directory, readable by ranges of flattened tensors.

    Args:
        folder: of the files.
        aliases: of the model's parameters, from `parameter_aliases`.
        shapes: of the model's parameters, by first name.
        model: the transformers model, whose class says how files with other names or stacked
            experts are converted. Older files lack its `base_model_prefix`, or have it in addition.

    Attributes:
        layout: the stored tensors that each parameter is, or is made of.

    Raises:
        UserError: no weights, a tensor missing or of another shape.
    """

    def __init__(
        self,
        folder: Path,
        aliases: Mapping[str, list[str]],
        shapes: Mapping[str, tuple[int, ...]],
        model: Any,
    ) -> None:
        self._folder, self._model, self._shapes, self._aliases = folder, model, shapes, aliases
        self._sources, self._is_foreign = _index(folder)
        self.layout: Layout = {}
        for name, names in aliases.items():
            found = [c for c in _candidates(names, model.base_model_prefix) if c in self._sources]
            tensors = [StoredTensor(source, self._sources[source].shape) for source in found]
            for tensor in tensors:
                self._check(name, [tensor])
            for source in found[1:]:
                self._check_same(found[0], source, math.prod(shapes[name]))
            self.layout[name] = tensors[:1]
        self._convert({name: names for name, names in aliases.items() if not self.layout[name]})

    def _convert(self, missing: Mapping[str, list[str]]) -> None:
        """Find the tensors of parameters whose names the files do not have."""
        converted: Layout = {}
        if missing:
            stored = {name: source.shape for name, source in self._sources.items()}
            converted = converted_layout(self._model, stored, missing)
        for name in missing:
            if name not in converted:
                raise UserError(
                    f"The weights in {self._folder} lack {name}: they are incomplete, of another "
                    "model, or laid out otherwise than its parameters."
                )
            whole = [t for t in converted[name] if t.shape == tuple(self._shapes[name])]
            for tensor in whole[1:]:
                self._check_same(whole[0].name, tensor.name, math.prod(tensor.shape))
            converted[name] = whole[:1] or converted[name]
            self._check(name, converted[name])
        self.layout |= converted

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened parameter, 1-D, in the file's dtype."""
        tensors = self.layout[name]
        found = ranges((math.prod(tensor.shape) for tensor in tensors), start, stop)
        pieces = [self._read(tensors[i].name, first, last) for i, first, last in found]
        if not pieces:
            return self._read(tensors[0].name, 0, 0)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def export_layout(self) -> Layout:
        """The layout for an export: that of these files, or, where they are a trainer's
        checkpoint, what `save_pretrained` would write."""
        if self._is_foreign:
            return saved_layout(self._model, self._shapes)
        return self.layout

    def digest(self, part: tuple[int, int] = (0, 1)) -> int:
        """A 128-bit digest of every parameter's name, shape, dtype and content. The digests of the
        parts (0, n) to (n - 1, n) combine by exclusive or to that of the whole."""
        shapes = {name: tuple(self._shapes[name]) for name in self.layout}
        return _digest(self.read, shapes, part)

    @cached_property
    def others(self) -> dict[str, Tensor]:
        """The stored tensors that are no part of a parameter (a wrapper's towers), without their
        content."""
        known = {alias for names in self._aliases.values() for alias in names}
        read = {part.stored for part in stored_parts(self._model, self._sources, known)}
        return {
            name: torch.empty(source.shape, dtype=self._read(name, 0, 0).dtype, device="meta")
            for name, source in self._sources.items()
            if name not in read
        }

    def left_out(self) -> str | None:
        """A line about the stored tensors that the model has no use for; None: there are none."""
        known = {tensor.name for tensors in self.layout.values() for tensor in tensors}
        names = [] if self._is_foreign else sorted(self.others.keys() - known)
        if not names:
            return None
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        return f"weights: {len(names)} stored are no part of the model, nor of an export: {shown}"

    def read_other(self, name: str) -> Tensor:
        """One of `others`, with its content."""
        shape = self.others[name].shape
        return self._read(name, 0, math.prod(shape)).reshape(shape).clone()

    def digest_others(self, part: tuple[int, int] = (0, 1)) -> int:
        """The digest of `others`, as `digest` is that of the parameters."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.others.items()}
        return _digest(self._read, shapes, part)

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        source = self._sources[name]
        row = max(1, math.prod(source.shape[1:]))
        first, last = start // row, -(-stop // row)
        rows = source.read_rows(first, last)
        return rows.flatten()[start - first * row : stop - first * row]

    def _check(self, name: str, tensors: list[StoredTensor]) -> None:
        shape = tuple(self._shapes[name])
        if joined_shape(tensors, shape) != shape:
            raise UserError(
                f"{tensors[0].name} in {self._folder} has shape {tensors[0].shape}, the model's "
                f"configuration says {shape}."
                if len(tensors) == 1
                else f"The weights in {self._folder} hold {len(tensors)} tensors of {name}, "
                f"{tensors[0].name} and others, which do not make up the shape {shape} that the "
                "model's configuration says."
            )
        for tensor in tensors:
            dtype = self._read(tensor.name, 0, 0).dtype  # touches no page of the file
            if not dtype.is_floating_point or dtype.itemsize < 2:
                raise UserError(
                    f"{tensor.name} in {self._folder} is stored as {dtype}: quantized weights "
                    "cannot be fine-tuned."
                )

    def _check_same(self, one: str, other: str, numel: int) -> None:
        """Refuse tied weights that the files hold under both names with different content."""
        for start in range(0, numel, _COMPARED_ELEMENTS):
            stop = min(numel, start + _COMPARED_ELEMENTS)
            if not torch.equal(self._read(one, start, stop), self._read(other, start, stop)):
                raise UserError(
                    f"{one} and {other} in {self._folder} differ, but the model's configuration "
                    "ties them: set tie_word_embeddings to false in its config.json."
                )


@dataclass(frozen=True)
class Weights:
    """The first content of a run's parameters.

    Attributes:
        files: of the base model.
        read: elements [start, stop) of the flattened parameter of that name, 1-D.
    """

    files: WeightFiles
    read: Callable[[str, int, int], Tensor]


class GrownWeights:
    """Weights of a model with added tokens: some parameters have more rows than in the files. Rows
    added for new tokens start at the mean of the existing rows.

    Args:
        files: without the added rows.
        shapes: in the files, by name.
    """

    def __init__(self, files: WeightFiles, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._files, self._shapes = files, shapes
        self._means: dict[str, Tensor] = {}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened parameter, 1-D."""
        shape = self._shapes[name]
        numel = math.prod(shape)
        if stop <= numel:
            return self._files.read(name, start, stop)
        known = [self._files.read(name, start, numel).float()] if start < numel else []
        width = math.prod(shape[1:])
        first = max(start, numel)
        row = self._mean(name).repeat(-(-(stop - first) // width) + 1)
        return torch.cat([*known, row[first % width :][: stop - first]])

    def _mean(self, name: str) -> Tensor:
        if name not in self._means:
            rows, width = self._shapes[name][0], math.prod(self._shapes[name][1:])
            total, step = torch.zeros(width, dtype=torch.float64), max(1, 2**24 // width)
            for first in range(0, rows, step):
                last = min(rows, first + step)
                piece = self._files.read(name, first * width, last * width)
                total += piece.view(-1, width).sum(0, dtype=torch.float64)
            self._means[name] = (total / rows).float()
        return self._means[name]


def _digest(
    read: Callable[[str, int, int], Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    part: tuple[int, int],
) -> int:
    """See `WeightFiles.digest`.

    It reads everything once: 3 GB/s measured on one core with the files in memory, so 5 s for
    13 GB; n parts on n ranks take an n-th of that."""
    total, (index, count) = 0, part
    largest_first = sorted(shapes, key=lambda name: -math.prod(shapes[name]))
    for name in largest_first[index::count]:
        shape = shapes[name]
        found = xxhash.xxh3_128(f"{name} {shape} {read(name, 0, 1).dtype}".encode())
        row, numel = max(1, math.prod(shape[1:])), math.prod(shape)
        step = max(1, _DIGESTED_ELEMENTS // row) * row
        for start in range(0, numel, step):
            values = read(name, start, min(numel, start + step))
            found.update(values.contiguous().view(torch.uint8).numpy().data)
        total ^= found.intdigest()
    return total


def is_foreign(folder: Path) -> bool:
    """Whether a folder holds a trainer's checkpoint. Raises `UserError` where it holds none."""
    return _index(folder)[1]


def stored_names(folder: Path) -> set[str]:
    """The names of the tensors in a folder's files. Raises `UserError` where it holds none."""
    return set(_index(folder)[0])


def _candidates(names: list[str], prefix: str) -> list[str]:
    dotted = f"{prefix}."
    return [
        *names,
        *[n.removeprefix(dotted) for n in names if n.startswith(dotted)],
        *[dotted + n for n in names if not n.startswith(dotted)],
    ]


def _index(folder: Path) -> tuple[dict[str, Source], bool]:
    """The tensors by name, in the files that transformers would read, or else in a trainer's
    checkpoint; whether it is one."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if files := weight_files(folder, name):
            return {key: source for file in files for key, source in _open(file).items()}, False
    foreign = open_weights(folder)
    if foreign is None:
        raise UserError(
            f"{folder} holds no weights: neither model.safetensors nor pytorch_model.bin, nor the "
            "index of either."
        )
    return foreign, True


def _open(file: Path) -> dict[str, Source]:
    """The tensors of a safetensors file, or of a pickle, memory-mapped."""
    try:
        if file.suffix == ".safetensors":
            opened = safe_open(file, framework="pt")
            return {name: _stored(opened, name) for name in opened.keys()}  # noqa: SIM118 (no dict)
        tensors = load_tensors(file)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"The weights in {file} cannot be read without running the code they carry, which is "
            "refused; convert them to safetensors."
        ) from error
    except Exception as error:  # the readers raise many types
        raise UserError(f"The weights in {file} cannot be read: {first_line(error)}") from error
    if not isinstance(tensors, dict):
        raise UserError(f"{file} holds no weights by name.")
    held = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    for name, tensor in held.items():
        if tensor.is_meta or tensor.layout != torch.strided:
            kind = "a tensor without content" if tensor.is_meta else f"of layout {tensor.layout}"
            raise UserError(f"{name} in {file} is {kind}: store it as a plain tensor.")
    return {
        name: Source(tuple(tensor.shape), partial(_rows, torch.atleast_1d(tensor)))
        for name, tensor in held.items()
    }


def _stored(opened: Any, name: str) -> Source:
    """A tensor of an opened safetensors file."""
    whole = opened.get_slice(name)
    shape = tuple(whole.get_shape())
    return Source(shape, partial(_rows, whole if shape else opened.get_tensor(name)[None]))


def _rows(whole: Any, first: int, last: int) -> Tensor:
    rows: Tensor = whole[first:last]
    return rows

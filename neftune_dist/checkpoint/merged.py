"""The model that a checkpoint holds: its tensors, whole, one at a time.

Adapters are merged into the frozen weights that they were trained beside, which gives a plain
model. Needs no process group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neftune_dist.checkpoint import flat, store
from neftune_dist.config import AdapterConfig, ModelConfig, UserError
from neftune_dist.engine.base import MASTER, FlatShard
from neftune_dist.model import load, locate
from neftune_dist.model.adapters import merged, quantized_names
from neftune_dist.model.stored_tensors import Layout, from_record
from neftune_dist.model.weights import WeightFiles, weights_folder


@dataclass(frozen=True)
class ModelTensors:
    """A model's tensors, read one at a time.

    Attributes:
        shapes: of the tensors by name, in order.
        read: reads the whole tensor of a name, floating point.
        layout: the tensors that an export writes for each of these.
        constants: names of the tensors that are as in the base model's files, in their dtype.
    """

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    layout: Layout
    constants: frozenset[str] = frozenset()

    @staticmethod
    def trained(folder: Path, state: Mapping[str, Any]) -> ModelTensors:
        """The trained tensors in a checkpoint (with adapters, the adapters alone), float32.

        Args:
            state: the checkpoint's `trainer_state()`.

        Raises:
            UserError: the checkpoint is damaged, or no longer there.
        """
        shapes = {name: tuple(shape) for name, shape in state["shapes"].items()}
        with _reading(folder):
            reader = flat.Reader(folder, alone=True)

        def read(name: str) -> Tensor:
            numel = math.prod(shapes[name])
            tensor = torch.empty(numel)
            with _reading(folder):
                reader.read([FlatShard(MASTER, name, 0, tensor, numel)])
            return tensor.view(shapes[name])

        return ModelTensors(shapes, read, from_record(state.get("stored", {}), shapes))

    @staticmethod
    def of(folder: Path, state: Mapping[str, Any]) -> ModelTensors:
        """The plain model, with adapters merged into their frozen weights, and with what the base
        model's files hold beside trained parameters.

        Raises:
            UserError: the frozen weights are missing, or have changed.
        """
        trained = ModelTensors.trained(folder, state)
        adapter, known = adapter_of(state), state["identity"].get("base")
        if adapter.method == "none" and known is None:
            return trained
        config, base, plain = _base(state)
        packing = state["config"]["data"]["packing"]
        weights = load.open_weights(plain, base, config, seed=0)
        if known is not None and known != f"{weights.files.digest():032x}":
            raise UserError(
                f"The checkpoint {folder} was trained beside other weights than those now in "
                f"{weights_folder(config, base)}: restore them there."
            )
        shapes = load.stored_shapes(plain)

        def of_files(name: str) -> Tensor:
            return weights.read(name, 0, math.prod(shapes[name])).view(shapes[name])

        if adapter.method == "none":
            constants = frozenset(shapes.keys() - trained.shapes.keys())
            shapes |= trained.shapes  # with rows for new tokens

            def read(name: str) -> Tensor:
                return of_files(name) if name in constants else trained.read(name)
        else:
            constants = frozenset(name for name, _ in load.stored_buffers(plain))
            in_4_bits = quantized_names(load.build(base, config, packing, adapter))
            parts = {name: trained.read(name) for name in trained.shapes}

            def read(name: str) -> Tensor:
                return merged(name, of_files(name), parts, adapter, name in in_4_bits)

        return ModelTensors(shapes, read, from_record(state.get("stored", {}), shapes), constants)


def open_towers(folder: Path, state: Mapping[str, Any]) -> WeightFiles | None:
    """The base's files, of which `others` are the towers around the text model that a run trained;
    None where it trained no wrapper.

    Raises:
        UserError: they are missing, or have changed.
    """
    known = state["identity"].get("towers")
    if known is None:
        return None
    try:
        config, base, plain = _base(state)
        files = load.open_towers(plain, base, config)
    except UserError as error:
        raise UserError(
            f"The base's towers, which an export copies, are missing: {error}"
        ) from error
    if files is None or known != f"{files.digest_others():032x}":
        raise UserError(
            f"The checkpoint {folder} was trained inside other towers than those now in "
            f"{weights_folder(config, base)}: restore them there."
        )
    return files


def _base(state: Mapping[str, Any]) -> tuple[ModelConfig, Path, Any]:
    """A run's base model: its settings, its folder, and the plain model on the meta device."""
    kept = ("name_or_path", "weights", "revision", "trust_remote_code")
    config = ModelConfig(**{key: state["config"]["model"][key] for key in kept})
    base = locate.find(config)
    return config, base, load.build(base, config, state["config"]["data"]["packing"])


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Report a checkpoint that was removed while it was read as such."""
    try:
        yield
    except UserError as error:
        if folder.is_dir():
            raise
        raise store.damage_error(store.Checkpoint(folder), "") from error


def adapter_of(state: Mapping[str, Any]) -> AdapterConfig:
    """Return the adapter that a run trained, from a checkpoint's `trainer_state()`."""
    return AdapterConfig(**state["config"].get("adapter", {}))

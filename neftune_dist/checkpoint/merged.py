"""The model that a checkpoint stands for: its tensors, whole, one at a time, and the files beside.

What a run trained beside frozen weights is merged into them, so that a plain model comes out. Needs
no process group. Owns `RUN_DIR/model`, the files of the base model that are not weights: with them
and a checkpoint, a run whose weights were all trained needs its base model no more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neftune_dist.checkpoint import flat, store
from neftune_dist.config import AdapterConfig, ModelConfig, UserError, read_json
from neftune_dist.engine.base import MASTER, FlatShard
from neftune_dist.model import load
from neftune_dist.model.adapters import merged, quantized_names
from neftune_dist.model.weights import weights_folder
from neftune_dist.system import storage

# Everything in a model directory that is not weights: configuration, tokenizer, code.
_SMALL = ("*.json", "*.model", "*.txt", "*.jinja", "*.py")
MODEL_FOLDER = "model"  # in a run directory: those files
CHAT_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Content:
    """A model's tensors: their shapes by name, in order, and each of them whole, float."""

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]

    @staticmethod
    def trained(folder: Path, state: Mapping[str, Any]) -> Content:
        """What a checkpoint holds: of a run with adapters, those alone. Tensors are float32.

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

        return Content(shapes, read)

    @staticmethod
    def of(folder: Path, state: Mapping[str, Any]) -> Content:
        """The plain model, adapters merged into the weights that they were trained beside.

        Raises:
            UserError: frozen weights that are not where they were, or are others.
        """
        trained = Content.trained(folder, state)
        adapter = adapter_of(state)
        if adapter.method == "none":
            return trained
        kept = ("name_or_path", "weights", "revision", "trust_remote_code")
        config = ModelConfig(**{key: state["config"]["model"][key] for key in kept})
        base, packing = load.find(config), state["config"]["data"]["packing"]
        plain = load.build(base, config, packing)
        files = load.open_weights(plain, base, config, seed=0)
        known = state["identity"].get("base")
        if known is not None and known != f"{files.digest():032x}":
            raise UserError(
                f"The adapter in {folder} was trained beside other weights than those now in "
                f"{weights_folder(config, base)}: restore them there."
            )
        in_4_bits = quantized_names(load.build(base, config, packing, adapter))
        parts = {name: trained.read(name) for name in trained.shapes}
        shapes = {name: tuple(p.shape) for name, p in plain.named_parameters()}

        def merge(name: str) -> Tensor:
            weight = files.read(name, 0, math.prod(shapes[name])).view(shapes[name])
            return merged(name, weight, parts, adapter, name in in_4_bits)

        return Content(shapes, merge)


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Turn a failure to read a checkpoint that was removed meanwhile into one that says so."""
    try:
        yield
    except UserError as error:
        if folder.is_dir():
            raise
        raise store.damage_error(store.Checkpoint(folder, 0), "") from error


def adapter_of(state: Mapping[str, Any]) -> AdapterConfig:
    """The adapter that the run trained, by the checkpoint's `trainer_state()`."""
    return AdapterConfig(**state["config"].get("adapter", {}))


def keep_small_files(model_folder: Path, run_dir: Path) -> None:
    """Copy what a model needs beside the weights into the run directory. Raises `UserError` as
    `files_within`."""
    files = {file for pattern in _SMALL for file in files_within(model_folder, pattern)}
    target = run_dir / MODEL_FOLDER
    if target.is_symlink():  # to the base model, perhaps, whose files would be changed
        target.unlink()
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(files):
        if not file.name.endswith(".index.json"):
            storage.write(target / file.name, file.read_bytes())


def files_within(folder: Path, pattern: str = "*") -> list[Path]:
    """The files of a model directory, which may be copied to wherever the model goes.

    Raises:
        UserError: one of them is a link to a file elsewhere, which may be anything that the user
            can read. A link into the hub cache's own blobs is none.
    """
    root = folder.resolve()
    blobs = root.parents[1] / "blobs" if root.parent.name == "snapshots" else root
    found = [file for file in sorted(folder.glob(pattern)) if file.is_file()]
    for file in found:
        if not {root, blobs} & {*file.resolve().parents}:
            raise UserError(
                f"{file} is a link to {file.resolve()}, outside the model directory: put the file "
                "itself there."
            )
    return found


def keep_vocabulary(tokenizer: Any, num_rows: int, run_dir: Path) -> None:
    """Put a tokenizer with new tokens in the place of the model's own, and say how many rows its
    embedding has now."""
    target = run_dir / MODEL_FOLDER
    tokenizer.save_pretrained(target)
    path = target / "config.json"
    config = read_json(path)
    path.write_text(json.dumps({**config, "vocab_size": num_rows}, indent=2) + "\n")


def keep_template(source: str | None, run_dir: Path) -> None:
    """Put the chat template that a run trains with in the place of the model's own, which would
    now be another; None: it has none."""
    target = run_dir / MODEL_FOLDER
    own = target / "tokenizer_config.json"
    if own.exists():
        settings = read_json(own)
        settings.pop("chat_template", None)
        own.write_text(json.dumps(settings, indent=2) + "\n")
    if source is None:
        (target / CHAT_TEMPLATE).unlink(missing_ok=True)
    else:
        (target / CHAT_TEMPLATE).write_text(source, encoding="utf-8")

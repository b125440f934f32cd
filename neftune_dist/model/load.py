"""A model from a directory or a hub id: built on the meta device, its weights read slice by slice.

Owns finding the files, the tokenizer, and reading: no rank ever holds a whole model in host memory,
each reads the ranges it keeps straight from the files. Weights are safetensors; pickles are read
with `weights_only` alone. A missing tensor or a wrong shape is a `UserError`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from neftune_dist.config import ModelConfig, UserError
from neftune_dist.model.attention import implementation

_SMALL_FILES = ["*.json", "tokenizer*", "*.model", "*.txt", "*.jinja", "*.py"]


def find(config: ModelConfig) -> Path:
    """The model's directory; a hub id is downloaded into the hub's cache, weights included."""
    name = config.name_or_path
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model.name_or_path={name} is a directory without a config.json.")
        return path
    if path.exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UserError(f"model.name_or_path={name} is no model directory.")
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                name, revision=config.revision, allow_patterns=[*_SMALL_FILES, "*.safetensors"]
            )
        )
        if not list(folder.glob("*.safetensors")):
            huggingface_hub.snapshot_download(
                name, revision=config.revision, allow_patterns=["*.bin"]
            )
    except Exception as error:  # the hub's client raises a dozen unrelated types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"model.name_or_path={name} is no local directory, and the model of that name could "
            f"not be had from the hub: {reason}"
        ) from error
    return folder


def load_tokenizer(folder: Path, config: ModelConfig) -> Any:
    """The model's tokenizer."""
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=config.trust_remote_code
        )
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise UserError(
            f"The tokenizer in {folder} cannot be loaded: {_plain(error, config)}"
        ) from error


def load_model_config(folder: Path, config: ModelConfig) -> Any:
    """The model's own configuration (transformers' config.json)."""
    try:
        return transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=config.trust_remote_code
        )
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise UserError(
            f"The model configuration in {folder} cannot be loaded: {_plain(error, config)}"
        ) from error


def build(folder: Path, config: ModelConfig, packing: bool) -> Any:
    """The causal LM on the meta device, float32, without weights, in training mode."""
    hf_config = load_model_config(folder, config)
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                hf_config,
                dtype=torch.float32,
                attn_implementation=implementation(config.attention, packing),
                trust_remote_code=config.trust_remote_code,
            )
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise UserError(
            f"{folder} holds no causal language model that transformers can build: "
            f"{_plain(error, config)}"
        ) from error
    if packing and not getattr(model, "_supports_attention_backend", False):
        raise UserError(
            f"{type(model).__name__} cannot keep packed documents apart (it does not use "
            "transformers' attention interface): set data.packing=false."
        )
    if config.activation_checkpointing == "full":
        if not model.supports_gradient_checkpointing:
            raise UserError(f"{type(model).__name__} supports no activation checkpointing.")
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def initialize_buffers(model: Any, device: torch.device) -> None:
    """Make the buffers that no file holds (rotary frequencies and their like) as transformers does.

    To be called when the model has left the meta device, which leaves buffers without content.
    """
    for module in model.modules():
        own = [name for name, b in module._buffers.items() if b is not None]
        if not own:
            continue
        for name in own:
            buffer = module._buffers[name]
            if buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)
        frozen = {name: p for name, p in module._parameters.items() if p is not None}
        if not frozen:
            owner = _pretrained_owner(model, module)
            owner._init_weights(module)


def block_classes(model: Any) -> set[str]:
    """Class names of the repeated transformer blocks, the units of sharding."""
    names = getattr(model, "_no_split_modules", None) or []
    return set(names)


def parameter_aliases(model: nn.Module) -> dict[str, list[str]]:
    """First name of each parameter: all its names (several where weights are tied)."""
    by_identity: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_identity.setdefault(id(parameter), []).append(name)
    return {names[0]: names for names in by_identity.values()}


class WeightFiles:
    """The weights of a model directory, readable by ranges of flattened tensors.

    Args:
        aliases: of the model's parameters, from `parameter_aliases`.
        shapes: of the model's parameters, by first name.
        prefix: the model's `base_model_prefix`, which older files leave out or put on.

    Raises:
        UserError: no weights, a tensor missing or of another shape.
    """

    def __init__(
        self,
        folder: Path,
        aliases: Mapping[str, list[str]],
        shapes: Mapping[str, tuple[int, ...]],
        prefix: str,
    ) -> None:
        self.folder = folder
        self._file_of = _index(folder)
        self._source: dict[str, str] = {}
        for name, names in aliases.items():
            found = next((c for c in _candidates(names, prefix) if c in self._file_of), None)
            if found is None:
                raise UserError(
                    f"The weights in {folder} lack {name}: they are of another model, or "
                    "incomplete."
                )
            shape = self._shape(found)
            if shape != tuple(shapes[name]):
                raise UserError(
                    f"{found} in {folder} has shape {shape}, the model's configuration says "
                    f"{tuple(shapes[name])}."
                )
            self._source[name] = found

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened parameter, 1-D, in the file's dtype."""
        source = self._source[name]
        file = _open(self._file_of[source])
        if isinstance(file, dict):
            whole: Tensor = file[source]
            return whole.flatten()[start:stop]
        piece = file.get_slice(source)
        shape = piece.get_shape()
        if len(shape) < 2:
            flat: Tensor = piece[start:stop] if shape else file.get_tensor(source).flatten()
            return flat
        row = 1
        for size in shape[1:]:
            row *= size
        first, last = start // row, -(-stop // row)
        rows: Tensor = piece[first:last]
        return rows.flatten()[start - first * row : stop - first * row]

    def _shape(self, source: str) -> tuple[int, ...]:
        file = _open(self._file_of[source])
        if isinstance(file, dict):
            return tuple(file[source].shape)
        return tuple(file.get_slice(source).get_shape())


def architecture_digest(hf_config: Any) -> str:
    """A digest of the model's configuration, less what does not change its parameters."""
    plain = {
        key: value
        for key, value in hf_config.to_dict().items()
        if key not in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
    }
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _candidates(names: list[str], prefix: str) -> list[str]:
    dotted = f"{prefix}."
    return [
        *names,
        *[n.removeprefix(dotted) for n in names if n.startswith(dotted)],
        *[dotted + n for n in names if not n.startswith(dotted)],
    ]


def _index(folder: Path) -> dict[str, Path]:
    """Tensor name: the file that holds it."""
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        files = sorted(folder.glob(pattern))
        if files:
            return {name: file for file in files for name in _names(file)}
    raise UserError(f"{folder} holds no weights (*.safetensors, or pytorch_model*.bin).")


def _names(file: Path) -> list[str]:
    opened = _open(file)
    return list(opened) if isinstance(opened, dict) else list(opened.keys())


@cache
def _open(file: Path) -> Any:
    """A safetensors file, or a dict of memory-mapped tensors."""
    try:
        if file.suffix == ".safetensors":
            return safe_open(file, framework="pt")
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise UserError(f"The weights in {file} cannot be read: {error}") from error
    except Exception as error:  # pickle's own, from a pickle that wants to run code
        raise UserError(
            f"The weights in {file} cannot be read without running the code they carry, which is "
            "refused; convert them to safetensors."
        ) from error


def _pretrained_owner(model: Any, module: nn.Module) -> Any:
    """The innermost PreTrainedModel around a module, whose _init_weights knows it."""
    owner = model
    for candidate in model.modules():
        if isinstance(candidate, transformers.PreTrainedModel) and any(
            m is module for m in candidate.modules()
        ):
            owner = candidate
    return owner


def _plain(error: Exception, config: ModelConfig) -> str:
    text = str(error).strip()
    if "trust_remote_code" in text and not config.trust_remote_code:
        return (
            "it wants to run code of its own, which is refused; read that code, then set "
            "model.trust_remote_code=true."
        )
    return text.splitlines()[0] if text else type(error).__name__

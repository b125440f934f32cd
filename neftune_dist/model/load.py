"""A model from a directory or a hub id: built on the meta device, its weights read slice by slice.

Owns finding the files, the tokenizer, and reading: no rank ever holds a whole model in host memory,
each reads the ranges it keeps straight from the files. Weights are safetensors; pickles are read
with `weights_only` alone. Refused with `UserError`: a missing tensor, a wrong shape, quantized
weights, a model that is not causal or whose state is not all parameters.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from neftune_dist.config import ModelConfig, UserError
from neftune_dist.model.attention import implementation
from neftune_dist.model.support import check_model, check_packable

_COMPARED_ELEMENTS = 2**24
_EARLIER_NAMES = {"lm_head.weight": "embed_out.weight"}  # GPT-NeoX before transformers 5
_SMALL_FILES = ["*.json", "tokenizer*", "*.model", "*.txt", "*.jinja", "*.py"]


def find(config: ModelConfig) -> Path:
    """The model's directory; a hub id is downloaded into the hub's cache, weights included."""
    name = config.name_or_path
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model.name_or_path={name} is a directory without a config.json.")
        if config.revision is not None:
            raise UserError(
                f"model.revision={config.revision} has no effect with the directory {name}: leave "
                "it out."
            )
        return path
    if path.exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UserError(f"model.name_or_path={name} is no model directory.")
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                name, revision=config.revision, allow_patterns=[*_SMALL_FILES, "model*.safetensors"]
            )
        )
        if not list(folder.glob("model*.safetensors")):
            huggingface_hub.snapshot_download(
                name, revision=config.revision, allow_patterns=["pytorch_model*.bin"]
            )
    except Exception as error:  # the hub's client raises a dozen unrelated types
        raise UserError(
            f"model.name_or_path={name} is no local directory, and the model of that name could "
            f"not be had from the hub: {_first_line(error)}"
        ) from error
    return folder


def load_tokenizer(folder: Path, config: ModelConfig) -> Any:
    """The model's tokenizer."""
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # transformers raises whatever its parsers do
        raise UserError(
            f"The tokenizer in {folder} cannot be loaded: {_plain(error, config)}"
        ) from error


def load_model_config(folder: Path, config: ModelConfig) -> Any:
    """The model's own configuration (transformers' config.json)."""
    try:
        return transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # transformers raises whatever its parsers do
        raise UserError(
            f"The model configuration in {folder} cannot be loaded: {_plain(error, config)}"
        ) from error


def build(folder: Path, config: ModelConfig, packing: bool) -> Any:
    """The causal LM on the meta device, float32, without weights, in training mode.

    Raises:
        UserError: transformers cannot build it, or this package cannot train it as it should.
    """
    hf_config = load_model_config(folder, config)
    if getattr(hf_config, "quantization_config", None):
        raise UserError(
            f"The weights in {folder} are quantized: full fine-tuning needs plain ones."
        )
    if packing:
        check_packable(hf_config)
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                hf_config,
                dtype=torch.float32,
                attn_implementation=implementation(config.attention, packing),
                trust_remote_code=config.trust_remote_code,
            )
    except Exception as error:  # transformers raises whatever its parsers do
        raise UserError(
            f"{folder} holds no causal language model that transformers can build: "
            f"{_plain(error, config)}"
        ) from error
    check_model(model, packing)
    if config.activation_checkpointing == "full":
        if not model.supports_gradient_checkpointing:
            raise UserError(f"{type(model).__name__} supports no activation checkpointing.")
        enable = getattr(model, "activation_checkpointing_enable", None)
        if enable:
            enable(activation_checkpointing_kwargs={"use_reentrant": False})
        else:  # its name before transformers 5.2x
            model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


@torch.no_grad()
def initialize_buffers(model: Any, device: torch.device) -> None:
    """Compute the buffers (rotary frequencies and their like) as `from_pretrained` does.

    To be called when the model has left the meta device, which leaves buffers without content.
    Parameters, whatever an engine has made of them, are not touched.

    Raises:
        UserError: the model's code leaves a buffer without content.
    """
    owners = [(m, name) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    for module, name in owners:
        if module._buffers[name].is_meta:
            module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
    results: list[list[Tensor]] = []
    with _parameters_set_aside(model):
        # Twice, over zeros and over ones: what then differs has not been written.
        for fill in (0, 1):
            for module, name in owners:
                module._buffers[name].fill_(fill)
            for module in model.modules():
                module._is_hf_initialized = False
            model.initialize_weights()
            results.append([module._buffers[name].clone() for module, name in owners])
    for (module, name), one, other in zip(owners, *results, strict=True):
        if not torch.equal(one, other):
            raise UserError(
                f"{type(model).__name__} cannot be trained: its code does not say how to compute "
                f"the buffer {name} of {type(module).__name__}."
            )


@contextmanager
def _parameters_set_aside(model: nn.Module) -> Iterator[None]:
    """Meanwhile every parameter is one without memory, marked for transformers as initialized."""
    places = [(m, name, p) for m in model.modules() for name, p in m._parameters.items()]
    try:
        for module, name, parameter in places:
            if parameter is not None:
                empty = nn.Parameter(torch.empty(parameter.shape, device="meta"))
                empty._is_hf_initialized = True  # type: ignore[attr-defined]
                module._parameters[name] = empty
        yield
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


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
        self._folder = folder
        self._file_of = _index(folder)
        self._source: dict[str, str] = {}
        for name, names in aliases.items():
            found = [c for c in _candidates(names, prefix) if c in self._file_of]
            if not found:
                raise UserError(
                    f"The weights in {folder} lack {name}: they are incomplete, of another model, "
                    "or laid out otherwise than its parameters."
                )
            self._source[name] = found[0]
            for source in found:
                self._check(source, tuple(shapes[name]))
            for source in found[1:]:
                self._check_same(found[0], source, math.prod(shapes[name]))

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened parameter, 1-D, in the file's dtype."""
        return self._read(self._source[name], start, stop)

    def _read(self, source: str, start: int, stop: int) -> Tensor:
        file = self._file_of[source]
        whole = file[source] if isinstance(file, dict) else file.get_slice(source)
        shape = self._shape(source)
        if not shape:
            scalar: Tensor = file[source] if isinstance(file, dict) else file.get_tensor(source)
            return scalar.flatten()[start:stop]
        row = math.prod(shape[1:])
        first, last = start // row, -(-stop // row)
        rows: Tensor = whole[first:last]
        return rows.flatten()[start - first * row : stop - first * row]

    def _shape(self, source: str) -> tuple[int, ...]:
        file = self._file_of[source]
        if isinstance(file, dict):
            return tuple(file[source].shape)
        return tuple(file.get_slice(source).get_shape())

    def _check(self, source: str, shape: tuple[int, ...]) -> None:
        found = self._shape(source)
        if found != shape:
            raise UserError(
                f"{source} in {self._folder} has shape {found}, the model's configuration says "
                f"{shape}."
            )
        dtype = self._read(source, 0, 1).dtype
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise UserError(
                f"{source} in {self._folder} is stored as {dtype}: quantized weights cannot be "
                "fine-tuned."
            )

    def _check_same(self, one: str, other: str, numel: int) -> None:
        """Tied weights that the files hold under both names must be equal."""
        for start in range(0, numel, _COMPARED_ELEMENTS):
            stop = min(numel, start + _COMPARED_ELEMENTS)
            if not torch.equal(self._read(one, start, stop), self._read(other, start, stop)):
                raise UserError(
                    f"{one} and {other} in {self._folder} differ, but the model's configuration "
                    "ties them: set tie_word_embeddings to false in its config.json."
                )


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
        *[_EARLIER_NAMES[n] for n in names if n in _EARLIER_NAMES],
    ]


def _index(folder: Path) -> dict[str, Any]:
    """Tensor name: the opened file that holds it. The files are those transformers would read."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        single, index = folder / name, folder / f"{name}.index.json"
        if single.is_file():
            files = [single]
        elif index.is_file():
            try:
                weight_map = json.loads(index.read_text())["weight_map"]
                files = [folder / file for file in sorted(set(weight_map.values()))]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{index} is no index of weight files.") from error
        else:
            continue
        opened = [_open(file) for file in files]
        return {key: file for file in opened for key in file.keys()}  # noqa: SIM118 (no dict)
    raise UserError(
        f"{folder} holds no weights: neither model.safetensors nor pytorch_model.bin, nor the "
        "index of either."
    )


def _open(file: Path) -> Any:
    """A safetensors file, or a dict of memory-mapped tensors."""
    if not file.is_file():
        raise UserError(f"The weights are incomplete: {file} is missing.")
    try:
        if file.suffix == ".safetensors":
            return safe_open(file, framework="pt")
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"The weights in {file} cannot be read without running the code they carry, which is "
            "refused; convert them to safetensors."
        ) from error
    except Exception as error:  # every reader has its own
        raise UserError(f"The weights in {file} cannot be read: {_first_line(error)}") from error
    if not isinstance(tensors, dict):
        raise UserError(f"{file} holds no weights by name.")
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


def _plain(error: Exception, config: ModelConfig) -> str:
    if "trust_remote_code" in str(error) and not config.trust_remote_code:
        return (
            "it wants to run code of its own, which is refused; read that code, then set "
            "model.trust_remote_code=true."
        )
    if "attn_implementation=" in str(error):
        return "it has no such attention; set data.packing=false model.attention=eager."
    return _first_line(error)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__

"""Small matrices that are trained beside frozen weights: LoRA, rsLoRA and DoRA of PEFT, QLoRA.

Here are their places in the model, their first values, the frozen weights' content, and their
merging into the weights. Frozen weights lie in the dtype of the computation, or in 4 bits (`nf4`);
trained matrices are float32 with Adam's moments, as any parameter.

LoRA (arXiv 2106.09685): W x + s B A x, s = alpha / rank (rsLoRA, arXiv 2312.03732: alpha / sqrt of
rank). DoRA (arXiv 2402.09353): the rows of W + s B A are scaled to lengths that are trained.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from neftune_dist.config import AdapterConfig, UserError, require, split_list
from neftune_dist.model import nf4
from neftune_dist.model.modules import replace_parameters, stacks_experts
from neftune_dist.model.optimizations import blocks
from neftune_dist.model.weights import WeightFiles

_LORA_A, _LORA_B = "lora_A.default.weight", "lora_B.default.weight"
_MAGNITUDE = "lora_magnitude_vector.default.weight"
_NO_EXPERTS = "all_but_experts"
_BASE = "base_layer."  # where PEFT puts the layer that it adapts


def attach(model: Any, config: AdapterConfig, dtype: torch.dtype) -> None:
    """Put adapters into the blocks of a model on the meta device, and freeze all else.

    Args:
        dtype: of the computation, and so of the frozen weights.

    Raises:
        UserError: targets that the model does not have, a matrix that cannot be quantised, or a
            missing package.
    """
    require("peft", f"adapter.method={config.method}", "neftune-dist[adapters]")
    with nf4.quiet_import():
        import peft
    settings = peft.LoraConfig(**peft_settings(config, targets(model, config)))
    with torch.device("meta"):
        peft.inject_adapter_in_model(settings, model)
    if config.base == "nf4":
        _quantize(model, dtype)

    def frozen(parameter: nn.Parameter) -> nn.Parameter:
        if parameter.requires_grad:
            return parameter
        return nn.Parameter(parameter.to(dtype), requires_grad=False)

    replace_parameters(model, frozen)


def targets(model: Any, config: AdapterConfig) -> list[str]:
    """Last names of the layers to adapt. Raises `UserError` for a name that the model lacks."""
    known = sorted({name.rpartition(".")[2] for name in _matrices(model)})
    if not known:
        raise UserError(f"{type(model).__name__} names no blocks with matrices to adapt.")
    has_experts = any(map(stacks_experts, model.modules()))
    if has_experts and config.base == "nf4":
        raise UserError(
            f"adapter.base=nf4: {type(model).__name__} stacks the matrices of its experts, which "
            "are not quantised, and are most of it: set adapter.base=plain."
        )
    if has_experts and config.targets == "all":
        raise UserError(
            f"adapter.targets=all: {type(model).__name__} stacks the matrices of its experts, "
            f"which take no adapter: set adapter.targets={_NO_EXPERTS}."
        )
    if config.targets == (_NO_EXPERTS if has_experts else "all"):
        return known
    wanted = sorted(set(split_list(config.targets)))
    missing = [name for name in wanted if name not in known]
    if missing or not wanted:
        raise UserError(
            f"adapter.targets={config.targets}: {type(model).__name__} has no matrix "
            f"{', '.join(missing) or 'without a name'} that takes an adapter; those that do are "
            f"{', '.join(known)}."
        )
    return wanted


def peft_settings(config: AdapterConfig, names: list[str] | str) -> dict[str, Any]:
    """Arguments of PEFT's `LoraConfig`.

    Args:
        names: last names of the layers, or a pattern of their whole names.
    """
    return {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": names,
        "use_rslora": config.scaling == "rslora",
        "use_dora": config.method == "dora",
        "task_type": "CAUSAL_LM",
    }


class AdaptedWeights:
    """The content of an adapted model's parameters by ranges, as `WeightFiles` gives a plain one's.

    Args:
        model: adapted, its parameters not yet sharded.
        files: of the plain model.
        seed: of the adapters' first values.
    """

    def __init__(self, model: Any, files: WeightFiles, seed: int) -> None:
        self._files, self._seed = files, seed
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self._packed = {
            name: (layer.in_features, layer.weight.dtype)
            for name, layer in _packed_layers(model).items()
        }

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened parameter, 1-D."""
        if name in self._packed:
            width, dtype = self._packed[name]
            rows, skipped = self._rows(name, width, self._shapes[name][1], start, stop)
            return nf4.pack(rows).view(dtype).flatten()[skipped:][: stop - start]
        if name.endswith(_LORA_A):
            return self._drawn(name)[start:stop]
        if name.endswith(_LORA_B):
            return torch.zeros(stop - start)
        if name.endswith(_MAGNITUDE):
            prefix = name.removesuffix(_MAGNITUDE)
            width = self._shapes[f"{prefix}{_LORA_A}"][1]
            rows, _ = self._rows(f"{prefix}{_BASE}weight", width, 1, start, stop)
            lengths: Tensor = torch.linalg.vector_norm(rows.float(), dim=1)
            return lengths
        return self._files.read(plain_name(name), start, stop)

    def _rows(self, name: str, width: int, size: int, start: int, stop: int) -> tuple[Tensor, int]:
        """The rows of a stored matrix from which elements [start, stop) of a parameter are made.

        Args:
            width: elements of a row of the stored matrix.
            size: elements that the parameter has for each of these rows.

        Returns:
            The rows, and the number of the parameter's elements of these rows before `start`.
        """
        first, last = start // size, -(-stop // size)
        rows = self._files.read(plain_name(name), first * width, last * width).view(-1, width)
        return rows, start - first * size

    def _drawn(self, name: str) -> Tensor:
        """A matrix A as PEFT begins it: Kaiming's uniform with a = sqrt(5), by seed and name."""
        key = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
        bound = 1 / math.sqrt(self._shapes[name][1])
        values = torch.empty(self._shapes[name]).uniform_(-bound, bound, generator=generator)
        return values.flatten()


def plain_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the plain model's parameters, by its names; packed ones as they are unpacked."""
    shapes = {
        plain_name(name): tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if not is_adapter(name)
    }
    for name, layer in _packed_layers(model).items():
        shapes[plain_name(name)] = (layer.out_features, layer.in_features)
    return shapes


def plain_name(name: str) -> str:
    """A parameter's name in the model without adapters."""
    return name.replace(f".{_BASE}", ".")


def is_adapter(name: str) -> bool:
    """Whether the parameter belongs to an adapter."""
    return name.endswith((_LORA_A, _LORA_B, _MAGNITUDE))


def peft_name(name: str) -> tuple[str, str]:
    """The last name of an adapter's layer, and its parameter's name in PEFT's files."""
    layer = name.partition(".lora_")[0].rpartition(".")[2]
    saved = name.replace(_MAGNITUDE, "lora_magnitude_vector").replace(".default.", ".")
    return layer, f"base_model.model.{saved}"


def quantized_names(model: Any) -> set[str]:
    """Names of the plain model's parameters that lie in 4 bits in this adapted one."""
    return set(map(plain_name, _packed_layers(model)))


def _packed_layers(model: Any) -> dict[str, nf4.NF4Linear]:
    """The layers whose matrices lie in 4 bits, by the names of these parameters."""
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nf4.NF4Linear)
    }


def merged(
    name: str, weight: Tensor, trained: Mapping[str, Tensor], config: AdapterConfig, in_4_bits: bool
) -> Tensor:
    """The weight that computes what a frozen weight and its adapter compute together.

    Args:
        name: of the plain model's parameter.
        weight: as the files have it.
        trained: the adapters' parameters by name; those of other layers are ignored.
        config: the section `adapter`.
        in_4_bits: whether the adapter was trained beside the quantised weight.
    """
    if in_4_bits:
        weight = nf4.unpack(nf4.pack(weight), weight.shape[1], torch.float32)
    prefix = name.removesuffix("weight")
    if f"{prefix}{_LORA_A}" not in trained:
        return weight
    scale = config.alpha / (math.sqrt(config.rank) if config.scaling == "rslora" else config.rank)
    total = weight.float() + scale * trained[f"{prefix}{_LORA_B}"] @ trained[f"{prefix}{_LORA_A}"]
    if config.method == "dora":
        lengths = torch.linalg.vector_norm(total, dim=1)
        total *= (trained[f"{prefix}{_MAGNITUDE}"] / lengths)[:, None]
    return total


def _matrices(model: Any) -> dict[str, nn.Linear]:
    """Linear layers of the blocks, by name."""
    inside = {id(m) for block in blocks(model) for m in block.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if id(module) in inside and isinstance(module, nn.Linear)
    }


def _quantize(model: Any, dtype: torch.dtype) -> None:
    """Replace the blocks' matrices, but for the adapters' own, by packed ones."""
    for name, linear in _matrices(model).items():
        if is_adapter(f"{name}.weight"):
            continue
        nf4.check_width(plain_name(f"{name}.weight"), linear.in_features)
        model.set_submodule(name, nf4.NF4Linear(linear, dtype))

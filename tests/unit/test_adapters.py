"""Adapters and 4-bit matrices: by hand on small numbers; under every engine in
`tests/distributed/test_adapters.py`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from neftune_dist.config import AdapterConfig, ModelConfig
from neftune_dist.model import load, nf4
from neftune_dist.model.adapters import merged, plain_shapes
from tests.support import tiny_model

PREFIX = "model.layers.0.self_attn.q_proj."
A, B = f"{PREFIX}lora_A.default.weight", f"{PREFIX}lora_B.default.weight"
MAGNITUDE = f"{PREFIX}lora_magnitude_vector.default.weight"


def unequal_blocks(num_rows: int, num_blocks: int) -> Tensor:
    """Rows whose blocks of 64 have largest weights of many sizes."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(num_rows, num_blocks, nf4.BLOCK, generator=draw)
    sizes = torch.exp(torch.randn(num_rows, num_blocks, 1, generator=draw))
    return (rows * sizes).view(num_rows, -1)


def fields(packed: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A packed row's codes (num_rows, width), levels, least scale and step between levels."""
    num_codes, num_scales = width // 2, width // nf4.BLOCK
    pairs, levels, bounds, _ = packed.split(
        [num_codes, num_scales, 8, packed.shape[1] - num_codes - num_scales - 8], dim=1
    )
    codes = torch.stack([pairs >> 4, pairs & 15], 2).flatten(1)
    least, step = bounds.contiguous().view(torch.float32).unbind(1)
    return codes, levels, least[:, None], step[:, None]


def test_nf4_rounds_scales_and_weights_to_the_nearest() -> None:
    """A scale errs by half a step between two of 256 levels, a weight by half the gap between the
    two values of NF4 around it."""
    rows = unequal_blocks(5, 12)
    codes, levels, least, step = fields(nf4.pack(rows), rows.shape[1])
    largest = rows.view(5, 12, nf4.BLOCK).abs().amax(2)
    assert torch.equal(least, largest.amin(1, keepdim=True))
    torch.testing.assert_close(255 * step, largest.amax(1, keepdim=True) - least)
    scales = least + levels * step
    assert bool(((scales - largest).abs() <= 0.5001 * step).all())
    assert int(levels.min()) == 0 and int(levels.max()) == 255
    units = rows.view(5, 12, nf4.BLOCK) / scales[..., None]
    values = bnb.get_4bit_type("nf4", device="cpu")
    nearest = (units[..., None] - values).abs().argmin(-1)
    assert torch.equal(codes.long(), nearest.flatten(1))


def test_nf4_unpacks_to_the_values_of_its_codes() -> None:
    rows = unequal_blocks(3, 4)
    packed = nf4.pack(rows)
    codes, levels, least, step = fields(packed, rows.shape[1])
    scales = (least + levels * step).repeat_interleave(nf4.BLOCK, 1)
    expected = bnb.get_4bit_type("nf4", device="cpu")[codes.long()] * scales
    assert torch.equal(nf4.unpack(packed, rows.shape[1], torch.float32), expected)


def test_nf4_of_equal_and_of_zero_blocks_is_finite() -> None:
    for value in (0.0, -2.0):
        rows = torch.full((2, 2 * nf4.BLOCK), value)
        assert torch.equal(nf4.unpack(nf4.pack(rows), rows.shape[1], torch.float32), rows)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
@pytest.mark.parametrize("in_4_bits", [False, True])
def test_merged_weight_is_that_of_the_papers(method: str, scaling: str, in_4_bits: bool) -> None:
    torch.manual_seed(0)
    weight, a, b = torch.randn(6, 64), torch.randn(4, 64), torch.randn(6, 4)
    magnitude = torch.rand(6) + 0.5
    config = AdapterConfig(method=method, rank=4, alpha=8.0, scaling=scaling)
    trained = {A: a, B: b, MAGNITUDE: magnitude}
    found = merged(f"{PREFIX}weight", weight, trained, config, in_4_bits)
    base = nf4.unpack(nf4.pack(weight), 64, torch.float32) if in_4_bits else weight
    expected = base + 8.0 / (math.sqrt(4) if scaling == "rslora" else 4) * b @ a
    if method == "dora":
        expected = expected / expected.norm(dim=1, keepdim=True) * magnitude[:, None]
    torch.testing.assert_close(found, expected)
    untouched = merged("model.layers.1.mlp.up_proj.weight", weight, trained, config, False)
    assert torch.equal(untouched, weight)


def adapted(folder: Path, seed: int = 0, tied: bool = True, **settings: Any) -> tuple[Any, Any]:
    """A tiny adapted model on the meta device, and what its parameters begin with."""
    tiny_model.make_model(folder, tied=tied, intermediate=128)
    config = ModelConfig(str(folder))
    model = load.build(folder, config, True, AdapterConfig(method="lora", **settings))
    return model, load.open_weights(model, folder, config, seed)


def test_adapters_begin_as_pefts_do_and_by_seed_and_name(tmp_path: Path) -> None:
    """A uniform on +- 1 / sqrt(width), another for every layer and seed; B is zero."""
    model, first = adapted(tmp_path / "model", seed=1)
    other_seed = adapted(tmp_path / "other", seed=2)[1]
    drawn = {
        name: first.read(name, 0, parameter.numel())
        for name, parameter in model.named_parameters()
        if "lora_A" in name
    }
    for name, values in drawn.items():
        bound = 1 / math.sqrt(model.get_parameter(name).shape[1])
        assert 0.9 * bound < float(values.abs().max()) <= bound
        assert not torch.equal(values, other_seed.read(name, 0, len(values)))
        assert torch.equal(first.read(name, 5, 9), values[5:9])
        zeros = first.read(name.replace("lora_A", "lora_B"), 0, 7)
        assert torch.equal(zeros, torch.zeros(7))
    starts = {tuple(values[:8].tolist()) for values in drawn.values()}
    assert len(starts) == len(drawn) > 4


@pytest.mark.parametrize("base", ["plain", "nf4"])
def test_frozen_weights_have_the_dtype_of_the_computation_and_stay_tied(
    base: str, tmp_path: Path
) -> None:
    model, content = adapted(tmp_path / "model", base=base)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)
        assert content.read(name, 0, parameter.numel()).shape == (parameter.numel(),)
    shapes = plain_shapes(model)
    assert shapes["model.layers.0.mlp.down_proj.weight"][1] == 128  # also where it is packed

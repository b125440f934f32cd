"""Frozen matrices in 4 bits: NF4 with doubly quantised scales (QLoRA, arXiv 2305.14314, section 3).

A matrix is quantised row by row, and a packed row holds all that is needed to unpack it. So any
rank makes its shard from the rows of the file that fall into it, and shards travel as plain tensors
of the computation's dtype, whose values mean nothing. A weight of a row of 4096 takes 4.14 bits.

A packed row: the 4-bit codes of its weights, two a byte; for every block of 64 weights its scale
(their absolute maximum) as an 8-bit level; the row's least scale and the step from level to level,
float32; zeros up to a multiple of 4 bytes. (QLoRA keeps the 8-bit scales of 256 blocks around their
mean.)
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neftune_dist.config import UserError, require

BLOCK = 64  # weights that share a scale


def row_bytes(width: int) -> int:
    """Bytes of a packed row of `width` weights, a multiple of `BLOCK`."""
    return -(-(width // 2 + width // BLOCK + 8) // 4) * 4


def pack(rows: Tensor) -> Tensor:
    """Quantised rows: float (num_rows, width) to uint8 (num_rows, row_bytes)."""
    num_rows, width = rows.shape
    packed = torch.zeros(num_rows, row_bytes(width), dtype=torch.uint8, device=rows.device)
    blocks = rows.float().reshape(num_rows, -1, BLOCK)
    scales = blocks.abs().amax(2)
    least, greatest = scales.amin(1, keepdim=True), scales.amax(1, keepdim=True)
    step = (greatest - least) / 255
    levels = torch.where(step > 0, (scales - least) / step, 0).round().to(torch.uint8)
    scales = least + levels * step
    # Divided by the rounded scale, which `unpack` reads: the largest may be a little above 1.
    units = torch.where(scales[..., None] > 0, blocks / scales[..., None], 0)
    values = _functional().get_4bit_type("nf4", device=str(rows.device))
    codes = torch.bucketize(units, (values[1:] + values[:-1]) / 2).to(torch.uint8)
    codes = codes.view(num_rows, -1, 2)
    own_codes, own_levels, own_bounds = _fields(packed, width)
    own_codes[:] = (codes[..., 0] << 4) | codes[..., 1]
    own_levels[:] = levels
    own_bounds[:] = torch.cat([least, step], 1).view(torch.uint8)
    return packed


def _fields(packed: Tensor, width: int) -> tuple[Tensor, ...]:
    """Views of packed rows: codes, 8-bit levels of the scales, and the bytes of the least scale and
    of the step between levels."""
    sizes = [width // 2, width // BLOCK, 8]
    fields: tuple[Tensor, ...] = packed[:, : sum(sizes)].split(sizes, dim=1)
    return fields


def unpack(packed: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The weights of packed rows: uint8 (num_rows, row_bytes) to (num_rows, width) of `dtype`."""
    codes, levels, bounds = _fields(packed, width)
    least, step = bounds.contiguous().view(torch.float32).split(1, 1)
    scales = least + levels * step
    weights: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        codes.reshape(-1, 1), scales.flatten(), BLOCK, "nf4", (len(packed), width), dtype
    )
    return weights


def check_width(name: str, width: int) -> None:
    """Raise `UserError` where a matrix's rows cannot be quantised."""
    if width % BLOCK:
        raise UserError(
            f"adapter.base=nf4 quantises blocks of {BLOCK} weights, and the rows of {name} have "
            f"{width}: set adapter.base=plain."
        )
    _functional()


class NF4Linear(nn.Linear):
    """A frozen linear layer with a packed matrix, (out_features, row_bytes / itemsize) of `dtype`,
    which is unpacked for every product, forward and backward."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        shape = (linear.out_features, row_bytes(linear.in_features) // dtype.itemsize)
        packed = torch.empty(shape, dtype=dtype, device=linear.weight.device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        """The product with the unpacked matrix, as `nn.Linear` computes it."""
        product: Tensor = _Product.apply(input, self.weight, self.in_features)
        return product if self.bias is None else product + self.bias


class _Product(torch.autograd.Function):
    """The linear layer's product, which saves the packed matrix for its backward."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, width: int) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.width = width
        return F.linear(input, unpack(weight.view(torch.uint8), width, input.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return grad @ unpack(weight.view(torch.uint8), ctx.width, grad.dtype), None, None


@contextmanager
def quiet_import() -> Iterator[None]:
    """Silence bitsandbytes, which logs at import which kernels it could download."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _functional() -> Any:
    """Import bitsandbytes, which registers its operators."""
    require("bitsandbytes", "adapter.base=nf4", "neftune-dist[adapters]")
    with quiet_import():
        import bitsandbytes.functional
    return bitsandbytes.functional

"""The operator's GPU half: one Triton kernel that reads and writes the activation once.

One program a token: it generates the noise in registers, adds it, and leaves the squared norm of
what it added. The bits are those of `law.draw` and of the CPU: Philox4x32-10 on 32-bit words, and
multiplication and addition rounded one after the other, never fused.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_DISTRIBUTIONS = {"uniform": 0, "gaussian": 1, "symmetric": 2}
_MOST_BLOCKS = 1024  # counters, of four channels each, that a program holds in registers at a time


@triton.jit
def _draw(word, other, DISTRIBUTION: tl.constexpr, SECOND: tl.constexpr, TAU: tl.constexpr):
    if DISTRIBUTION == 0:
        odd = ((word >> 8).to(tl.int32) << 1) - 16777215  # 2^24 - 1
        return odd.to(tl.float32) * 5.9604644775390625e-08  # 2^-24
    if DISTRIBUTION == 2:
        return 1.0 - 2.0 * (word >> 31).to(tl.float32)
    # word and other are the pair of Box and Muller's transform, in this order.
    unit = (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2^-32
    angle = (other.to(tl.float64) + 0.5) * 2.3283064365386963e-10 * TAU
    radius = tl.sqrt(tl.log(unit) * (-2.0 / 3.0))
    turned = tl.sin(angle) if SECOND else tl.cos(angle)
    return (radius * turned).to(tl.float32)


@triton.jit(do_not_specialize=["columns", "key"])
def _add_noise(
    x,
    scale,
    word0,
    word1,
    word2,
    word3,
    squares,
    columns,
    hidden_size,
    key,
    row_stride,
    column_stride,
    channel_stride,
    stride0,
    stride1,
    stride2,
    stride3,
    DISTRIBUTION: tl.constexpr,
    BLOCKS: tl.constexpr,
    TAU: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    factor = tl.load(scale + token)
    total = 0.0
    if factor != 0.0:
        x += (token // columns) * row_stride + (token % columns) * column_stride
        c0 = tl.load(word0 + token * stride0).to(tl.uint32)
        c1 = tl.load(word1 + token * stride1).to(tl.uint32)
        c2 = tl.load(word2 + token * stride2).to(tl.uint32)
        c3 = tl.load(word3 + token * stride3).to(tl.uint32)
        for first in range(0, tl.cdiv(hidden_size, 4), BLOCKS):
            block = first + tl.arange(0, BLOCKS)
            zero = (block * 0).to(tl.uint32)
            w0, w1, w2, w3 = tl.philox(
                key, zero + c0, block.to(tl.uint32) + c1, zero + c2, zero + c3
            )
            d0 = _draw(w0, w1, DISTRIBUTION, False, TAU)
            if DISTRIBUTION == 1:
                d1 = _draw(w0, w1, DISTRIBUTION, True, TAU)
                d3 = _draw(w2, w3, DISTRIBUTION, True, TAU)
            else:
                d1 = _draw(w1, w0, DISTRIBUTION, True, TAU)
                d3 = _draw(w3, w2, DISTRIBUTION, True, TAU)
            d2 = _draw(w2, w3, DISTRIBUTION, False, TAU)
            # Interleaved, so that neighbouring lanes touch neighbouring channels.
            draws = tl.reshape(tl.join(tl.join(d0, d2), tl.join(d1, d3)), (4 * BLOCKS,))
            channel = 4 * first + tl.arange(0, 4 * BLOCKS)
            inside = channel < hidden_size
            place = x + channel.to(tl.int64) * channel_stride
            before = tl.load(place, mask=inside, other=0.0)
            wide = before.to(tl.float32)
            after = (wide + draws * factor).to(before.dtype)
            tl.store(place, after, mask=inside)
            added = tl.where(inside, after.to(tl.float32) - wide, 0.0)
            total += tl.sum(added * added)
    tl.store(squares + token, total)


def launch(
    x: Tensor,
    scale: Tensor,
    words: tuple[Tensor, Tensor, Tensor, Tensor],
    seed: int,
    distribution: str,
) -> Tensor:
    """The operator `op.add_noise_`, on a GPU."""
    rows, columns, hidden_size = x.shape
    squares = torch.empty(rows * columns, dtype=torch.float32, device=x.device)
    blocks = min(_MOST_BLOCKS, triton.next_power_of_2(triton.cdiv(hidden_size, 4)))
    if rows * columns:
        with torch.cuda.device_of(x):
            _add_noise[(rows * columns,)](
                x,
                scale.contiguous(),
                *words,
                squares,
                columns,
                hidden_size,
                seed,
                *x.stride(),
                *(word.stride(0) for word in words),
                DISTRIBUTION=_DISTRIBUTIONS[distribution],
                BLOCKS=blocks,
                TAU=math.tau,
                num_warps=4 if blocks >= 256 else 1,
                enable_fp_fusion=False,
            )
    return squares

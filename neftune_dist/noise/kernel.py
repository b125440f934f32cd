"""The noise operator on a GPU: one Triton kernel that reads and writes the activation once.

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

from neftune_dist.noise.philox import KEY_STEPS, MULTIPLIERS

_DISTRIBUTIONS = {"uniform": 0, "gaussian": 1, "symmetric": 2}
# By distribution: bytes that a program handles at a time, and its number of warps. That is 64 bytes
# a thread, which spread the cost of what a thread computes once; for gaussian 16, because logarithm
# and sine in float64 take the registers.
_TILES = {"uniform": (4096, 2), "gaussian": (2048, 4), "symmetric": (4096, 2)}
_LEAST_CHANNELS = 512
_A, _B = tl.constexpr(MULTIPLIERS[0]), tl.constexpr(MULTIPLIERS[1])
_KEY_A, _KEY_B = tl.constexpr(KEY_STEPS[0]), tl.constexpr(KEY_STEPS[1])
_TAU = tl.constexpr(math.tau)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 on uint32 words.

    Most of the kernel's time is spent here. Each product is one 64-bit multiplication; Triton's own
    `philox` takes two, for the high and the low half.
    """
    for _ in tl.static_range(10):
        product0 = c0.to(tl.uint64) * _A
        product1 = c2.to(tl.uint64) * _B
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = product1.to(tl.uint32)
        c3 = product0.to(tl.uint32)
        k0 += _KEY_A
        k1 += _KEY_B
    return c0, c1, c2, c3


@triton.jit
def _draw(word, other, DISTRIBUTION: tl.constexpr, SECOND: tl.constexpr):
    if DISTRIBUTION == 0:
        # 2^31 (2 (word >> 8) + 1) / 2^24 - 2^31 as a signed integer: 24 bits, exact in float32.
        odd = ((word & 0xFFFFFF00) ^ 0x80000080).to(tl.int32, bitcast=True)
        return odd.to(tl.float32) * 4.656612873077393e-10  # 2^-31
    if DISTRIBUTION == 2:
        # 1.0 with the word's highest bit for a sign.
        return ((word & 0x80000000) | 0x3F800000).to(tl.float32, bitcast=True)
    # word and other are the pair of Box and Muller's transform, in this order.
    unit = (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2^-32
    angle = (other.to(tl.float64) + 0.5) * 2.3283064365386963e-10 * _TAU
    radius = tl.sqrt(tl.log(unit) * (-2.0 / 3.0))
    turned = tl.sin(angle) if SECOND else tl.cos(angle)
    return (radius * turned).to(tl.float32)


@triton.jit
def _draw_block(c0, c1, c2, c3, k0, k1, DISTRIBUTION: tl.constexpr):
    """The draws of a counter's four channels."""
    w0, w1, w2, w3 = philox(c0, c1, c2, c3, k0, k1)
    d0 = _draw(w0, w1, DISTRIBUTION, False)
    d2 = _draw(w2, w3, DISTRIBUTION, False)
    if DISTRIBUTION == 1:
        d1 = _draw(w0, w1, DISTRIBUTION, True)
        d3 = _draw(w2, w3, DISTRIBUTION, True)
    else:
        d1 = _draw(w1, w0, DISTRIBUTION, True)
        d3 = _draw(w3, w2, DISTRIBUTION, True)
    return d0, d1, d2, d3


@triton.jit
def _draw_tile(
    c0, c1, c2, c3, k0, k1, DISTRIBUTION: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr
):
    """The draws of CHANNELS neighbouring channels, from the counter's first channel on.

    A thread draws for the channels that it loads, 16 bytes at a time: those of one counter
    (float32) or, where WIDE, of two (16-bit dtypes).
    """
    if WIDE:
        block = (2 * tl.arange(0, CHANNELS // 8)).to(tl.uint32) + c1
        d0, d1, d2, d3 = _draw_block(c0, block, c2, c3, k0, k1, DISTRIBUTION)
        d4, d5, d6, d7 = _draw_block(c0, block + 1, c2, c3, k0, k1, DISTRIBUTION)
        even = tl.join(tl.join(d0, d4), tl.join(d2, d6))
        odd = tl.join(tl.join(d1, d5), tl.join(d3, d7))
    else:
        block = tl.arange(0, CHANNELS // 4).to(tl.uint32) + c1
        d0, d1, d2, d3 = _draw_block(c0, block, c2, c3, k0, k1, DISTRIBUTION)
        even, odd = tl.join(d0, d2), tl.join(d1, d3)
    return tl.reshape(tl.join(even, odd), (CHANNELS,))


@triton.jit(do_not_specialize=["key0", "key1"])
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
    key0,
    key1,
    row_stride,
    column_stride,
    channel_stride,
    stride0,
    stride1,
    stride2,
    stride3,
    DISTRIBUTION: tl.constexpr,
    CHANNELS: tl.constexpr,
    IS_CUT: tl.constexpr,
    WIDE: tl.constexpr,
):
    token = tl.program_id(0)
    row, column = (token // columns).to(tl.int64), (token % columns).to(tl.int64)
    x += row * row_stride + column * column_stride
    token = token.to(tl.int64)
    factor = tl.load(scale + token)
    c0 = tl.load(word0 + token * stride0).to(tl.uint32)
    c1 = tl.load(word1 + token * stride1).to(tl.uint32)
    c2 = tl.load(word2 + token * stride2).to(tl.uint32)
    c3 = tl.load(word3 + token * stride3).to(tl.uint32)
    k0, k1 = key0.to(tl.uint32), key1.to(tl.uint32)
    total = 0.0
    if factor != 0.0:
        for first in range(0, hidden_size, CHANNELS):
            channel = first + tl.arange(0, CHANNELS)
            place = x + channel.to(tl.int64) * channel_stride
            # Without a partial last tile the mask is a constant of the compiled kernel.
            inside = channel < hidden_size if IS_CUT else tl.full((CHANNELS,), True, tl.int1)
            draws = _draw_tile(c0, c1 + first // 4, c2, c3, k0, k1, DISTRIBUTION, CHANNELS, WIDE)
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
    """Run the kernel: `op.add_noise_` on a GPU, with the same arguments and result."""
    rows, columns, hidden_size = x.shape
    row_stride, column_stride, channel_stride = x.stride()
    squares = torch.empty(rows * columns, dtype=torch.float32, device=x.device)
    if rows == 1 or row_stride == columns * column_stride:
        # One long row: Triton compiles a kernel for columns == 1, without the division.
        columns, row_stride = 1, column_stride
    # Always in the range of int32: for an int64 Triton would compile another kernel.
    keys = ((half + 2**31) % 2**32 - 2**31 for half in (seed, seed >> 32))
    channels, num_warps = _tile(hidden_size, x.element_size(), distribution)
    if len(squares):
        with torch.cuda.device_of(x):
            _add_noise[(len(squares),)](
                x,
                scale.contiguous(),
                *words,
                squares,
                columns,
                hidden_size,
                *keys,
                row_stride,
                column_stride,
                channel_stride,
                *(word.stride(0) for word in words),
                DISTRIBUTION=_DISTRIBUTIONS[distribution],
                CHANNELS=channels,
                IS_CUT=hidden_size % channels != 0,
                WIDE=x.element_size() == 2,
                num_warps=num_warps,
                enable_fp_fusion=False,
            )
    return squares


def _tile(hidden_size: int, itemsize: int, distribution: str) -> tuple[int, int]:
    """Channels that a program handles at a time, a power of 2, and its number of warps.

    The channels divide the hidden size, unless its largest power of 2 is small: then one tile
    reaches beyond it, and the lanes there idle.
    """
    most_bytes, warps = _TILES[distribution]
    most = most_bytes // itemsize
    channels = hidden_size & -hidden_size
    if channels < _LEAST_CHANNELS:
        channels = triton.next_power_of_2(hidden_size)
    channels = max(8, min(most, channels))
    return channels, max(1, warps * channels // most)

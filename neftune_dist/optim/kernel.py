"""The GPU half of `LowPrecisionAdamW`: a Triton kernel that reads and writes memory once an update.

An element costs 16 bytes with 8-bit moments and 20 with bfloat16 ones: the parameter and its
gradient are read, the parameter is written, and the moments are read and written as they are kept.
As torch's operators, one after the other, it would be some 280.

The bits are those of the reference in `adamw_low_precision`: the same operations in float32, each
rounded by itself and none fused. The codes of `quantized_state` and the random words of `rounding`
never leave the registers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from neftune_dist.optim.quantized_state import (
    BLOCK,
    CODE_FORMATS,
    GREATEST_EXPONENT,
    LEAST_EXPONENT,
    QuantizedMoment,
)
from neftune_dist.optim.rounding import KEY_POSITIONS, LAST_SHIFT, ROUNDS, draw_keys

if TYPE_CHECKING:
    from neftune_dist.optim.adamw_low_precision import Update
    from neftune_dist.optim.param_slice import Moment, ParamSlice

_WARPS = 4
_ROWS = {8: 4, 16: 2, 32: 2}  # by bits of a moment: rows of 256 elements that a program updates

_ONE_BITS = 127 << 23  # the bits of 1.0
_BLOCK = tl.constexpr(BLOCK)
_ONE = tl.constexpr(_ONE_BITS)
_LEAST = tl.constexpr(_ONE_BITS + (LEAST_EXPONENT << 23))
_GREATEST = tl.constexpr(_ONE_BITS + (GREATEST_EXPONENT << 23))
_MANTISSA_BITS, _TOP = (tl.constexpr(value) for value in CODE_FORMATS[False])
_ROOT_MANTISSA_BITS, _ROOT_TOP = (tl.constexpr(value) for value in CODE_FORMATS[True])
_SHIFT0, _SHIFT1, _SHIFT2 = (tl.constexpr(shift) for shift, _ in ROUNDS)
_FACTOR0, _FACTOR1, _FACTOR2 = (tl.constexpr(factor) for _, factor in ROUNDS)
_LAST_SHIFT = tl.constexpr(LAST_SHIFT)


@triton.jit
def _decode(code, MANTISSA_BITS: tl.constexpr, TOP: tl.constexpr):
    """The values of codes, int32, as shares of the scale. Bits above TOP are the sign."""
    size = code & TOP
    bits = ((size - TOP) << (23 - MANTISSA_BITS)) + _ONE
    bits = tl.where(size > 0, bits, 0) | ((code & (255 - TOP)) << 24)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _encode(bits, MANTISSA_BITS: tl.constexpr, TOP: tl.constexpr):
    """The codes of numbers that are not negative, and the scale of each row; bits: the numbers',
    int32 (rows, 256), which have the numbers' order."""
    SHIFT: tl.constexpr = 23 - MANTISSA_BITS
    scale = tl.minimum(tl.maximum(tl.max(bits, 1), _LEAST), _GREATEST)
    scale = scale.to(tl.float32, bitcast=True)
    share = tl.div_rn(bits.to(tl.float32, bitcast=True), scale[:, None])
    # The bits as a number: half of the last place that stays, less the bits of code 0.
    code = share.to(tl.int32, bitcast=True) + (((2 * TOP + 1) << (SHIFT - 1)) - _ONE)
    return tl.minimum(tl.maximum(code >> SHIFT, 0), TOP), scale


@triton.jit
def _random_words(position, key0, key1):
    """`rounding.draw_words`, uint32, for positions below 2^32."""
    x = position.to(tl.uint32) + key0.to(tl.uint32)
    x = (x ^ (x >> _SHIFT0)) * _FACTOR0
    x = (x ^ (x >> _SHIFT1)) * _FACTOR1
    x += key1.to(tl.uint32)
    x = (x ^ (x >> _SHIFT2)) * _FACTOR2
    return x ^ (x >> _LAST_SHIFT)


@triton.jit
def _load_moment(moment, mask, BITS: tl.constexpr):
    held = tl.load(moment, mask=mask, other=0)
    if BITS == 16:  # bfloat16 as int16
        return (held.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return held


@triton.jit
def _store_moment(moment, value, noise, mask, BITS: tl.constexpr):
    if BITS == 16:
        value = ((value.to(tl.int32, bitcast=True) + noise.to(tl.int32)) >> 16).to(tl.int16)
    tl.store(moment, value, mask=mask)


@triton.jit(do_not_specialize=["key0", "key1"])
def _update(
    values,
    grads,
    exp_avg,  # as the moment is kept: codes, bfloat16 as int16, or float32
    exp_avg_scales,  # of the codes; else None
    exp_avg_sq,
    exp_avg_sq_scales,
    grad_scale,
    numel,
    lead,
    key0,
    key1,
    decay,
    beta1,
    rest1,
    beta2,
    rest2,
    correction,
    epsilon,
    step_size,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row * _BLOCK < lead + numel
    place = row[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    element = place - lead
    inside = (element >= 0) & (element < numel)
    value = tl.load(values + element, mask=inside, other=0.0)
    grad = tl.load(grads + element, mask=inside, other=0.0)
    if BITS == 8:
        code = tl.load(exp_avg + place, mask=is_row[:, None], other=0).to(tl.int32)
        root_code = tl.load(exp_avg_sq + place, mask=is_row[:, None], other=0).to(tl.int32)
        scale = tl.load(exp_avg_scales + row, mask=is_row, other=1.0)
        root_scale = tl.load(exp_avg_sq_scales + row, mask=is_row, other=1.0)
        first = _decode(code, _MANTISSA_BITS, _TOP) * scale[:, None]
        root = _decode(root_code, _ROOT_MANTISSA_BITS, _ROOT_TOP) * root_scale[:, None]
        second = root * root
    else:
        first = _load_moment(exp_avg + element, inside, BITS)
        second = _load_moment(exp_avg_sq + element, inside, BITS)

    if grad_scale is not None:
        grad = tl.div_rn(grad, tl.load(grad_scale))
    first = first * beta1 + grad * rest1
    second = second * beta2 + grad * grad * rest2
    root = tl.sqrt_rn(second)
    change = tl.div_rn(first, root * correction + epsilon) * step_size
    tl.store(values + element, value * decay + change, mask=inside)

    if BITS == 8:
        bits = first.to(tl.int32, bitcast=True)
        code, scale = _encode(bits & 0x7FFFFFFF, _MANTISSA_BITS, _TOP)
        code |= (bits >> 24) & 128
        tl.store(exp_avg + place, code.to(tl.uint8), mask=is_row[:, None])
        tl.store(exp_avg_scales + row, scale, mask=is_row)
        bits = root.to(tl.int32, bitcast=True)
        root_code, root_scale = _encode(bits, _ROOT_MANTISSA_BITS, _ROOT_TOP)
        # Only zero becomes zero.
        root_code = tl.where(root > 0, tl.maximum(root_code, 1), root_code)
        tl.store(exp_avg_sq + place, root_code.to(tl.uint8), mask=is_row[:, None])
        tl.store(exp_avg_sq_scales + row, root_scale, mask=is_row)
    else:
        words = _random_words(element, key0, key1)
        _store_moment(exp_avg + element, first, words & 0xFFFF, inside, BITS)
        _store_moment(exp_avg_sq + element, second, words >> 16, inside, BITS)


def update_slice(
    update: Update,
    param_slice: ParamSlice,
    values: Tensor,
    grads: Tensor,
    moments: tuple[Moment, Moment],
    grad_scale: Tensor | None,
    seed: int,
) -> None:
    """Update a slice of a parameter, in place.

    Args:
        values, grads: float32 (n,).
        moments: the first and the second one, (n,).
        grad_scale: float32 (), the divisor of the gradients; None: 1.
        seed: of the rounding.
    """
    numbers = (
        update.decay,
        update.beta1,
        1 - update.beta1,
        update.beta2,
        1 - update.beta2,
        update.correction,
        update.epsilon,
        update.step_size,
    )

    def launch(
        part: slice,
        state: tuple[Any, ...],
        bits: int,
        lead: int = 0,
        keys: tuple[int, int] = (0, 0),
    ) -> None:
        numel = part.stop - part.start
        rows = triton.cdiv(lead + numel, BLOCK)
        with torch.cuda.device_of(values):
            _update[(triton.cdiv(rows, _ROWS[bits]),)](
                values[part],
                grads[part],
                *state,
                grad_scale,
                numel,
                lead,
                *keys,
                *numbers,
                BITS=bits,
                ROWS=_ROWS[bits],
                num_warps=_WARPS,
                enable_fp_fusion=False,
            )

    first, second = moments
    if isinstance(first, QuantizedMoment) and isinstance(second, QuantizedMoment):
        state = (first.codes, first.scales, second.codes, second.scales)
        launch(slice(0, len(values)), state, bits=8, lead=first.lead)
        return
    for begin, end in param_slice.split(KEY_POSITIONS):
        part = slice(begin, end)
        held = [moment[part] for moment in moments]
        bits = 8 * held[0].element_size()
        if bits == 16:
            held = [moment.view(torch.int16) for moment in held]
        keys = draw_keys(seed, update.number, param_slice.name, param_slice.start + begin)
        launch(part, (held[0], None, held[1], None), bits, keys=keys)

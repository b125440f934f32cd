"""The GPU half of `ReducedAdamW`: Triton kernels that read and write memory once an update.

An element costs 16 bytes with 8-bit moments and 20 with bfloat16 ones: the parameter and its
gradient are read, the parameter is written, and the moments are read and written as they are kept.
As torch's operators, one after the other, it would be some 280.

The bits are those of the reference in `reduced`: the same operations in float32, each rounded by
itself and none fused; the codes of `blocks` and the random words of `rounding` never leave the
registers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from neftune_dist.optim.quantized_state import BLOCK, GREATEST_SCALE, LEAST_SCALE, Blocks
from neftune_dist.optim.rounding import LAST_SHIFT, ROUNDS, draw_keys

if TYPE_CHECKING:
    from neftune_dist.optim.adamw_low_precision import Moment, Update

_WARPS = 4
_ROWS = 4  # blocks of 256 that a program updates
_TILE = 512  # elements that a program updates where moments have no blocks

_ONE_BITS = 127 << 23  # the bits of 1.0
_BLOCK = tl.constexpr(BLOCK)
_ONE = tl.constexpr(_ONE_BITS)
_LEAST = tl.constexpr(_ONE_BITS + (LEAST_SCALE << 23))
_GREATEST = tl.constexpr(_ONE_BITS + (GREATEST_SCALE << 23))
_SHIFT0, _SHIFT1, _SHIFT2 = (tl.constexpr(shift) for shift, _ in ROUNDS)
_FACTOR0, _FACTOR1, _FACTOR2 = (tl.constexpr(factor) for _, factor in ROUNDS)
_LAST_SHIFT = tl.constexpr(LAST_SHIFT)


@triton.jit
def _adam(
    value,
    grad,
    exp_avg,
    exp_avg_sq,
    grad_scale,
    decay,
    beta1,
    rest1,
    beta2,
    rest2,
    correction,
    epsilon,
    step_size,
):
    """The parameter, both moments and the second one's root after the update."""
    if grad_scale is not None:
        grad = tl.div_rn(grad, tl.load(grad_scale))
    exp_avg = exp_avg * beta1 + grad * rest1
    exp_avg_sq = exp_avg_sq * beta2 + grad * grad * rest2
    root = tl.sqrt_rn(exp_avg_sq)
    change = tl.div_rn(exp_avg, root * correction + epsilon) * step_size
    return value * decay + change, exp_avg, exp_avg_sq, root


@triton.jit
def _decode(code, MANTISSA_BITS: tl.constexpr, TOP: tl.constexpr):
    """What the codes, int32, are worth as shares of the scale. Bits above TOP are the sign."""
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
    code = share.to(tl.int32, bitcast=True) + ((1 << (SHIFT - 1)) + (TOP << SHIFT) - _ONE)
    return tl.minimum(tl.maximum(code >> SHIFT, 0), TOP), scale


@triton.jit
def _update_blocks(
    values,
    grads,
    codes,
    scales,
    root_codes,
    root_scales,
    grad_scale,
    numel,
    lead,
    decay,
    beta1,
    rest1,
    beta2,
    rest2,
    correction,
    epsilon,
    step_size,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = row[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    is_row = row * _BLOCK < lead + numel
    element = place - lead
    inside = (element >= 0) & (element < numel)
    value = tl.load(values + element, mask=inside, other=0.0)
    grad = tl.load(grads + element, mask=inside, other=0.0)
    code = tl.load(codes + place, mask=is_row[:, None], other=0).to(tl.int32)
    root_code = tl.load(root_codes + place, mask=is_row[:, None], other=0).to(tl.int32)
    scale = tl.load(scales + row, mask=is_row, other=1.0)
    root_scale = tl.load(root_scales + row, mask=is_row, other=1.0)

    exp_avg = _decode(code, 3, 127) * scale[:, None]
    root = _decode(root_code, 4, 255) * root_scale[:, None]
    value, exp_avg, _, root = _adam(
        value,
        grad,
        exp_avg,
        root * root,
        grad_scale,
        decay,
        beta1,
        rest1,
        beta2,
        rest2,
        correction,
        epsilon,
        step_size,
    )
    tl.store(values + element, value, mask=inside)

    bits = exp_avg.to(tl.int32, bitcast=True)
    code, scale = _encode(bits & 0x7FFFFFFF, 3, 127)
    code |= (bits >> 24) & 128
    tl.store(codes + place, code.to(tl.uint8), mask=is_row[:, None])
    tl.store(scales + row, scale, mask=is_row)
    root_code, root_scale = _encode(root.to(tl.int32, bitcast=True), 4, 255)
    root_code = tl.where(root > 0, tl.maximum(root_code, 1), root_code)  # only zero becomes zero
    tl.store(root_codes + place, root_code.to(tl.uint8), mask=is_row[:, None])
    tl.store(root_scales + row, root_scale, mask=is_row)


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
def _load_moment(moment, mask, BF16: tl.constexpr):
    held = tl.load(moment, mask=mask, other=0)
    if BF16:  # as int16
        return (held.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return held


@triton.jit
def _store_moment(moment, value, noise, mask, BF16: tl.constexpr):
    if BF16:
        value = ((value.to(tl.int32, bitcast=True) + noise.to(tl.int32)) >> 16).to(tl.int16)
    tl.store(moment, value, mask=mask)


@triton.jit(do_not_specialize=["key0", "key1"])
def _update_elements(
    values,
    grads,
    first_moment,
    second_moment,
    grad_scale,
    numel,
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
    BF16: tl.constexpr,
    TILE: tl.constexpr,
):
    element = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = element < numel
    value, exp_avg, exp_avg_sq, _ = _adam(
        tl.load(values + element, mask=inside, other=0.0),
        tl.load(grads + element, mask=inside, other=0.0),
        _load_moment(first_moment + element, inside, BF16),
        _load_moment(second_moment + element, inside, BF16),
        grad_scale,
        decay,
        beta1,
        rest1,
        beta2,
        rest2,
        correction,
        epsilon,
        step_size,
    )
    tl.store(values + element, value, mask=inside)
    words = _random_words(element, key0, key1)
    _store_moment(first_moment + element, exp_avg, words & 0xFFFF, inside, BF16)
    _store_moment(second_moment + element, exp_avg_sq, words >> 16, inside, BF16)


def update_range(
    update: Update,
    values: Tensor,
    grads: Tensor,
    moments: tuple[Moment, Moment],
    grad_scale: Tensor | None,
    key: tuple[int, str, int],
) -> None:
    """Update a range of a parameter, in place.

    Args:
        values, grads: float32 (n,). moments: the first and the second one, (n,).
        grad_scale: float32 (), what gradients are divided by first; None: by nothing.
        key: the rounding's seed, the parameter's name, and where in it the range begins.
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
    options: dict[str, Any] = {"num_warps": _WARPS, "enable_fp_fusion": False}
    first_moment, second_moment = moments
    with torch.cuda.device_of(values):
        if isinstance(first_moment, Blocks) and isinstance(second_moment, Blocks):
            state = (
                first_moment.codes,
                first_moment.scales,
                second_moment.codes,
                second_moment.scales,
            )
            lead = first_moment.start % BLOCK
            grid = (triton.cdiv(len(first_moment.scales), _ROWS),)
            _update_blocks[grid](
                values,
                grads,
                *state,
                grad_scale,
                len(values),
                lead,
                *numbers,
                ROWS=_ROWS,
                **options,
            )
            return
        seed, name, place = key
        bf16 = first_moment.dtype == torch.bfloat16
        assert isinstance(first_moment, Tensor) and isinstance(second_moment, Tensor)
        if bf16:
            first_moment = first_moment.view(torch.int16)
            second_moment = second_moment.view(torch.int16)
        begin = 0
        while begin < len(values):
            # A key serves 2^32 positions.
            end = min(len(values), begin + 2**32 - (place + begin) % 2**32)
            part = slice(begin, end)
            _update_elements[(triton.cdiv(end - begin, _TILE),)](
                values[part],
                grads[part],
                first_moment[part],
                second_moment[part],
                grad_scale,
                end - begin,
                *draw_keys(seed, update.number, name, place + begin),
                *numbers,
                BF16=bf16,
                TILE=_TILE,
                **options,
            )
            begin = end

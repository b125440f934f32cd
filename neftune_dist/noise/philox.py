"""Philox4x32-10, a counter-based generator: the same bits on any device and in any torch version.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011),
section 3.3; checked in the tests against the vectors of its reference implementation (Random123).
A word is a value in [0, 2^32) held in an int64, so that torch's integer ops serve on every device.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_ROUNDS = 10


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words for every counter.

    Args:
        counter: four int64 tensors of words, of shapes that broadcast together.
        key: two 32-bit words.

    Returns:
        Four int64 tensors of words, of the broadcast shape.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 multiplication wraps modulo 2^64: all 64 product bits are there, and the mask
        # takes back the sign that the arithmetic shift spreads over the high word.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _WORD) ^ c1 ^ k0,
            product1 & _WORD,
            ((product0 >> 32) & _WORD) ^ c3 ^ k1,
            product0 & _WORD,
        )
        k0, k1 = (k0 + KEY_STEPS[0]) & _WORD, (k1 + KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def philox4x32_(memory: Sequence[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """`philox4x32` in place, several times as fast.

    Args:
        memory: six tensors of one shape: the counter's four words, and two to work in. Their
            content is lost, and the words returned are four of them.
    """
    c0, c1, c2, c3, product0, product1 = memory
    k0, k1 = key
    for _ in range(_ROUNDS):
        torch.mul(c0, MULTIPLIERS[0], out=product0)
        torch.mul(c2, MULTIPLIERS[1], out=product1)
        torch.bitwise_right_shift(product1, 32, out=c0)
        c0.bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_WORD)
        torch.bitwise_right_shift(product0, 32, out=c2)
        c2.bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_WORD)
        # The low words keep the bits above them: the next round masks its words.
        c1, product1, c3, product0 = product1, c1, product0, c3
        k0, k1 = (k0 + KEY_STEPS[0]) & _WORD, (k1 + KEY_STEPS[1]) & _WORD
    return [c0, c1.bitwise_and_(_WORD), c2, c3.bitwise_and_(_WORD)]


def to_draws(words: Sequence[Tensor], distribution: str, out: Tensor | None = None) -> Tensor:
    """Turn the counters' words into draws of mean 0.

    uniform: in (-1, 1), `(2 (word >> 8) + 1) / 2^24 - 1`: an odd multiple of 2^-24, so it is exact
    in float32 and no rounding mode of any device can change it.
    symmetric: 1 or -1, by the word's highest bit.
    gaussian: of variance 1/3, from pairs of words by the Box-Muller transform in float64, rounded
    once to float32: devices' logarithms differ in the last bit of float64, which changes about one
    draw in 2^28.

    Args:
        words: four tensors of one shape (...); their content is lost.
        distribution: uniform, symmetric or gaussian.
        out: float32 (..., 4), for the result.

    Returns:
        float32 (..., 4).
    """
    draws = out
    if draws is None:
        draws = torch.empty((*words[0].shape, 4), dtype=torch.float32, device=words[0].device)
    if distribution == "gaussian":
        units = [(word.to(torch.float64) + 0.5) * 2.0**-32 for word in words]
        for i in (0, 2):
            radius, angle = torch.sqrt(torch.log(units[i]) * (-2 / 3)), units[i + 1] * math.tau
            draws[..., i], draws[..., i + 1] = radius * torch.cos(angle), radius * torch.sin(angle)
        return draws
    for i, word in enumerate(words):
        draws[..., i] = word.bitwise_right_shift_(8 if distribution == "uniform" else 31)
    if distribution == "symmetric":
        return draws.mul_(-2).add_(1)
    return draws.mul_(2.0**-23).add_(2.0**-24 - 1)

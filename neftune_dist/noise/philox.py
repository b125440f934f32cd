"""Philox4x32-10, a counter-based generator: the same bits on any device and in any torch version.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011),
section 3.3; checked in the tests against the vectors of its reference implementation (Random123).
A word is a value in [0, 2^32) held in an int64, so that torch's integer ops serve on every device.
"""

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_ROUNDS = 10


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words for each counter.

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
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _WORD) ^ c1 ^ k0,
            product1 & _WORD,
            ((product0 >> 32) & _WORD) ^ c3 ^ k1,
            product0 & _WORD,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def uniform(words: Tensor) -> Tensor:
    """Words to float32 in (-1, 1), symmetric about 0: `(2 (word >> 8) + 1) / 2^24 - 1`.

    Every value is an odd multiple of 2^-24 below 1, so it is exact in float32 and no rounding mode
    of any device can change it.
    """
    return (((words >> 8) << 1) + (1 - (1 << 24))).to(torch.float32) * 2.0**-24

"""Stochastic rounding to bfloat16, by random bits that belong to the element.

Rounding to the nearest would freeze Adam's second moment: it changes by a thousandth a step, where
bfloat16 resolves a 256th. Rounded up or down with odds by the distance, it is right on average.

The bits are a hash of a counter: a pure function of (seed, update, tensor, position in the whole
tensor), so they are the same under any sharding and after any resume, and torch's generators are
left alone. The noise's Philox would do, at several times the cost: rounding needs no more than
that 16 bits be even and unrelated to the value.
"""

from __future__ import annotations

from functools import cache
from hashlib import blake2b

import torch
from torch import Tensor

# A 32-bit mixer of three rounds, triple32 of Chris Wellons' hash-prospector (public domain): each
# is a shift to the right and an odd multiplier.
ROUNDS = ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB))
LAST_SHIFT = 14
KEY_POSITIONS = 1 << 32  # positions in a tensor that share keys


def _signed(word: int) -> int:
    return (word + 2**31) % 2**32 - 2**31


@cache
def _int32(word: int) -> Tensor:
    """A constant: torch would make another tensor of a Python number at every use."""
    return torch.tensor(_signed(word), dtype=torch.int32)


def draw_keys(seed: int, update: int, name: str, first: int) -> tuple[int, int]:
    """Two int32 keys for the words of the elements from `first` on.

    The first key contains the position and is added to an element's number, counted from `first`;
    the second is added between the rounds: two updates, or two tensors, share no stretch of words.
    """
    text = f"{seed}/{update}/{first // KEY_POSITIONS}/{name}"
    digest = blake2b(text.encode(), digest_size=8).digest()
    halves = [int.from_bytes(digest[i : i + 4], "little") for i in (0, 4)]
    return _signed(first + halves[0]), _signed(halves[1])


def draw_words(
    seed: int, update: int, name: str, first: int, counter: Tensor, out: Tensor, spare: Tensor
) -> Tensor:
    """Random 32-bit words for the elements `first`, `first + 1`, ... of a whole tensor.

    Args:
        seed, update, name: of the run, of the optimizer's count, of the parameter.
        first: position; the last one lies in the same `KEY_POSITIONS`.
        counter: int32 (n,): 0, 1, ... n - 1.
        out, spare: int32 (n,) to work in.

    Returns:
        `out`.
    """
    key0, key1 = draw_keys(seed, update, name, first)
    torch.add(counter, key0, out=out)
    for i, (shift, multiplier) in enumerate(ROUNDS):
        _fold_(out, shift, spare).mul_(_int32(multiplier))
        if i == 1:
            out.add_(key1)
    return _fold_(out, LAST_SHIFT, spare)


def _fold_(x: Tensor, shift: int, spare: Tensor) -> Tensor:
    """x ^= x >> shift, as if x were unsigned: the mask takes back the sign's copies."""
    torch.bitwise_right_shift(x, _int32(shift), out=spare)
    spare.bitwise_and_(_int32((1 << (32 - shift)) - 1))
    return x.bitwise_xor_(spare)


def round_into(out: Tensor, values: Tensor, words: Tensor, half: int, spare: Tensor) -> None:
    """Round float32 values to bfloat16: away from zero where 16 random bits plus the 16 bits to be
    dropped carry over. Values that bfloat16 holds exactly, infinities among them, do not change.

    Args:
        out: bfloat16 (n,).
        values: float32 (n,).
        words: int32 (n,), random.
        half: use the low (0) or the high (1) 16 bits of the words.
        spare: int32 (n,) to work in.
    """
    torch.bitwise_right_shift(words, _int32(16 * half), out=spare).bitwise_and_(_int32(0xFFFF))
    spare.add_(values.view(torch.int32)).bitwise_and_(_int32(0xFFFF0000))
    out.copy_(spare.view(torch.float32))

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


def _signed(word: int) -> int:
    return (word + 2**31) % 2**32 - 2**31


@cache
def _int32(word: int) -> Tensor:
    """A constant: torch would make a tensor of a Python number anew at every use."""
    return torch.tensor(_signed(word), dtype=torch.int32)


def draw_keys(seed: int, update: int, name: str, first: int) -> tuple[int, int]:
    """The keys, int32, of the words from a position on: the position is in the first of them.

    One is added to an element's number from there, one between the rounds: two updates, or two
    tensors, share no stretch of words.
    """
    text = f"{seed}/{update}/{first >> 32}/{name}"
    digest = blake2b(text.encode(), digest_size=8).digest()
    halves = [int.from_bytes(digest[i : i + 4], "little") for i in (0, 4)]
    return _signed(first + halves[0]), _signed(halves[1])


def draw_words(
    seed: int, update: int, name: str, first: int, counter: Tensor, out: Tensor, spare: Tensor
) -> Tensor:
    """A random 32-bit word for each of the elements `first`, `first + 1`, ... of a whole tensor.

    Args:
        first: position; the last one lies in the same 2^32 positions.
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
    """Values, float32 (n,), to bfloat16: away from zero where 16 random bits and the 16 that go
    make up a carry. What bfloat16 holds exactly, infinities among it, stays what it is.

    Args:
        words: int32 (n,).
        half: which of a word's halves to use, 0 or 1.
        spare: int32 (n,) to work in.
    """
    torch.bitwise_right_shift(words, _int32(16 * half), out=spare).bitwise_and_(_int32(0xFFFF))
    spare.add_(values.view(torch.int32)).bitwise_and_(_int32(0xFFFF0000))
    out.copy_(spare.view(torch.float32))

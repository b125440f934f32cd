"""Adam's moments in 8 bits an element: blocks of 256, each with a float32 scale.

After Dettmers et al., "8-bit optimizers via block-wise quantization" (arXiv 2110.02861), with two
differences:

- The exponent is one of two, not of ten: a code is the top bits of the scaled float, so encoding is
  a shift. On a CPU a search in a table of 256 costs forty times as much, and is no more accurate.
- The second moment is kept by its square root, which is what Adam divides by, and only zero becomes
  zero. Kept as it is, small values beside a large one become zero, and the update explodes.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import cache

import numpy as np
import torch
from torch import Tensor

BLOCK = 256  # elements of a block
# Scales stay between 2^LEAST_EXPONENT and 2^GREATEST_EXPONENT: the smallest code times the smallest
# scale has a square that float32 still holds at full precision, as has the greatest scale.
LEAST_EXPONENT, GREATEST_EXPONENT = -46, 63
_LEAST_SCALE, _GREATEST_SCALE = 2.0**LEAST_EXPONENT, 2.0**GREATEST_EXPONENT
# By whether the root is kept: mantissa bits of a code, and the code of 1.0. Either code has 4 bits
# of exponent; without a root the highest of its 8 bits is the sign.
CODE_FORMATS = {False: (3, 127), True: (4, 255)}
_ONE = 127 << 23  # the bits of 1.0


class QuantizedMoment:
    """A range of one of Adam's moments, a flat float32 tensor, in 8 bits an element.

    Blocks begin at multiples of 256 of the whole tensor, whichever range of it lies here. To read
    values and write them back changes neither code nor scale: a block's largest element has the
    code of 1 and the others err by far less than half a code's width.

    Args:
        start: of the range within the whole tensor.
        numel: elements of the range.
        root: keep the square root of values that are never negative; else 7 bits and a sign.
        device: of codes and scales.

    Attributes:
        codes: uint8 (num_blocks, 256).
        scales: float32 (num_blocks,).
        lead: elements of the first block that lie before the range.
    """

    dtype = torch.float32  # of the values read and written

    def __init__(self, start: int, numel: int, root: bool, device: torch.device) -> None:
        self.start, self.root, self._numel = start, root, numel
        self.lead = start % BLOCK
        rows = -(-(self.lead + numel) // BLOCK)
        self.codes = torch.zeros(rows, BLOCK, dtype=torch.uint8, device=device)
        self.scales = torch.full((rows,), _LEAST_SCALE, device=device)
        self._mantissa_bits, self._top = CODE_FORMATS[root]
        # Blocks that `write` has filled in part, by number: their values, how many are missing.
        self._begun: dict[int, tuple[Tensor, int]] = {}

    def numel(self) -> int:
        """Elements of the range."""
        return self._numel

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def __getitem__(self, part: slice) -> Tensor:
        """The values of a part of the range, as a new float32 tensor."""
        first, stop, _ = part.indices(self._numel)
        return self.load(first, stop, torch.empty(stop - first + 2 * BLOCK, device=self.device))

    def copy_(self, other: Tensor | QuantizedMoment, non_blocking: bool = False) -> None:
        """Take over another moment of the same range, or quantize a tensor (numel,)."""
        if isinstance(other, Tensor):
            self.write(0, other)
        else:
            self.codes.copy_(other.codes, non_blocking=non_blocking)
            self.scales.copy_(other.scales, non_blocking=non_blocking)

    def empty_copy(self, empty_like: Callable[[Tensor], Tensor]) -> QuantizedMoment:
        """A moment of the same range, without content, in memory allocated by `empty_like`."""
        other = copy(self)
        other.codes, other.scales = empty_like(self.codes), empty_like(self.scales)
        other._begun = {}
        return other

    def load(self, first: int, stop: int, memory: Tensor) -> Tensor:
        """Read the elements first <= i < stop.

        Args:
            memory: float32, of whole blocks' size at least. It receives all blocks that the range
                touches, with zeros for the elements that do not lie here.

        Returns:
            float32 (stop - first,): a view of `memory`.
        """
        one, end = self._rows(first, stop)
        whole = memory[: (end - one) * BLOCK]
        codes = self.codes[one:end].view(-1).to(torch.int32)
        torch.index_select(_values(self.root, self.device), 0, codes, out=whole)
        whole.view(-1, BLOCK).mul_(self.scales[one:end, None])
        if self.root:
            whole.square_()
        begin = self.lead + first - one * BLOCK
        return whole[begin : begin + stop - first]

    def store(self, first: int, stop: int, memory: Tensor, spare: Tensor) -> None:
        """Write the elements first <= i < stop: all elements of their blocks that lie here.

        Args:
            memory: as `load` left it, with other values; if `root`, with their square roots. Its
                content is lost.
            spare: int32 of the same size, to work in.
        """
        one, end = self._rows(first, stop)
        values = memory[: (end - one) * BLOCK].view(-1, BLOCK)
        extra = spare[: (end - one) * BLOCK].view(-1, BLOCK)
        bits = values.view(torch.int32)
        if self.root:
            torch.gt(values, 0, out=extra)  # the least code of values that are not zero: 1
        else:
            torch.bitwise_right_shift(bits, 24, out=extra).bitwise_and_(128)
            values.abs_()
        scales = self.scales[one:end]
        torch.amax(values, 1, out=scales)
        scales.nan_to_num_(_GREATEST_SCALE).clamp_(_LEAST_SCALE, _GREATEST_SCALE)
        values.div_(scales[:, None])
        # The bits as a number: half of the last place that stays, less the bits of code 0.
        shift = 23 - self._mantissa_bits
        bits.add_((1 << (shift - 1)) + (self._top << shift) - _ONE)
        bits.bitwise_right_shift_(shift).clamp_(0, self._top)
        if self.root:
            torch.maximum(bits, extra, out=bits)
        else:
            bits.bitwise_or_(extra)
        self.codes[one:end].copy_(bits)

    def write(self, first: int, values: Tensor) -> None:
        """Write any part, in any order: a block is encoded when its last element arrives.

        Args:
            values: float32 (n,) on any device, for the elements from `first`.
        """
        stop = first + len(values)
        while first < stop:
            row, within = divmod(self.lead + first, BLOCK)
            begin, end = self._row(row)
            if first == begin and stop >= end:
                last = self._rows(first, stop)[1] - 1
                if stop < self._row(last)[1]:
                    last -= 1
                end = self._row(last)[1]
                self._encode(row, within, values[: end - first])
            else:
                end = min(end, stop)
                self._write_part(row, within, values[: end - first])
            first, values = end, values[end - first :]

    def _write_part(self, row: int, within: int, values: Tensor) -> None:
        begin, end = self._row(row)
        so_far, missing = self._begun.pop(row, (torch.zeros(BLOCK), end - begin))
        so_far[within : within + len(values)] = values
        missing -= len(values)
        if missing:
            self._begun[row] = so_far, missing
        else:
            within = self.lead + begin - row * BLOCK
            self._encode(row, within, so_far[within : within + end - begin])

    def _encode(self, row: int, within: int, values: Tensor) -> None:
        """Encode all elements that lie here of one or several blocks, the first of which is
        `row`."""
        first = row * BLOCK + within - self.lead
        memory = torch.zeros(len(values) + 2 * BLOCK, device=self.device)
        memory[within : within + len(values)] = values
        if self.root:
            square_root(memory, memory)
        self.store(first, first + len(values), memory, torch.empty_like(memory, dtype=torch.int32))

    def _row(self, row: int) -> tuple[int, int]:
        """The range of elements that lie in a block: the first, and the one after the last."""
        return max(0, row * BLOCK - self.lead), min(self._numel, (row + 1) * BLOCK - self.lead)

    def _rows(self, first: int, stop: int) -> tuple[int, int]:
        return (self.lead + first) // BLOCK, -(-(self.lead + stop) // BLOCK)

    @property
    def device(self) -> torch.device:
        """The device of codes and scales."""
        return self.codes.device


def square_root(values: Tensor, out: Tensor) -> Tensor:
    """The square roots of float32 values, rounded correctly: the same bits on every device.

    Torch's on the CPU may be MKL's, which on some processors err by a unit in the last place;
    numpy's are the processor's own.
    """
    if values.device.type != "cpu":
        return torch.sqrt(values, out=out)
    np.sqrt(values.numpy(), out=out.numpy())
    return out


@cache
def _values(root: bool, device: torch.device) -> Tensor:
    """The values of the 256 codes as shares of the scale, float32 (256,): from 0 up to 1; signed
    codes continue from 0 down to -1."""
    codes = torch.arange(256, dtype=torch.int32)
    bits, top = CODE_FORMATS[root]
    size = codes if root else codes & 127
    values = (((size - top) << (23 - bits)) + _ONE).view(torch.float32)
    values = torch.where(size > 0, values, 0.0)
    return (values if root else torch.where(codes < 128, values, -values)).to(device)

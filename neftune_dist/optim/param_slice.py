"""Ranges of parameters that an optimizer updates, and the moments of a range.

An optimizer's tensor is a shard of one parameter or, under ZeRO, a buffer with ranges of many. A
`ParamSlice` says which range of which parameter lies where.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor
from torch.distributed.tensor import DTensor

from neftune_dist.optim.quantized_state import QuantizedMoment

STATE_NAMES = ("exp_avg", "exp_avg_sq")
# One of Adam's moments of a range, 1-D: a float32 or bfloat16 tensor, or 8-bit blocks.
Moment: TypeAlias = Tensor | QuantizedMoment


@dataclass(frozen=True)
class ParamSlice:
    """A range of one flattened parameter, held in one of the optimizer's tensors.

    Attributes:
        tensor: the optimizer's tensor that holds the range.
        part: where the range lies in that tensor, flattened; of a DTensor, in its local shard.
        name: the parameter's name.
        start: of the range within the whole parameter.
        numel: elements of the whole parameter.
    """

    tensor: Tensor
    part: slice
    name: str
    start: int
    numel: int

    @property
    def size(self) -> int:
        """Elements of the slice."""
        return int(self.part.stop - self.part.start)

    def split(self, multiple: int) -> Iterator[tuple[int, int]]:
        """Ranges (first, stop) within the slice that meet at multiples of `multiple` in the whole
        parameter."""
        first = 0
        while first < self.size:
            stop = min(self.size, first + multiple - (self.start + first) % multiple)
            yield first, stop
            first = stop


def local(tensor: Tensor) -> Tensor:
    """The rank's elements of a tensor or DTensor: a flat view without autograd history."""
    mine = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return mine.detach().view(-1)

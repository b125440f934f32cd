"""AdamW whose moments are kept in bfloat16 or in 8 bits, and computed in float32.

The optimizer's tensors are shards, or under ZeRO many parameters' shards behind each other; the
rounding, though, belongs to an element of a whole parameter. So it works on pieces, which say what
lies where, and on no more of one at a time than a cache holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from neftune_dist.optim.blocks import BLOCK, Blocks
from neftune_dist.optim.rounding import draw_words, round_into

STATE_NAMES = ("exp_avg", "exp_avg_sq")
# Of whole tensors; smaller ones (norms, biases) keep float32 where others have 8 bits.
MIN_NUMEL_8BIT = 4096
# Elements at a time: on the CPU for each thread; on a GPU to bound the memory to work in.
_CPU_CHUNK, _GPU_CHUNK = 1 << 17, 1 << 23

# A moment of a piece, 1-D: float32 or bfloat16, or read as float32.
Moment: TypeAlias = Tensor | Blocks


@dataclass(frozen=True)
class Piece:
    """Part of one of an optimizer's tensors: a range of one flattened parameter.

    tensor: the optimizer's, a DTensor's shard counting as flat. part: of it. name: the
    parameter's. start: of the range within the whole parameter, which has numel elements.
    """

    tensor: Tensor
    part: slice
    name: str
    start: int
    numel: int


@dataclass(frozen=True)
class _Update:
    """The numbers of one update of one of the tensors, the `number`-th since the run began."""

    number: int
    rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float


def local(tensor: Tensor) -> Tensor:
    """This rank's elements, flat: a view."""
    mine = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return mine.detach().view(-1)


class ReducedAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with moments of reduced precision.

    The update is computed in float32, from the moments before they are rounded. bf16 moments are
    rounded stochastically (`rounding`), 8-bit ones to the nearest code (`blocks`).

    Args:
        groups: as torch's optimizers take them.
        states: bf16 | 8bit.
        seed: of the rounding.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        states: str,
        seed: int,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._states, self._seed = states, seed

    def hold(self, tensors: Iterable[Tensor], pieces: Sequence[Piece]) -> None:
        """Zero moments for the pieces, and a count of updates for each of the tensors."""
        for tensor in tensors:
            self.state[tensor] = {"step": torch.zeros(()), "pieces": []}
        for piece in pieces:
            moments = {kind: self._zeros(piece, kind) for kind in STATE_NAMES}
            self.state[piece.tensor]["pieces"].append((piece, moments))
        sizes = [piece.part.stop - piece.part.start for piece in pieces]
        device = pieces[0].tensor.device if pieces else torch.device("cpu")
        self._chunk = _GPU_CHUNK if device.type == "cuda" else _CPU_CHUNK * torch.get_num_threads()
        # Made once: memory that is asked for and given back for every chunk costs more than Adam.
        size = min(self._chunk, max(sizes, default=0)) + 2 * BLOCK
        self._memory = torch.empty(4, size, device=device)
        self._counter = torch.arange(size, dtype=torch.int32, device=device)

    def _zeros(self, piece: Piece, kind: str) -> Moment:
        size, device = piece.part.stop - piece.part.start, piece.tensor.device
        if self._states == "8bit" and piece.numel >= MIN_NUMEL_8BIT:
            return Blocks(piece.start, size, kind == "exp_avg_sq", device)
        dtype = torch.bfloat16 if self._states == "bf16" else torch.float32
        return torch.zeros(size, dtype=dtype, device=device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update; none where `found_inf`, which `skip_update_where` sets, is not zero. The host
        waits for that value: the rounding's key holds the number of updates."""
        unwanted = getattr(self, "found_inf", None)
        if unwanted is not None and bool(unwanted):
            return
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    self._update(tensor, group)

    def _update(self, tensor: Tensor, group: dict[str, Any]) -> None:
        state = self.state[tensor]
        state["step"] += 1
        number, (beta1, beta2) = int(state["step"]), group["betas"]
        update = _Update(number, group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
        values, grads = local(tensor), local(tensor.grad)  # type: ignore[arg-type]
        for piece, moments in state["pieces"]:
            for first, stop in self._chunks(piece):
                part = slice(piece.part.start + first, piece.part.start + stop)
                self._update_chunk(update, piece, moments, first, values[part], grads[part])

    def _chunks(self, piece: Piece) -> Iterator[tuple[int, int]]:
        """Ranges of a piece; they meet at multiples of the chunk size of the whole parameter, so
        that each holds whole blocks."""
        first, size = 0, piece.part.stop - piece.part.start
        while first < size:
            stop = min(size, first + self._chunk - (piece.start + first) % self._chunk)
            yield first, stop
            first = stop

    def _update_chunk(
        self,
        update: _Update,
        piece: Piece,
        moments: dict[str, Moment],
        first: int,
        values: Tensor,
        grad: Tensor,
    ) -> None:
        """Update a piece's elements from `first` on: their values (n,), by their gradient."""
        n, memory = len(values), self._memory
        stop = first + n
        exp_avg, exp_avg_sq = (
            _load(moments[kind], first, stop, memory[i]) for i, kind in enumerate(STATE_NAMES)
        )
        if update.weight_decay:
            values.mul_(1 - update.rate * update.weight_decay)
        exp_avg.lerp_(grad, 1 - update.beta1)
        exp_avg_sq.mul_(update.beta2).addcmul_(grad, grad, value=1 - update.beta2)
        scale = torch.sqrt(exp_avg_sq, out=memory[2, :n])
        scale.mul_((1 - update.beta2**update.number) ** -0.5).add_(update.epsilon)
        values.addcdiv_(exp_avg, scale, value=-update.rate / (1 - update.beta1**update.number))
        words, spare = memory[2].view(torch.int32), memory[3].view(torch.int32)
        if self._states == "bf16":
            place, counter = piece.start + first, self._counter[:n]
            draw_words(self._seed, update.number, piece.name, place, counter, words[:n], spare[:n])
        for i, (kind, updated) in enumerate(zip(STATE_NAMES, (exp_avg, exp_avg_sq), strict=True)):
            moment = moments[kind]
            if isinstance(moment, Blocks):
                moment.store(first, stop, memory[i], spare)
            elif self._states == "bf16":
                round_into(moment[first:stop], updated, words[:n], i, spare[:n])
            else:
                moment[first:stop] = updated


def _load(moment: Moment, first: int, stop: int, memory: Tensor) -> Tensor:
    if isinstance(moment, Blocks):
        return moment.load(first, stop, memory)
    return memory[: stop - first].copy_(moment[first:stop])

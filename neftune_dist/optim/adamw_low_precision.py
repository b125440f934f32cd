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

from neftune_dist.optim.quantized_state import BLOCK, Blocks, square_root
from neftune_dist.optim.rounding import draw_words, round_into

STATE_NAMES = ("exp_avg", "exp_avg_sq")
# Of whole tensors; smaller ones (norms, biases) keep float32 where others have 8 bits.
MIN_NUMEL_8BIT = 4096
_CHUNK = 1 << 18  # elements at a time, for each thread

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
class Update:
    """The numbers of one update of one of the tensors, the `number`-th since the run began. Each is
    computed in float64 and rounded once, to float32, where it meets a tensor."""

    number: int
    rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float

    @property
    def decay(self) -> float:
        """Factor of the parameter before the update."""
        return 1 - self.rate * self.weight_decay

    @property
    def correction(self) -> float:
        """Factor of the second moment's root: it began at 0."""
        return float((1 - self.beta2**self.number) ** -0.5)

    @property
    def step_size(self) -> float:
        """Factor of what is added to the parameter; the first moment, too, began at 0."""
        return -self.rate / (1 - self.beta1**self.number)


def local(tensor: Tensor) -> Tensor:
    """This rank's elements, flat: a view."""
    mine = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return mine.detach().view(-1)


class ReducedAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with moments of reduced precision.

    The update is computed in float32, from the moments before they are rounded. bf16 moments are
    rounded stochastically (`rounding`), 8-bit ones to the nearest code (`blocks`). On a GPU one
    kernel does all of it (`kernel`); what is written here is the reference, and the CPU's.

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
        self.fused = bool(pieces) and pieces[0].tensor.device.type == "cuda"
        if self.fused:
            return
        sizes = [piece.part.stop - piece.part.start for piece in pieces]
        # A power of 2: no chunk lies on both sides of position 2^32, where the words' key changes.
        self._chunk = _CHUNK << (torch.get_num_threads() - 1).bit_length()
        # Made once: memory that is asked for and given back for every chunk costs more than Adam.
        size = min(self._chunk, max(sizes, default=0)) + 2 * BLOCK
        self._memory = torch.empty(4, size)
        self._counter = torch.arange(size, dtype=torch.int32)

    def _zeros(self, piece: Piece, kind: str) -> Moment:
        size, device = piece.part.stop - piece.part.start, piece.tensor.device
        if self._states == "8bit" and piece.numel >= MIN_NUMEL_8BIT:
            return Blocks(piece.start, size, kind == "exp_avg_sq", device)
        dtype = torch.bfloat16 if self._states == "bf16" else torch.float32
        return torch.zeros(size, dtype=dtype, device=device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update; none where `found_inf`, which `skip_update_where` sets, is not zero. The host
        waits for that value: the rounding's key holds the number of updates. Gradients are divided
        by `grad_scale` first, where `divide_gradients` has set it."""
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
        update = Update(number, group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
        values, grads = local(tensor), local(tensor.grad)  # type: ignore[arg-type]
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        if self.fused:
            # Imported here: only machines with a GPU have Triton.
            from neftune_dist.optim.kernel import update_range

            for piece, moments in state["pieces"]:
                update_range(
                    update,
                    values[piece.part],
                    grads[piece.part],
                    (moments[STATE_NAMES[0]], moments[STATE_NAMES[1]]),
                    grad_scale,
                    (self._seed, piece.name, piece.start),
                )
            return
        if grad_scale is not None:
            grads.div_(grad_scale)
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
        update: Update,
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
        # One rounding an operation: what torch fuses (lerp, addcmul) it rounds by the processor.
        spare = memory[2, :n]
        exp_avg.mul_(update.beta1).add_(torch.mul(grad, 1 - update.beta1, out=spare))
        torch.mul(grad, grad, out=spare).mul_(1 - update.beta2)
        exp_avg_sq.mul_(update.beta2).add_(spare)
        # Blocks keep the root: then it takes the second moment's place.
        in_blocks = isinstance(moments[STATE_NAMES[1]], Blocks)
        root = square_root(exp_avg_sq, exp_avg_sq if in_blocks else spare)
        torch.mul(root, update.correction, out=spare).add_(update.epsilon)
        torch.div(exp_avg, spare, out=spare).mul_(update.step_size)
        if update.weight_decay:
            values.mul_(update.decay)
        values.add_(spare)
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

"""AdamW whose moments are kept in bfloat16 or in 8 bits, and computed in float32.

The optimizer's tensors are shards, or under ZeRO many parameters' shards one after another; the
rounding, though, belongs to an element of a whole parameter. So it works on parameter slices, which
say what lies where, and on no more of one at a time than a cache holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neftune_dist.optim.param_slice import STATE_NAMES, Moment, ParamSlice, local
from neftune_dist.optim.quantized_state import BLOCK, QuantizedMoment, square_root
from neftune_dist.optim.rounding import draw_words, round_into

# Elements of a whole tensor from which 8-bit moments are used; smaller tensors (norms, biases) keep
# float32.
MIN_NUMEL_8BIT = 4096
_CHUNK = 1 << 18  # elements at a time, for each thread


@dataclass(frozen=True)
class Update:
    """The numbers of one update of one tensor. They are computed in float64 and rounded once, to
    float32, where they meet a tensor.

    Attributes:
        number: counts updates since the run began; the first is 1.
    """

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
        """Factor of the second moment's root, which corrects its start at 0."""
        return float((1 - self.beta2**self.number) ** -0.5)

    @property
    def step_size(self) -> float:
        """Factor of the change of the parameter; it corrects the first moment's start at 0."""
        return -self.rate / (1 - self.beta1**self.number)


class LowPrecisionAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with moments of reduced precision.

    The update is computed in float32, from the moments before they are rounded. bf16 moments are
    rounded stochastically (`rounding`), 8-bit ones to the nearest code (`quantized_state`). On a
    GPU one kernel does all of it (`kernel`); `_update_chunk` is the reference, and the CPU's.

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

    def initialize(self, tensors: Iterable[Tensor], slices: Sequence[ParamSlice]) -> None:
        """Make zero moments for the slices, and a count of updates for each of the tensors."""
        for tensor in tensors:
            self.state[tensor] = {"step": torch.zeros(()), "slices": []}
        for param_slice in slices:
            moments = {kind: self._zeros(param_slice, kind) for kind in STATE_NAMES}
            self.state[param_slice.tensor]["slices"].append((param_slice, moments))
        self.fused = bool(slices) and slices[0].tensor.device.type == "cuda"
        if self.fused:
            return
        # A power of 2: no chunk lies on both sides of position 2^32, where the words' key changes.
        self._chunk = _CHUNK << (torch.get_num_threads() - 1).bit_length()
        # Allocated once: to allocate and free it for every chunk costs more than Adam.
        longest = max((param_slice.size for param_slice in slices), default=0)
        size = min(self._chunk, longest) + 2 * BLOCK
        self._memory = torch.empty(4, size)
        self._counter = torch.arange(size, dtype=torch.int32)

    def _zeros(self, param_slice: ParamSlice, kind: str) -> Moment:
        size, device = param_slice.size, param_slice.tensor.device
        if self._states == "8bit" and param_slice.numel >= MIN_NUMEL_8BIT:
            return QuantizedMoment(param_slice.start, size, kind == "exp_avg_sq", device)
        dtype = torch.bfloat16 if self._states == "bf16" else torch.float32
        return torch.zeros(size, dtype=dtype, device=device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make one update; none where `found_inf` is not zero, with gradients divided by
        `grad_scale` (both set by `prepare_update`). The host waits for `found_inf`: the rounding's
        key holds the number of updates."""
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
            from neftune_dist.optim.kernel import update_slice

            for param_slice, moments in state["slices"]:
                part, pair = param_slice.part, tuple(moments[kind] for kind in STATE_NAMES)
                update_slice(
                    update, param_slice, values[part], grads[part], pair, grad_scale, self._seed
                )
            return
        if grad_scale is not None:
            grads.div_(grad_scale)
        for param_slice, moments in state["slices"]:
            # Chunks meet at multiples of their size in the whole parameter: blocks stay whole.
            for first, stop in param_slice.split(self._chunk):
                part = slice(param_slice.part.start + first, param_slice.part.start + stop)
                self._update_chunk(update, param_slice, moments, first, values[part], grads[part])

    def _update_chunk(
        self,
        update: Update,
        param_slice: ParamSlice,
        moments: dict[str, Moment],
        first: int,
        values: Tensor,
        grad: Tensor,
    ) -> None:
        """Update a slice's elements from `first` on: their values (n,), by their gradient (n,)."""
        n, memory = len(values), self._memory
        stop = first + n
        exp_avg, exp_avg_sq = (
            _load(moments[kind], first, stop, memory[i]) for i, kind in enumerate(STATE_NAMES)
        )
        # One rounding an operation: torch rounds fused ones (lerp, addcmul) by the processor.
        spare = memory[2, :n]
        exp_avg.mul_(update.beta1).add_(torch.mul(grad, 1 - update.beta1, out=spare))
        torch.mul(grad, grad, out=spare).mul_(1 - update.beta2)
        exp_avg_sq.mul_(update.beta2).add_(spare)
        # A quantized moment keeps the root, which then takes the second moment's place.
        quantized = isinstance(moments[STATE_NAMES[1]], QuantizedMoment)
        root = square_root(exp_avg_sq, exp_avg_sq if quantized else spare)
        torch.mul(root, update.correction, out=spare).add_(update.epsilon)
        torch.div(exp_avg, spare, out=spare).mul_(update.step_size)
        if update.weight_decay:
            values.mul_(update.decay)
        values.add_(spare)
        words, spare = memory[2].view(torch.int32), memory[3].view(torch.int32)
        if self._states == "bf16":
            position, counter = param_slice.start + first, self._counter[:n]
            key = (self._seed, update.number, param_slice.name, position)
            draw_words(*key, counter, words[:n], spare[:n])
        for i, (kind, updated) in enumerate(zip(STATE_NAMES, (exp_avg, exp_avg_sq), strict=True)):
            moment = moments[kind]
            if isinstance(moment, QuantizedMoment):
                moment.store(first, stop, memory[i], spare)
            elif self._states == "bf16":
                round_into(moment[first:stop], updated, words[:n], i, spare[:n])
            else:
                moment[first:stop] = updated


def _load(moment: Moment, first: int, stop: int, memory: Tensor) -> Tensor:
    if isinstance(moment, QuantizedMoment):
        return moment.load(first, stop, memory)
    return memory[: stop - first].copy_(moment[first:stop])

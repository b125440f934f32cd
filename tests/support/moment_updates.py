"""Updates of `LowPrecisionAdamW` on numbers that could go wrong, by its kernel or the reference.

Whoever compares two of them compares every bit that an update leaves behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neftune_dist.config import OptimConfig
from neftune_dist.optim.adamw import MakeOptimizer, initialize_state, moments
from neftune_dist.optim.param_slice import ParamSlice
from neftune_dist.optim.quantized_state import QuantizedMoment

NUM_UPDATES = 4


@dataclass(frozen=True)
class Case:
    """One slice of a parameter of `numel` elements: `size` of them from `start` on, which lie in
    the optimizer's tensor from `offset` on."""

    numel: int
    start: int
    size: int
    offset: int = 0
    weight_decay: float = 0.1
    grad_scale: float | None = None


CASES = {
    "whole": Case(6144, 0, 6144),
    "whole, no decay": Case(6144, 0, 6144, weight_decay=0.0),
    "a tail": Case(5000, 0, 5000, grad_scale=3.0),
    "an odd start": Case(5000, 777, 3001),
    "an odd place": Case(5000, 256, 2048, offset=13),
    "all odd": Case(5000, 1023, 2, offset=3),
    "one element": Case(5000, 4999, 1),
    "a start within a block": Case(8192, 16, 4096, offset=32, grad_scale=1.0),
    "small": Case(100, 30, 63, offset=1, grad_scale=0.7),
    "past 2^31": Case(1 << 34, (1 << 31) - 300, 1000),
    "past 2^32": Case(1 << 34, (1 << 32) - 300, 1000),
}


def gradients(size: int, update: int) -> Tensor:
    """float32 (size,): of every size, with zeros of both signs, and squares that are denormal,
    zero, and infinite."""
    draw = torch.Generator().manual_seed(update)
    grad = torch.randn(size, generator=draw) * torch.exp(6 * torch.randn(size, generator=draw))
    for stride, value in ((7, 0.0), (11, -0.0), (29, 3e-20), (31, -1e-23), (37, 1e-40)):
        grad[update % stride :: stride] = value
    grad[size // 2 : size // 2 + 300] *= 1e-12
    grad[size // 3 : size // 3 + 20] = 0.0
    if size > 2000:
        grad[size - 700 : size - 600] = 1e25
    return grad


def make(states: str, case: Case, values: Tensor) -> tuple[Any, Tensor, ParamSlice]:
    """An optimizer, the tensor that it updates, which holds `values`, and the slice in it."""
    parameter = torch.nn.Parameter(values)
    part = slice(case.offset, case.offset + case.size)
    param_slice = ParamSlice(parameter, part, "w", case.start, case.numel)
    config = OptimConfig(learning_rate=1e-2, weight_decay=case.weight_decay, states=states)
    optimizer = MakeOptimizer(config, seed=3)([("w", parameter)], {"w": (case.numel, 1)})
    initialize_state(optimizer, [parameter], [param_slice])
    if case.grad_scale is not None:
        optimizer.grad_scale = torch.tensor(case.grad_scale, device=values.device)
    return optimizer, parameter, param_slice


def state(optimizer: Any, param_slice: ParamSlice) -> dict[str, Tensor]:
    """Moments as they are kept, by name; blocks as codes (blocks, 256) and scales (blocks,)."""
    found = {}
    for name, moment in moments(optimizer, param_slice).items():
        if isinstance(moment, QuantizedMoment):
            found |= {f"{name} codes": moment.codes, f"{name} scales": moment.scales}
        else:
            found[name] = moment
    return found


def run(states: str, case: Case, device: str = "cpu", fused: bool = False) -> dict[str, Tensor]:
    """What some updates leave behind, on the CPU, by name.

    Args:
        fused: as the kernel has it, on whatever device; on a GPU it always does.
    """
    draw = torch.Generator().manual_seed(99)
    values = torch.randn(case.offset + case.size + 5, generator=draw) * 0.02
    optimizer, parameter, param_slice = make(states, case, values.to(device))
    optimizer.fused |= fused
    for update in range(NUM_UPDATES):
        parameter.grad = torch.full_like(parameter, 1e3)
        parameter.grad[param_slice.part] = gradients(case.size, update).to(device)
        optimizer.step()
    left = {"parameter": parameter.detach(), **state(optimizer, param_slice)}
    return {name: tensor.cpu() for name, tensor in left.items()}


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """As integers: 0.0 is not -0.0."""
    assert one.keys() == other.keys()
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    for name in one:
        a, b = (
            updated[name].view(integers[updated[name].element_size()]) for updated in (one, other)
        )
        assert torch.equal(a, b), f"{name}: {int((a != b).sum())} of {a.numel()} differ"

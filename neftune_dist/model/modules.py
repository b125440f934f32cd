"""Parameters and buffers in the modules that hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def own_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return a module's parameters but not its children's, all names of tied ones."""
    return list(module.named_parameters(recurse=False, remove_duplicate=False))


def own_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return a module's buffers but not its children's."""
    return list(module.named_buffers(recurse=False, remove_duplicate=False))


def stacks_experts(module: nn.Module) -> bool:
    """Return whether a module holds the matrices of several experts, each kind in one parameter."""
    experts = getattr(module, "num_experts", None)
    return any(p.dim() >= 3 and p.shape[0] == experts for _, p in own_parameters(module))


def replace_parameters(model: nn.Module, make: Callable[[nn.Parameter], nn.Parameter]) -> None:
    """Put `make(parameter)` in the place of every parameter; tied ones stay one."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in own_parameters(module):
            if id(parameter) not in made:
                made[id(parameter)] = make(parameter)
            setattr(module, name, made[id(parameter)])


def replace_buffers(model: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    """Put `make(buffer)` in the place of every buffer."""
    for module in model.modules():
        for name, buffer in own_buffers(module):
            setattr(module, name, make(buffer))


@contextmanager
def forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward within the block."""
    usual = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if usual is None:
            del module.forward
        else:
            module.forward = usual

"""A check for engines that add up the gradients of ranks by their order, not by their names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neftune_dist.config import UserError
from neftune_dist.engine.base import count_gradients


class UsedParameters:
    """The parameters that get a gradient: the same ones in all micro-batches of all ranks.

    One that a rank lacks would shift the others, or end the process within gloo where the sizes of
    messages differ. Which they are is known before the backward that sends them: they are the
    leaves of the loss's graph. The ranks compare those of their first micro-batch; after that each
    compares its own with that one.
    """

    def __init__(self, device: torch.device, units: Mapping[str, nn.Module]) -> None:
        """
        Args:
            device: of the collective.
            units: modules by name, not sharded yet. FSDP2 gives a unit other tensors for its
                forward, which are those in the graph: so they are read at the forward's end.
        """
        self._device = device
        self._names: dict[int, str] = {}  # by the tensor's id
        self._first: set[str] | None = None
        self._hooks = [
            unit.register_forward_hook(partial(self._learn, name and f"{name}."))
            for name, unit in units.items()
            if dist.get_world_size() > 1
        ]

    def _learn(self, prefix: str, unit: nn.Module, _inputs: Any, _output: Any) -> None:
        for name, parameter in unit.named_parameters():
            self._names.setdefault(id(parameter), prefix + name)

    def check(self, loss: Tensor, names: Sequence[str]) -> None:
        """Compare those of this micro-batch, before its backward. Its first call is a collective.

        Args:
            loss: of the micro-batch.
            names: of the trained parameters.

        Raises:
            UserError: they are others than those of another rank, or of this rank's first
                micro-batch.
        """
        world_size = dist.get_world_size()
        if world_size == 1:
            return
        found = {self._names[id(leaf)] for leaf in _leaves(loss) if id(leaf) in self._names}
        if self._first is None:
            self._first = found
            for hook in self._hooks:
                hook.remove()
            counts = count_gradients([name in found for name in names], self._device)
            for name, number in zip(names, counts.tolist(), strict=True):
                if 0 < number < world_size:
                    _refuse(name, f"on {number:.0f} of {world_size} ranks", shared=True)
        if other := found ^ self._first:
            _refuse(min(other), "in some micro-batches alone", shared=False)


def _refuse(name: str, where: str, shared: bool) -> NoReturn:
    raise UserError(
        f"{name} gets a gradient {where}, and this engine adds gradients up in a fixed order: set "
        "engine.name=replicated, or engine.name=deepspeed engine.zero_stage=3. Nothing was saved "
        "of this step.",
        shared=shared,
    )


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """The tensors to which the backward of `loss` adds a gradient."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(leaf := getattr(node, "variable", None), Tensor):  # of AccumulateGrad
            yield leaf
        waiting += [following for following, _ in node.next_functions]

"""The engine contract, and the flat shards in which any engine's state is saved and loaded.

What a rank holds of a parameter, of its float32 master and of its Adam moments is one contiguous
range of the flattened tensor: under ZeRO-1/2/3 by construction, under FSDP2 because it shards
dimension 0. `FlatShard` names such a range, and is all that checkpoints and weight files need to
know of an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neftune_dist.config import UserError
from neftune_dist.data.loader import MicroBatch
from neftune_dist.model.modules import replace_parameters
from neftune_dist.optim.adamw import MakeOptimizer, moments, precision_of, prepare_update
from neftune_dist.optim.param_slice import Moment, ParamSlice, local
from neftune_dist.optim.quantized_state import QuantizedMoment

# The float32 master weights, beside the moments (`optim.param_slice.STATE_NAMES`).
MASTER = "master"
# A parameter that is not trained, in the dtype in which it computes. It is read and never saved.
FROZEN = "frozen"


@dataclass(frozen=True)
class FlatShard:
    """A rank's range of one flattened tensor.

    Attributes:
        kind: MASTER, FROZEN or a moment's name.
        name: the parameter's Hugging Face name.
        start: of the range within the whole tensor.
        tensor: 1-D view of the rank's memory, float32 unless FROZEN; a moment may be bfloat16, or
            8-bit blocks, which are read and written as float32.
        numel: elements of the whole tensor.
    """

    kind: str
    name: str
    start: int
    tensor: Moment
    numel: int

    @property
    def key(self) -> str:
        """The tensor's key in a checkpoint."""
        return f"{self.kind}/{self.name}"

    def empty_copy(self, empty_like: Callable[[Tensor], Tensor]) -> Moment:
        """Memory for a copy of `tensor`, allocated by `empty_like`, which works as torch's."""
        if isinstance(self.tensor, QuantizedMoment):
            return self.tensor.empty_copy(empty_like)
        return empty_like(self.tensor)


class Engine(Protocol):
    """What the loop, evaluation and checkpoints use of an engine."""

    device: torch.device  # of this rank's computation
    model: Any  # the Hugging Face model given to `setup`, its parameters sharded
    loss: str  # plain, chunked or liger: `model.loss`, with `auto` resolved by `setup`

    def setup(self, model: Any, make_optimizer: MakeOptimizer) -> None:
        """Shard a model that is on the meta device, and build the optimizer on the shards.

        The weights have no content yet: fill `flat_state()` and `frozen_state()`, then call
        `after_load()`.
        """

    def after_load(self, num_updates: int) -> None:
        """Bring compute copies and counts of updates in line with a flat state just filled."""

    def forward(self, batch: MicroBatch) -> Tensor:
        """This rank's sum of token losses (float32 scalar)."""

    def backward(self, loss: Tensor, last_micro_batch: bool) -> None:
        """Add the gradient of `loss`, this rank's share of the step's loss. Over all ranks and
        micro-batches of a step the gradients add up: no factor of either remains (law 3)."""

    def step(self, learning_rate: float) -> float:
        """Clip, update, zero; return the global L2 norm of the gradient before clipping.

        Where that norm is not finite (on all ranks or on none) no weight, no moment and no count
        of updates changes, and the gradient is dropped.
        """

    def flat_state(self) -> list[FlatShard]:
        """This rank's masters and moments. Within a replica, ranges of different ranks do not
        overlap and together cover every tensor; `is_saving_replica` says which replica is saved."""

    def frozen_state(self) -> list[FlatShard]:
        """This rank's ranges of the parameters that are not trained."""

    @property
    def is_saving_replica(self) -> bool:
        """Whether this rank's shards go into a checkpoint (one replica's do)."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Whole shape of each trained parameter, by its first Hugging Face name."""

    def train(self, mode: bool) -> None:
        """Training or evaluation mode."""

    def describe(self) -> list[str]:
        """Lines for the start of a run: the parallel layout and every dtype."""


def trained_and_frozen(
    model: Any,
) -> tuple[list[tuple[str, nn.Parameter]], list[tuple[str, nn.Parameter]]]:
    """A model's parameters by first name, in order."""
    named = list(model.named_parameters())
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    frozen = [(name, parameter) for name, parameter in named if not parameter.requires_grad]
    return trained, frozen


def make_trained_float32(model: Any) -> dict[str, tuple[int, ...]]:
    """Make the trained parameters of a model on the meta device float32 and contiguous, as their
    masters are.

    Returns:
        The whole shape of each trained parameter by first name.

    Raises:
        UserError: a trained parameter has no element.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in trained_and_frozen(model)[0]}
    if empty := [name for name, shape in shapes.items() if 0 in shape]:
        raise UserError(f"{type(model).__name__} is not trained here: {empty[0]} has no element.")

    def plain(parameter: nn.Parameter) -> nn.Parameter:
        is_plain = parameter.dtype == torch.float32 and parameter.is_contiguous()
        if is_plain or not parameter.requires_grad:
            return parameter
        return nn.Parameter(torch.empty(parameter.shape, dtype=torch.float32, device="meta"))

    replace_parameters(model, plain)
    return shapes


def check_shardable(model: Any, needs_all_gradients: bool) -> None:
    """Raise `UserError` where FSDP2 and DeepSpeed cannot shard the model.

    Args:
        needs_all_gradients: whether the engine reduces gradients in a fixed order, for which every
            rank must make a gradient for every parameter.
    """
    name = type(model).__name__
    if scalars := [place for place, parameter in model.named_parameters() if not parameter.dim()]:
        raise UserError(
            f"{name} has the scalar parameter {scalars[0]}, which is not sharded: set "
            "engine.name=replicated."
        )
    experts = [
        place
        for place, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and place.endswith("experts")
    ]
    if experts and needs_all_gradients:
        raise UserError(
            f"{name} has its experts in modules of their own ({experts[0]}), and a rank makes no "
            "gradient for those that got none of its tokens: set engine.name=replicated, or "
            "engine.name=deepspeed engine.zero_stage=3."
        )


def count_gradients(has_gradient: Sequence[bool], device: torch.device) -> Tensor:
    """How many ranks have made a gradient in this step, for each trained parameter. A collective,
    for which a GPU's host does not wait."""
    counts = torch.tensor([float(has) for has in has_gradient]).to(device)
    dist.all_reduce(counts)
    return counts


def state_shards(optimizer: torch.optim.Optimizer, slices: Sequence[ParamSlice]) -> list[FlatShard]:
    """The masters and moments of an optimizer's slices, for `Engine.flat_state`."""
    return [
        FlatShard(kind, held.name, held.start, tensor, held.numel)
        for held in slices
        for kind, tensor in {
            MASTER: local(held.tensor)[held.part],
            **moments(optimizer, held),
        }.items()
    ]


def clip_and_update(
    optimizer: torch.optim.Optimizer, learning_rate: float, norm: Tensor, max_grad_norm: float
) -> None:
    """`Engine.step` of the engines that call their optimizer themselves: clip, update, zero.

    Args:
        norm: of all ranks' gradients, on their device; where it is not finite nothing changes.
        max_grad_norm: 0: no clipping.
    """
    prepare_update(optimizer, learning_rate, norm, max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype as people write it: bfloat16."""
    return str(dtype).removeprefix("torch.")


def describe_state(shards: Sequence[FlatShard]) -> str:
    """A line of `Engine.describe`: the precision of masters and moments, and where they lie."""
    kept = [
        " and ".join(
            sorted({precision_of(s.tensor) for s in shards if (s.kind == MASTER) == of_masters})
        )
        for of_masters in (True, False)
    ]
    places = {"cpu": "host", "cuda": "GPU"}
    where = {places.get(s.tensor.device.type, s.tensor.device.type) for s in shards}
    return (
        f"state: master weights {kept[0]}, Adam moments {kept[1]}, kept and updated in "
        f"{' and '.join(sorted(where))} memory"
    )

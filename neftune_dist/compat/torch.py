"""Private parts of PyTorch. Checked against 2.11.0 and 2.13.0."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout, _world
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from neftune_dist.config import UserError

# ------------------------------------------------------------------------------------- operators

_aten = torch.ops.aten

# The kernels behind `scaled_dot_product_attention`. The public function returns no log-sum-exps,
# without which the backward of packed documents could not be an operator.
attention_on_cpu = _aten._scaled_dot_product_flash_attention_for_cpu
attention_on_cpu_backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward
flash_attention = _aten._flash_attention_forward
flash_attention_backward = _aten._flash_attention_backward

# What selective recomputation keeps is named by operator, and attention's and float8's are private.
GROUPED_PRODUCT = _aten._grouped_mm.default  # of stacked experts
COMPUTE_BOUND_OPERATORS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    GROUPED_PRODUCT,
    _aten._scaled_mm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}

# One kernel for many tensors; torch's own optimizers use them, under no public name.
foreach_copy_ = torch._foreach_copy_
foreach_norm = torch._foreach_norm

# An assertion about a GPU's values that the host does not wait for.
assert_async = torch._assert_async

# -------------------------------------------------------------------------------------- autograd


def backward_id() -> int:
    """Return the number of the backward pass that this thread is in, -1 outside of one.

    Activation checkpointing runs a forward again inside of it; nothing public says so.
    """
    return torch._C._current_graph_task_id()


def next_node_number() -> int:
    """Return the number that the next node of the autograd graph will get on this thread."""
    return torch._C._autograd._get_sequence_nr()


def current_node_number() -> int:
    """Return the number of the node whose backward runs now."""
    return int(torch._C._current_autograd_node()._sequence_nr())


def is_view(tensor: Tensor) -> bool:
    """Whether autograd takes the tensor for a view, some of which nobody may change in place."""
    return tensor._is_view()


def storage_id(tensor: Tensor) -> int:
    """Identify the memory of a tensor, also where its address is not known (meta, compiled)."""
    return int(tensor.untyped_storage()._cdata)


def version(tensor: Tensor) -> int:
    """Return how often a tensor, or one that shares its memory, has been changed in place."""
    return int(tensor._version)


# --------------------------------------------------------------------------------------- modules


def move_forward_hook_last(module: nn.Module, hook_id: int) -> None:
    """Let a forward hook run after those that were registered after it."""
    hooks = module._forward_hooks
    hooks[hook_id] = hooks.pop(hook_id)


def compiled_module(model: nn.Module) -> nn.Module | None:
    """Return the module inside what `torch.compile` made of it, None where it made nothing."""
    return getattr(model, "_orig_mod", None)


def is_replica(module: nn.Module) -> bool:
    """Return whether `nn.DataParallel` made a module, for one pass."""
    return getattr(module, "_is_replica", False)


def limit_recompiles(num_blocks: int) -> None:
    """Let the blocks' code be compiled four times a block, and make more an error; torch's limit is
    8, beyond which it stops compiling silently.

    `torch.compiler.set_stance("fail_on_recompile")` would forbid the first recompilation too.

    Args:
        num_blocks: that share their code. Each may differ from the others by a number that it
            holds, and is compiled for training and for evaluation, for one row and for several.
    """
    config: Any = torch._dynamo.config  # type: ignore[attr-defined]
    config.fail_on_recompile_limit_hit = True
    config.recompile_limit = max(config.recompile_limit, 4 * num_blocks)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * num_blocks)


@contextmanager
def recompile_limit_as(message: str) -> Iterator[None]:
    """Raise `UserError(message)` where the block goes beyond the limit of `limit_recompiles`."""
    try:
        yield
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:
        raise UserError(message) from error


# ----------------------------------------------------------------------------------- distributed


def is_context_parallel() -> bool:
    """Whether torch's `context_parallel` is on, which cuts batches up in place.

    It puts a function of its private module in the place of attention, and says so nowhere else.
    """
    module = torch.nn.functional.scaled_dot_product_attention.__module__
    return "_context_parallel" in (module or "")


def default_store() -> dist.Store:
    """Return the store over which the default process group met: it needs no second connection."""
    return _get_default_store()


def process_groups() -> list[dist.ProcessGroup]:
    """Return all process groups of this process, whoever made them."""
    return list(_world.pg_map)


def set_collective_timeout(groups: Iterable[dist.ProcessGroup], timeout: timedelta) -> None:
    """Set how long collectives may take in groups that exist."""
    for group in groups:
        _set_pg_timeout(timeout, group)


def flight_record() -> dict[str, Any]:
    """Return torch's record of this process's last collectives, by backend.

    A backend is left out where this build of torch has no record of it.
    """
    record = {}
    for backend, name in (("nccl", "_dump_nccl_trace_json"), ("gloo", "_dump_fr_trace_json")):
        dump = getattr(torch._C._distributed_c10d, name, None)
        if dump is not None:
            record[backend] = {"entries": [], **json.loads(dump())}
    return record


def local_shape_and_offset(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shape of this rank's shard and its first element's index in the whole."""
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(shape), tuple(offset)


def all_to_all(sent: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send part i of dimension 0 to rank i of the group; differentiable, and compilable.

    (`torch.distributed.nn.functional` cannot be compiled.)
    """
    received: Tensor = wait_tensor(all_to_all_single_autograd(sent, None, None, group))
    return received

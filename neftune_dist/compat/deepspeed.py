"""Private parts of DeepSpeed, and patches of it. Checked against 0.19.8.

Import `deepspeed` from here: its start is quietened first.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from neftune_dist.system.memory_tag import memory_tag

# DeepSpeed reports every detail of its start, on every rank, and the lack of a GPU as a warning.
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "ERROR")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed

# On a CPU DeepSpeed would compile an operator for inference at start, which training never calls:
# it takes a minute and a compiler. A run killed meanwhile leaves torch's lock file behind, on which
# all later runs of the machine wait for ever without a message. (Through `sys.modules`, because in
# the package the name `torch` is torch itself.)
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product: Tensor = torch.ops.aten.linear.default(input, weight, bias)
    return product


# Stage 3's own `linear` adds the bias to its product in place. Selective recomputation keeps that
# product, and would add the bias once more.
_ZERO_LINEAR = import_module("deepspeed.runtime.zero.linear").LinearFunctionForZeroStage3
_ZERO_LINEAR.forward = staticmethod(_linear)

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning)

__all__ = ["deepspeed"]


def masters(zero: Any) -> list[Tensor]:
    """Return this rank's flat float32 masters.

    DeepSpeed has one optimizer class for stage 3, one for 1 and 2, and one for 1 in bfloat16; each
    has another name for them.
    """
    names = (
        "fp32_partitioned_groups_flat",
        "single_partition_of_fp32_groups",
        "fp32_groups_flat_partition",
    )
    return list(next(getattr(zero, name) for name in names if hasattr(zero, name)))


def master_fragment(parameter: Any) -> Any:
    """Return where stages 1 and 2 keep this rank's part of a parameter, None where it has none.

    The public `safe_get_full_fp32_param` gathers the whole instead.
    """
    return parameter._hp_mapping


def copy_masters_to_compute(zero: Any, stage: int) -> None:
    """Make the compute copies of the weights from the masters, as an update does at its end."""
    if stage == 3:
        for group in range(len(masters(zero))):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        # Small parameters are kept whole. To gather them also waits for the GPU: the stream that
        # gathers the others does not wait for the one that has made the copies.
        if kept := zero.persistent_parameters:
            kept[0].partition(kept)
            kept[0].all_gather(kept)
    else:
        zero.update_lp_params()


def replace_norms(
    zero: Any, device: torch.device, squared_norm: Callable[[list[Tensor]], Tensor]
) -> None:
    """Take the gradient's norm over all ranks in float64, as FSDP2 does, offloaded or not.

    DeepSpeed rounds it to float32 by several ways, which depend on stage and offloading. Their
    square roots differ: torch's of a float32 tensor in host memory is MKL's, which on some
    processors is off by one in the last bit. (DeepSpeed's optimizer of stage 1 in bfloat16 has
    neither function, and is never offloaded.)
    """

    def root(square: Tensor) -> Tensor:
        square = square.to(device)  # where the process group works
        dist.all_reduce(square)
        return square.sqrt()

    def of_gradients(gradients: list[Tensor], _parameters: Any) -> Tensor:
        return root(squared_norm(gradients))

    def of_norms(parameters: Any) -> Tensor:
        norms = [zero.norm_for_param_grads.get(zero.get_param_id(p)) for p in parameters]
        return root(squared_norm([norm for norm in norms if norm is not None])).cpu()

    zero.get_grad_norm_direct = of_gradients
    zero.complete_grad_norm_calculation_for_cpu_offload = of_norms


# ------------------------------------------------------------------------------------ simulation


def kept_gradients(zero: Any) -> list[Any]:
    """Return what a ZeRO optimizer keeps of gradients, under names that differ from stage to stage:
    tensors, in nested lists and dicts."""
    return [value for name, value in vars(zero).items() if "grad" in name]


@contextmanager
def simulated(model: Any, stage: int) -> Iterator[None]:
    """Let DeepSpeed run on one process that stands for many, on tensors without content.

    It then asks no other rank for a value, moves no tensor, and leaves neither a process group, a
    variable of the environment nor its own `linear` (stage 3) behind.
    """
    coordinator = import_module("deepspeed.runtime.zero.partitioned_param_coordinator")
    environment, tagged = dict(os.environ), memory_tag("collectives")
    with ExitStack() as stack:
        zero = import_module("deepspeed.runtime.zero.stage_1_and_2").DeepSpeedZeroOptimizer
        gathering = coordinator.PartitionedParameterCoordinator
        for module, name, value in (
            # Weights that stage 3 gathers, and the buckets of stages 1 and 2.
            (gathering, "fetch_sub_module", tagged(gathering.fetch_sub_module)),
            (zero, "setup_buckets", tagged(zero.setup_buckets)),
            (coordinator, "assert_ints_same_as_other_ranks", lambda *_, **__: None),
            (import_module("deepspeed.comm.comm"), "cdb", None),
            (import_module("deepspeed.utils.groups"), "_WORLD_GROUP", None),
            (torch.nn.functional, "linear", torch.nn.functional.linear),
        ):
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        stack.callback(os.environ.update, environment)
        stack.callback(os.environ.clear)
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        if stage < 3:
            model._apply = lambda *_, **__: model
        yield

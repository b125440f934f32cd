"""DeepSpeed ZeRO, stage 1, 2 or 3.

Parameters compute in `model.dtype`; each rank keeps float32 masters and Adam moments of its
partition; gradients are reduced and accumulated in float32. DeepSpeed makes a model's partitions
from whole tensors. Here these are empty, and under stage 3 each exists for a moment only; the
weights are read into the partitions later. With `engine.offload=cpu` masters, gradients and moments
lie in host memory, and the update is made there.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from neftune_dist.compat.deepspeed import (
    copy_masters_to_compute,
    deepspeed,
    master_fragment,
    masters,
    replace_norms,
)
from neftune_dist.config import Config
from neftune_dist.data.loader import MicroBatch
from neftune_dist.distributed.world import World
from neftune_dist.engine.base import (
    FROZEN,
    FlatShard,
    check_shardable,
    count_gradients,
    describe_state,
    dtype_name,
    make_trained_float32,
    state_shards,
    trained_and_frozen,
)
from neftune_dist.engine.used_parameters import UsedParameters
from neftune_dist.model.load import DTYPES, initialize_buffers
from neftune_dist.model.loss import resolve_loss, token_losses
from neftune_dist.model.modules import own_buffers, own_parameters, replace_buffers
from neftune_dist.model.optimizations import blocks
from neftune_dist.optim.adamw import (
    MakeOptimizer,
    initialize_state,
    set_learning_rate,
    set_updates,
    squared_norm,
)
from neftune_dist.optim.param_slice import ParamSlice


class DeepSpeedEngine:
    """The engine contract over DeepSpeed ZeRO."""

    is_saving_replica = True  # ZeRO keeps one copy over all ranks

    def __init__(self, config: Config, world: World) -> None:
        self.world = world
        self.device = world.device
        self.stage = config.engine.zero_stage or 3
        self.loss = config.model.loss
        self.compute_dtype = DTYPES[config.model.dtype]
        self.settings = _settings(config, self.stage, on_gpu=world.device.type == "cuda")
        self.shapes: Mapping[str, tuple[int, ...]] = {}
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
        # DeepSpeed adopts the process group that exists.
        with redirect_stdout(io.StringIO()):
            deepspeed.init_distributed(
                dist_backend="nccl" if world.device.type == "cuda" else "gloo",
                dist_init_required=False,
                verbose=False,
            )

    def setup(self, model: Any, make_optimizer: MakeOptimizer) -> None:
        """See `Engine.setup`."""
        check_shardable(model, needs_all_gradients=self.world.size > 1 and self.stage < 3)
        self.shapes = make_trained_float32(model)
        self.loss = resolve_loss(self.loss, model)
        self.settings["zero_optimization"] |= _bucket_sizes(model, self.stage)
        whole = _Materializer(model, self.world.device, self.compute_dtype)
        dtypes = [buffer.dtype for module in model.modules() for _, buffer in own_buffers(module)]
        with redirect_stdout(io.StringIO()):  # DeepSpeed prints memory reports on every rank
            if self.stage == 3:
                deepspeed.zero.Init(
                    module=whole, config_dict_or_path=self.settings, dtype=self.compute_dtype
                )
                # A block's weights are gathered together, by hooks on the block alone: fewer and
                # larger messages, and no hook inside code that is compiled or recomputed.
                if units := blocks(model):
                    deepspeed.utils.set_z3_leaf_modules(model, list({type(b) for b in units}))
                for block in units:
                    block.register_forward_hook(_list_to_tuple)
            else:
                list(whole.parameters())
            self.named, self.frozen = trained_and_frozen(model)
            if self.frozen and self.stage == 3:
                # A block's backward is over, for DeepSpeed, when its input's gradient is there. So
                # the first block's input needs a gradient even where the embedding is frozen.
                model.get_input_embeddings().register_forward_hook(_require_gradient)
            initialize_buffers(model, self.world.device)
            self.engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=make_optimizer(self.named, self.shapes),
                config=self.settings,
                dist_init_required=False,
            )
        # DeepSpeed casts buffers with the parameters; with rotary frequencies in bf16 the model
        # would differ from the one FSDP2 trains.
        as_made = iter(dtypes)
        replace_buffers(model, lambda buffer: buffer.to(next(as_made)))
        initialize_buffers(model, self.world.device)
        self.model = model
        self.used = UsedParameters(self.world.device, {"": model}) if self.stage < 3 else None
        self.zero = self.engine.optimizer
        replace_norms(self.zero, self.world.device, squared_norm)
        self.masters = masters(self.zero)
        self.slices = list(self._slices())
        initialize_state(self.zero.optimizer, self.masters, self.slices)
        self._watch_gradients()

    def _watch_gradients(self) -> None:
        """Record which parameters get a gradient; `step` restores the others, as other engines skip
        them.

        ZeRO takes the gradient of an unused parameter for zero: weight decay would shrink it, and
        its moments would move it.
        """
        self.received: set[str] = set()
        for name, parameter in self.named:
            parameter.register_post_accumulate_grad_hook(
                lambda _, name=name: self.received.add(name)
            )

    def after_load(self, num_updates: int) -> None:
        """See `Engine.after_load`: the compute copies are made from the masters."""
        set_updates(self.zero.optimizer, num_updates)
        copy_masters_to_compute(self.zero, self.stage)

    def forward(self, batch: MicroBatch) -> Tensor:
        """See `Engine.forward`."""
        return token_losses(self.engine, batch, self.loss)

    def backward(self, loss: Tensor, last_micro_batch: bool) -> None:
        """See `Engine.backward`."""
        if self.used:
            self.used.check(loss, [name for name, _ in self.named])
        self.engine.set_gradient_accumulation_boundary(last_micro_batch)
        # DeepSpeed divides the sum over ranks by their number: cancelled here (law 3). Its division
        # by the accumulation steps is switched off.
        self.engine.backward(loss * self.world.size, scale_wrt_gas=False)
        if not last_micro_batch:
            self.engine.step()  # counts the micro-batch; updates nothing

    def step(self, learning_rate: float) -> float:
        """See `Engine.step`."""
        set_learning_rate(self.zero.optimizer, learning_rate)
        names = [name for name, _ in self.named]
        received, self.received = self.received, set()
        made = count_gradients([name in received for name in names], self.device)
        unused = {name for name, number in zip(names, made.tolist(), strict=True) if not number}
        kept = [shard for shard in self.flat_state() if shard.name in unused]
        before = [shard.empty_copy(torch.empty_like) for shard in kept]
        for shard, content in zip(kept, before, strict=True):
            content.copy_(shard.tensor)  # type: ignore[arg-type]
        # Where the norm is not finite DeepSpeed updates nothing, and reports an infinite norm.
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        if not math.isfinite(norm):
            # With offloading, stages 1 and 2 would add the next step's gradients to these.
            gradients = getattr(self.zero, "averaged_gradients", {})
            gradients.update(dict.fromkeys(gradients))
        if unused:
            for shard, content in zip(kept, before, strict=True):
                shard.tensor.copy_(content)  # type: ignore[arg-type]
            copy_masters_to_compute(self.zero, self.stage)
        return norm

    def flat_state(self) -> list[FlatShard]:
        """See `Engine.flat_state`."""
        return state_shards(self.zero.optimizer, self.slices)

    def frozen_state(self) -> list[FlatShard]:
        """See `Engine.frozen_state`."""
        shards = []
        parameter: Any
        for name, parameter in self.frozen:
            start, held, numel = 0, parameter.data, parameter.numel()
            if self.stage == 3:
                numel, held = parameter.ds_numel, parameter.ds_tensor.data
                start = held.numel() * self.world.rank
                held = held[: max(0, numel - start)]  # the last partitions are padded
            if held.numel():
                shards.append(FlatShard(FROZEN, name, start, held.view(-1), numel))
        return shards

    def _slices(self) -> Iterator[ParamSlice]:
        for name, parameter in self.named:
            numel = math.prod(self.shapes[name])
            for start, master, part in self._ranges(parameter, numel):
                yield ParamSlice(master, part, name, start, numel)

    def _ranges(self, parameter: Any, numel: int) -> Iterator[tuple[int, Tensor, slice]]:
        """This rank's ranges: start within the parameter, flat master tensor, slice of it."""
        if self.stage == 3:
            group, offset, size = self.zero.grad_position[self.zero.get_param_id(parameter)]
            start = size * self.world.rank
            size = min(size, numel - start)  # the last partitions are padded
            if size > 0:
                yield start, self.masters[group], slice(offset, offset + size)
            return
        fragment = master_fragment(parameter)
        if fragment is None:
            return
        address = fragment.get_hp_fragment_address()
        master = next(
            m
            for m in self.masters
            if m.untyped_storage().data_ptr() == fragment.hp_fragment.untyped_storage().data_ptr()
        )
        size = min(address.numel, numel - fragment.lp_fragment_address.start)
        yield (
            fragment.lp_fragment_address.start,
            master,
            slice(address.start, address.start + size),
        )

    def train(self, mode: bool) -> None:
        """See `Engine.train`."""
        self.engine.train(mode)

    def describe(self) -> list[str]:
        """See `Engine.describe`."""
        return [
            f"engine: deepspeed {deepspeed.__version__}, ZeRO stage {self.stage}, "
            f"{self.world.size} partitions on {self.world.device.type}; "
            f"compute {dtype_name(self.compute_dtype)}, "
            "gradients reduced and accumulated in float32",
            describe_state(self.flat_state()),
        ]


def _settings(config: Config, stage: int, on_gpu: bool) -> dict[str, Any]:
    # On a GPU, communication overlaps computation; gloo's would take cores from it.
    zero: dict[str, Any] = {"stage": stage, "contiguous_gradients": True, "overlap_comm": on_gpu}
    if config.engine.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    return {
        # Micro-batches are driven by hand; these satisfy DeepSpeed's own arithmetic.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Without the check, ZeRO-2 in bf16 also applies gradients that are not finite.
        "bf16": {"enabled": config.model.dtype == "bf16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "gradient_clipping": config.optim.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW does as well on the host
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # waits for the GPU before every forward
    }


def _bucket_sizes(model: nn.Module, stage: int) -> dict[str, int]:
    """Elements of DeepSpeed's buckets, of gradients to reduce and weights to prefetch: a block.

    DeepSpeed's defaults do not depend on the model: at 7B they are 2.5 blocks of gradients and a
    quarter of a block of weights.
    """
    largest = max(parameter.numel() for parameter in model.parameters())
    of_blocks = [sum(p.numel() for p in block.parameters()) for block in blocks(model)]
    unit = max(largest, *of_blocks, 50_000_000)  # smaller messages are slower
    return {
        "reduce_bucket_size": unit,
        **({"stage3_prefetch_bucket_size": unit} if stage == 3 else {}),
    }


def _require_gradient(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return output.requires_grad_()


def _list_to_tuple(_module: nn.Module, _args: Any, output: Any) -> Any:
    """Make a list of outputs (GPT-1's) a tuple: torch's backward hooks, on which DeepSpeed relies,
    ignore tensors in lists."""
    return tuple(output) if isinstance(output, list) else output


class _Materializer(nn.Module):
    """Makes a model's meta parameters real, one at a time while DeepSpeed iterates `parameters()`:
    it has partitioned one before it asks for the next. A tied parameter is made once, for all its
    modules, so that it stays tied and has one partition."""

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        self._device, self._dtype = device, dtype
        for module in model.modules():
            for name, parameter in own_parameters(module):
                self._places.setdefault(id(parameter), []).append((module, name))

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        for places in self._places.values():
            module, name = places[0]
            meta = getattr(module, name)
            real = nn.Parameter(
                torch.zeros(meta.shape, dtype=self._dtype, device=self._device),
                requires_grad=meta.requires_grad,
            )
            for module, name in places:
                setattr(module, name, real)
            yield real

"""The lines that a run prints before its first step, and its recorded environment."""

from __future__ import annotations

import platform
from typing import Any

import torch

from neftune_dist.compat.transformers import attention_name
from neftune_dist.config import Config
from neftune_dist.data.dataset import Dataset
from neftune_dist.data.loader import Loader
from neftune_dist.data.sampler import Sampler
from neftune_dist.distributed.world import World
from neftune_dist.engine.base import Engine
from neftune_dist.model.attention import VARLEN
from neftune_dist.model.flash import varlen_kernel
from neftune_dist.model.optimizations import drops
from neftune_dist.system.processor import processor_name
from neftune_dist.system.text import count_text
from neftune_dist.system.versions import versions as system_versions


def data_lines(dataset: Dataset, sampler: Sampler, loader: Loader) -> list[str]:
    """Lines on the rows read and the steps made of them."""
    lines = list(dataset.report.lines())
    if dataset.chat_template is None:
        lines.append(
            "warning: data.template cannot be written as a chat template for this tokenizer; "
            "exports will have none"
        )
    first = loader.step(0)
    epoch, batch = sampler.steps_per_epoch, sampler.global_batch_size
    left = sampler.num_documents % batch
    ends = f", the last of them of {count_text(left, 'document')}" if left else ""
    padding = 1 - first.num_tokens / first.num_computed_tokens
    lines.append(
        f"data: {sampler.num_steps} steps of {batch} documents, {epoch} steps an epoch{ends}; "
        f"micro-batches of a rank in step 1: {len(first.micro_batches)}, {padding:.1%} padding"
    )
    return lines


def compute_line(engine: Engine, config: Config) -> str:
    """How the model's layers are computed, with each `auto` resolved."""
    model = config.model
    attention = attention_name(engine.model)
    if attention == VARLEN:
        windowed = bool(getattr(engine.model.config.get_text_config(), "sliding_window", None))
        attention = varlen_kernel(engine.device, model.dtype, windowed)
    parts = [
        f"attention {attention.removeprefix('neftune_dist_')}",
        f"loss {engine.loss}",
        f"activation checkpointing {model.activation_checkpointing}",
        f"blocks {'compiled' if model.compile else 'not compiled'}",
    ]
    if model.kernels != "torch":
        parts.append(f"{model.kernels} kernels")
    if model.float8 != "none":
        emulated = "" if engine.device.type == "cuda" else ", emulated: its rounding, not its speed"
        parts.append(f"float8 {model.float8}{emulated}")
    return f"compute: {', '.join(parts)}"


def warmup_lines(config: Config, num_steps: int) -> list[str]:
    """A warning for each warm-up that outlasts the run."""
    steps = {"optim": config.optim.warmup_steps}
    if config.noise.alpha:
        steps["noise"] = config.noise.warmup_steps
    return [
        f"warning: {section}.warmup_steps={number} outlasts the run's "
        f"{count_text(num_steps, 'step')}: {num_steps / number:.0%} of the peak is reached"
        for section, number in steps.items()
        if number > num_steps
    ]


def dropout_lines(model: Any) -> list[str]:
    """A line for a model with dropout, which depends on the layout."""
    if not drops(model):
        return []
    return [
        "dropout: the model's own draws by step and rank, so that another layout (ranks, packing, "
        "micro-batches) trains something else; a resume under the same layout is exact"
    ]


def noise_lines(config: Config) -> list[str]:
    """Lines on the run's noise."""
    noise = config.noise
    if not noise.alpha:
        return ["noise: off"]
    lines = [
        f"noise: alpha {noise.alpha} ({noise.schedule}), {noise.distribution}, "
        f"{noise.stream} stream, seed {config.noise_seed}"
    ]
    if noise.length == "padded":
        lines.append(
            "noise: scaled by the length of the padded or packed row, padding noised too, as the "
            "widely copied hook does: not the paper's noise, for comparison alone"
        )
    return lines


def environment(world: World) -> dict[str, Any]:
    """The machine and versions, recorded with the run."""
    return {
        **versions(),
        "host": platform.node(),
        "device": device_name(world.device),
        "world_size": world.size,
    }


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name()


def versions() -> dict[str, str]:
    """The versions that are recorded with a run, see `system.versions`."""
    return {**system_versions(), "cuda": str(torch.version.cuda)}

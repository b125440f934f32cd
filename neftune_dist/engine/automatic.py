"""The choice of an engine for `engine.name=auto`, by the sizes of the model and of the device."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from neftune_dist.config import KNOBS, Config
from neftune_dist.optim.adamw import state_bytes
from neftune_dist.system.text import size_text

# The most that weights, gradients and moments may take of a device's memory under `replicated`; the
# rest is for activations. With one rank the share is greater, because sharding would save little.
_STATE_SHARE, _STATE_SHARE_OF_ONE = 0.6, 0.83
# Settings that only the sharding engines read: where one is set, FSDP2 is chosen.
_SHARDING = ("num_replicas", "reshard_after_forward", "sync_every", "offload")


def choose_engine(
    config: Config, model: nn.Module, device_bytes: float, world_size: int
) -> tuple[Config, str]:
    """Decide `engine.name=auto`: `replicated` where the device holds the whole model well, else
    `fsdp2`.

    Args:
        config: of the run; its `model.dtype` is decided.
        model: on the meta device, with its adapters.
        device_bytes: memory of a rank's device; on CPUs a rank's part of the host's.
        world_size: number of ranks.

    Returns:
        The configuration with an engine, and the reason in words.
    """
    engine = config.engine
    set_ones = [n for n in _SHARDING if getattr(engine, n) != KNOBS[f"engine.{n}"].default]
    needed = _replica_bytes(config, model)
    if set_ones:
        name, why = "fsdp2", f"because engine.{set_ones[0]} is set"
    else:
        share = _STATE_SHARE if world_size > 1 else _STATE_SHARE_OF_ONE
        fits = needed <= share * device_bytes
        name = "replicated" if fits else "fsdp2"
        why = (
            f"as weights, gradients and moments of the whole model take {size_text(needed)}, "
            f"{'at most' if fits else 'more than'} {share:.0%} of a rank's "
            f"{size_text(device_bytes)}"
        )
    return replace(config, engine=replace(engine, name=name)), why


def _replica_bytes(config: Config, model: nn.Module) -> int:
    """What `replicated` keeps of a model on each rank, without its activations."""
    compute = 2 if config.model.dtype == "bf16" else 0  # float32 masters are computed with
    return sum(
        p.numel() * (compute + 4 + 4) + state_bytes(config.optim, p.numel())
        if p.requires_grad
        else p.numel() * p.element_size()
        for p in model.parameters()
    )

"""What `engine.name=auto` and `engine.sync_every=auto` choose, by the sizes of model and device."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from neftune_dist.config import KNOBS, Config
from neftune_dist.optim.adamw import state_bytes
from neftune_dist.system.text import size_text

# The most that weights, gradients and moments may take of a device's memory; the rest is for
# activations. With one rank the share is greater, because sharding would save little.
_STATE_SHARE, _STATE_SHARE_OF_ONE = 0.6, 0.83
# Less for `sync_every=step`: it spares little time, and long micro-batches need the room.
_SYNCED_ONCE_SHARE = 0.5
# Settings that only the sharding engines read: where one is set, FSDP2 is chosen.
_SHARDING = ("num_replicas", "reshard_after_forward", "sync_every", "offload")


def choose_engine(
    config: Config, model: nn.Module, device_bytes: float, world_size: int
) -> tuple[Config, list[str]]:
    """Decide `engine.name=auto` (`replicated` where the device holds the whole model well, else
    `fsdp2`), and for `fsdp2` `engine.sync_every=auto` (`step` where it holds weights and gradients
    well, else `micro_batch`).

    Args:
        config: of the run; its `model.dtype` is decided.
        model: on the meta device, with its adapters.
        device_bytes: memory of a rank's device; on CPUs a rank's part of the host's.
        world_size: number of ranks.

    Returns:
        The configuration without these two `auto`, and a line for each that was decided, with the
        reason.
    """
    engine, lines = config.engine, []

    def fits(what: str, num_bytes: float, share: float) -> tuple[bool, str]:
        held = num_bytes <= share * device_bytes
        return held, (
            f"as {what} take {size_text(num_bytes)}, {'at most' if held else 'more than'} "
            f"{share:.0%} of a rank's {size_text(device_bytes)}"
        )

    if engine.name == "auto":
        set_ones = [n for n in _SHARDING if getattr(engine, n) != KNOBS[f"engine.{n}"].default]
        whole, why = fits(
            "weights, gradients and moments of the whole model",
            _replica_bytes(config, model),
            _STATE_SHARE if world_size > 1 else _STATE_SHARE_OF_ONE,
        )
        if set_ones:
            whole, why = False, f"because engine.{set_ones[0]} is set"
        engine = replace(engine, name="replicated" if whole else "fsdp2")
        lines.append(f"engine.name=auto: {engine.name}, {why}")
    if engine.name == "fsdp2" and engine.sync_every == "auto":
        if engine.reshard_after_forward is not None:
            whole, why = False, "because engine.reshard_after_forward is set"
        else:
            whole, why = fits(
                "all weights and gradients, and a rank's part of masters and moments",
                _synced_once_bytes(config, model, world_size),
                _SYNCED_ONCE_SHARE,
            )
        engine = replace(engine, sync_every="step" if whole else "micro_batch")
        lines.append(f"engine.sync_every=auto: {engine.sync_every}, {why}")
    return replace(config, engine=engine), lines


def _replica_bytes(config: Config, model: nn.Module) -> int:
    """What `replicated` keeps of a model on each rank, without its activations."""
    compute = 2 if config.model.dtype == "bf16" else 0  # float32 masters are computed with
    return sum(
        p.numel() * (compute + 4 + 4) + state_bytes(config.optim, p.numel())
        if p.requires_grad
        else p.numel() * p.element_size()
        for p in model.parameters()
    )


def _synced_once_bytes(config: Config, model: nn.Module, world_size: int) -> float:
    """What `fsdp2` with `engine.sync_every=step` keeps on each rank from one micro-batch to the
    next, without activations: gathered weights, their gradients, and its shards of masters and
    moments, where these are not offloaded."""
    compute = 2 if config.model.dtype == "bf16" else 4
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    whole = sum(trained) * (compute + 4) + frozen
    if config.engine.offload == "cpu":
        return whole
    shards = world_size / (config.engine.num_replicas or 1)
    state = sum(n * 4 + state_bytes(config.optim, n) for n in trained)
    return whole + (state + frozen) / shards

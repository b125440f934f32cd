"""The noise as a configuration asks for it: on which model, how strong at which step."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed import ProcessGroup

from neftune_dist.config import Config, NoiseConfig, UserError
from neftune_dist.data.loader import MicroBatch
from neftune_dist.noise.handle import NEFTuneHandle
from neftune_dist.noise.law import SIGNS
from neftune_dist.noise.layout import TokenLayout
from neftune_dist.noise.neftune import NEFTune
from neftune_dist.optim.schedule import Schedule


def configured_noise(
    config: Config, rank: int, *, stream: str = "", slices: ProcessGroup | None = None
) -> NEFTune:
    """Return the configuration's noise.

    Args:
        rank: the data-parallel rank.
        stream: instead of `noise.stream`.
        slices: ranks that hold slices of the same documents.
    """
    noise = config.noise
    return NEFTune(
        noise.alpha,
        seed=config.noise_seed,
        stream=stream or noise.stream,
        rank=rank,
        distribution=noise.distribution,
        length=noise.length,
        slices=slices,
    )


def attach_noise(
    config: Config, model: Any, rank: int, slices: ProcessGroup | None
) -> NEFTuneHandle:
    """Put the run's noise on its model. Raises `UserError` where the law does not cover the
    model."""
    try:
        return configured_noise(config, rank, slices=slices).attach(model)
    except ValueError as error:
        raise UserError(f"{error} Set noise.alpha=0, or train another model.") from error


def noise_alpha(noise: NoiseConfig, step: int, num_steps: int) -> float:
    """Return the strength of the noise at step 0 <= step < num_steps."""
    schedule = Schedule(noise.alpha, noise.schedule, noise.warmup_steps, noise.final_fraction)
    return schedule.value(step, num_steps)


def noise_signs(noise: NoiseConfig) -> tuple[int, ...]:
    """Return the signs of the noise in the forward passes of each micro-batch: 1, and under
    SymNoise also -1."""
    return SIGNS[noise.distribution] if noise.alpha else (1,)


def num_passes(noise: NoiseConfig) -> int:
    """Return the number of forward passes of each micro-batch."""
    return len(noise_signs(noise))


def token_layout(batch: MicroBatch) -> TokenLayout:
    """Return the noise's description of a micro-batch's tokens, without waiting for the device."""
    if len(batch.documents) == 0:  # an empty micro-batch holds padding alone
        return TokenLayout.padding(batch.input_ids.numel(), batch.input_ids.device)
    own, segment = len(batch.segment), batch.segment
    first = batch.part[0] * own  # of a slice, within the whole
    return TokenLayout(
        token=torch.arange(first, first + own, device=segment.device),
        length=batch.token_length,
        position=batch.position_ids.flatten(),
        segment=segment,
        document=batch.documents[segment],
        epoch=batch.epochs[segment],
    )

"""The held-out loss of the loop: a mean over supervised tokens, noise off, under any engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from neftune_dist.config import EvaluateConfig
from neftune_dist.data.documents import Documents
from neftune_dist.data.loader import BatchLayout, evaluation_batches
from neftune_dist.data.split import sample_documents
from neftune_dist.distributed.world import World
from neftune_dist.engine.base import Engine


class HeldOut:
    """The held-out documents of a run."""

    def __init__(self, documents: Documents, layout: BatchLayout, world: World) -> None:
        most = layout.config.evaluate.max_documents or len(documents)
        self.indices = sample_documents(documents, most)
        self.documents, self.layout, self.world = documents, layout, world

    @torch.no_grad()
    def evaluate(self, engine: Engine, stop_requested: Callable[[], bool]) -> dict[str, Any] | None:
        """Return `held_out_loss`, its perplexity and the counts: a collective of all ranks, by an
        engine in evaluation mode.

        All ranks have the same number of batches. None where any rank was asked to stop before the
        last one.
        """
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for batch in evaluation_batches(self.documents, self.indices, self.layout):
            if self.world.any(stop_requested()):
                return None
            # Without waiting for the device.
            loss_sum += engine.forward(batch.to(self.world.device))
        total = sum(of_rank for (of_rank,) in self.world.gather([float(loss_sum)]))
        tokens = int(self.documents.num_supervised[self.indices].sum())
        return held_out_figures(total / tokens, len(self.indices), tokens)


def held_out_figures(loss: float | None, num_documents: int, num_tokens: int) -> dict[str, Any]:
    """The figures of a mean held-out loss, here and in `neftune-dist evaluate`."""
    return {
        "held_out_loss": loss,
        # exp within what a float holds.
        "perplexity": None if loss is None else math.exp(min(loss, 700.0)),
        "num_documents": num_documents,
        "num_supervised_tokens": num_tokens,
    }


def evaluation_due(config: EvaluateConfig, step: int, num_steps: int) -> bool:
    """Whether held-out documents are evaluated after `step`, which is 0 at a run's start."""
    every = config.every_steps
    return step in (0, num_steps) or (every > 0 and step < num_steps and step % every == 0)

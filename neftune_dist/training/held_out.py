"""Held-out loss in the loop: token-weighted, noise off, under any engine, nothing gathered."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from neftune_dist.config import Config
from neftune_dist.data.documents import Documents
from neftune_dist.data.loader import evaluation_batches
from neftune_dist.data.split import sample_documents
from neftune_dist.distributed.world import Sharing, World
from neftune_dist.engine.base import Engine


class HeldOut:
    """The held-out documents of a run. A collective of all ranks."""

    def __init__(
        self,
        documents: Documents,
        config: Config,
        world: World,
        sharing: Sharing,
        quadratic_tokens: float,
    ) -> None:
        most = config.evaluate.max_documents or len(documents)
        self.indices = sample_documents(documents, most)
        self.documents, self.config, self.world = documents, config, world
        self.sharing, self.quadratic_tokens = sharing, quadratic_tokens

    def evaluate(self, engine: Engine, stop_requested: Callable[[], bool]) -> dict[str, Any] | None:
        """`held_out_loss` (mean over supervised tokens), its perplexity, and the counts; None where
        any rank was asked to stop before the last batch."""
        engine.train(False)
        loss_sum = self._loss_sum(engine, stop_requested)
        engine.train(True)
        if loss_sum is None:
            return None
        total = sum(part[0] for part in self.world.gather([loss_sum]))
        tokens = int(self.documents.num_supervised[self.indices].sum())
        loss = total / tokens
        return {
            "held_out_loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "num_documents": len(self.indices),
            "num_supervised_tokens": tokens,
        }

    @torch.no_grad()
    def _loss_sum(self, engine: Engine, stop_requested: Callable[[], bool]) -> float | None:
        """This rank's; all ranks have as many batches, and give up before the same one."""
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.world.device)
        batches = evaluation_batches(
            self.documents,
            self.indices,
            self.config,
            self.sharing.data_rank,
            self.sharing.data_size,
            self.quadratic_tokens,
            self.world.device,
            self.sharing.part,
        )
        for batch in batches:
            if self.world.any(stop_requested()):
                return None
            loss_sum += engine.forward(batch.to(self.world.device))  # nobody waits for it
        return float(loss_sum)

"""Losses and gradients that are not finite, put into one micro-batch of one rank."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Fault:
    """In the first micro-batch of rank `rank`, what is not finite at these steps (the first is 1):
    the loss, or the gradient alone."""

    losses: tuple[int, ...] = ()
    gradients: tuple[int, ...] = ()
    rank: int = 0
    folder: Path | None = None  # for a mark that the rank raised `Diverged` by itself

    def __call__(self) -> None:
        from neftune_dist.training import train
        from neftune_dist.training.loop import Diverged, Trainer

        rank = int(os.environ.get("RANK", "0"))
        run, train_step = train.train, Trainer.train_step

        def marked_run(*arguments: Any) -> int:
            try:
                return run(*arguments)
            except Diverged as error:
                if self.folder:
                    (self.folder / f"diverged_{rank}").write_text(str(error))
                raise

        def faulty_step(trainer: Trainer, batch: Any, num_steps: int) -> bool:
            forward, first = trainer.engine.forward, batch.micro_batches[0]

            def faulty_forward(micro_batch: Any) -> Tensor:
                loss = forward(micro_batch)
                trainer.engine.forward = forward  # type: ignore[method-assign]
                if batch.step + 1 in self.losses:
                    return loss + math.inf
                loss.register_hook(lambda gradient: gradient * math.nan)
                return loss

            if batch.step + 1 in self.losses + self.gradients and rank == self.rank:
                assert len(batch.micro_batches) > 1
                assert len(first.lengths), "an empty micro-batch would show nothing"
                trainer.engine.forward = faulty_forward  # type: ignore[method-assign]
            return train_step(trainer, batch, num_steps)

        train.train = marked_run
        Trainer.train_step = faulty_step  # type: ignore[method-assign]

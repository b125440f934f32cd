"""The training loop. It knows no engine, no file format and no rank.

Law 3 stands here in one line: every micro-batch's loss sum is divided by the step's number of
supervised tokens over all ranks, which the schedule knows beforehand.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from neftune_dist.checkpoint.saver import Saver
from neftune_dist.config import Config, NoiseConfig, scheduled
from neftune_dist.data.loader import Loader, MicroBatch, StepBatch
from neftune_dist.distributed import World
from neftune_dist.engine.base import Engine
from neftune_dist.evaluate.held_out import HeldOut
from neftune_dist.metrics import Recorder, memory_gib
from neftune_dist.model.flops import ModelSize, peak_flops
from neftune_dist.noise.hook import NEFTuneHandle
from neftune_dist.noise.law import TokenLayout, expected_norm
from neftune_dist.optim import learning_rate


@dataclass
class Progress:
    """How far a run has come; saved with every checkpoint."""

    step: int = 0  # updates made, which is also the data cursor
    num_tokens: int = 0
    num_supervised_tokens: int = 0


@dataclass
class Trainer:
    """All that a run needs, and the loop over it."""

    config: Config
    world: World
    engine: Engine
    noise: NEFTuneHandle
    loader: Loader
    recorder: Recorder
    size: ModelSize
    held_out: HeldOut | None
    saver: Saver
    trainer_state: Callable[[Progress], dict[str, Any]]  # what a checkpoint holds beside tensors
    stop_requested: Callable[[], bool]
    progress: Progress = field(default_factory=Progress)

    def run(self) -> bool:
        """Train to the schedule's end; False where a stop was asked for and saved instead."""
        num_steps = self.loader.schedule.num_steps
        every, save_every = self.config.evaluate.every_steps, self.config.checkpoint.every_steps
        if self.progress.step == 0:
            self.evaluate()
        for batch in self.loader.steps(self.progress.step):
            stopping = self.train_step(batch, num_steps)
            step, last = self.progress.step, self.progress.step == num_steps
            if last or (every and step % every == 0):
                self.evaluate()
            if last or stopping or (save_every and step % save_every == 0):
                self.saver.save(step, self.engine, self.trainer_state(self.progress))
                seconds = self.saver.seconds_waited
                self.world.log(f"checkpoint: step {step}; training stood still {seconds:.2f} s")
            if stopping and not last:
                break
        self.saver.wait()
        return self.progress.step == num_steps

    def train_step(self, batch: StepBatch, num_steps: int) -> bool:
        """One update. True where any rank was asked to stop."""
        began = time.perf_counter()
        noise = self.config.noise
        alpha = noise_alpha(noise, batch.step, num_steps)
        self.noise.step, self.noise.alpha = batch.step, alpha
        # A model's own dropout draws from torch's generator: from here on what it draws is a
        # function of the step, so that a resumed run drops what the uninterrupted one does.
        key = f"{self.config.train.seed}/{batch.step}/{self.world.rank}"
        torch.manual_seed(random.Random(key).getrandbits(63))
        passes = num_passes(noise)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.world.device)
        forwards = [each for each in batch.micro_batches for _ in range(passes)]
        for i, micro_batch in enumerate(forwards):
            layout = token_layout(micro_batch).to(self.world.device)
            self.noise.describe(layout)
            loss = self.engine.forward(micro_batch.to(self.world.device)) / passes
            self.engine.backward(loss / batch.num_supervised_tokens, i == len(forwards) - 1)
            loss_sum += loss.detach()
        rate = learning_rate(self.config.optim, batch.step, num_steps)
        grad_norm = self.engine.step(rate)
        if noise.alpha and self.noise.num_fired != len(forwards):
            raise RuntimeError(
                f"Step {batch.step + 1}: the noise was added in {self.noise.num_fired} of "
                f"{len(forwards)} forward passes; the model bypasses its input embedding. Nothing "
                "was saved of this step."
            )
        norm_sum, num_noised = self.noise.take_noise_norms()
        parts = self.world.gather(
            [
                float(loss_sum),
                float(norm_sum),
                float(num_noised),
                float(self.stop_requested()),
                float(self.saver.failed),
                memory_gib(self.world.device),
            ]
        )
        total_loss, total_norm, noised, stop, failed = (sum(p[i] for p in parts) for i in range(5))
        if failed:
            self.saver.wait()  # raises on all ranks
        loss_mean = total_loss / batch.num_supervised_tokens
        if not (math.isfinite(loss_mean) and math.isfinite(grad_norm)):
            raise RuntimeError(
                f"Step {batch.step + 1}: loss {loss_mean}, gradient norm {grad_norm}. Nothing was "
                "saved of it; the last checkpoint is sound. A lower optim.learning_rate may help."
            )
        self.progress.step += 1
        self.progress.num_tokens += batch.num_tokens
        self.progress.num_supervised_tokens += batch.num_supervised_tokens
        self.recorder.step(
            {
                "step": self.progress.step,
                "loss": loss_mean,
                "learning_rate": rate,
                "grad_norm": grad_norm,
                "num_documents": batch.num_documents,
                "num_tokens": batch.num_tokens,
                "num_supervised_tokens": batch.num_supervised_tokens,
                "padding_fraction": 1 - batch.num_tokens / batch.num_computed_tokens,
                "noise_norm": total_norm / noised if noised else 0.0,
                "noise_law": expected_norm(alpha, noise.distribution),
                **self.speed(batch, time.perf_counter() - began),
                "memory_gib": max(p[5] for p in parts),
                "world_size": self.world.size,
            }
        )
        return stop > 0

    def speed(self, batch: StepBatch, seconds: float) -> dict[str, Any]:
        """Step time (seconds), real tokens per second over all ranks, and MFU where the device's
        peak is known."""
        flops = self.size.training_flops(batch.num_tokens, batch.sum_squared_lengths)
        flops *= num_passes(self.config.noise)
        on_gpu = self.world.device.type == "cuda"
        name = torch.cuda.get_device_name(self.world.device) if on_gpu else None
        peak = peak_flops(name, self.config.model.dtype)
        return {
            "step_seconds": seconds,
            "tokens_per_second": batch.num_tokens / seconds,
            "mfu": flops / (seconds * peak * self.world.size) if peak else None,
        }

    def evaluate(self) -> None:
        """Held-out loss now, noise off, where documents are held out."""
        if self.held_out is not None:
            result = self.held_out.evaluate(self.engine)
            self.recorder.evaluation({"step": self.progress.step, **result})


def noise_alpha(noise: NoiseConfig, step: int, num_steps: int) -> float:
    """The strength of the noise at step 0 <= step < num_steps."""
    return scheduled(
        noise.alpha, noise.schedule, noise.warmup_steps, noise.final_fraction, step, num_steps
    )


def num_passes(noise: NoiseConfig) -> int:
    """Forward passes of each micro-batch: SymNoise has it twice, under opposite noise."""
    return 2 if noise.alpha and noise.distribution == "symmetric" else 1


def token_layout(batch: MicroBatch) -> TokenLayout:
    """What the noise must know of a micro-batch's tokens."""
    if len(batch.lengths) == 0:  # an empty micro-batch: its one token is padding
        return TokenLayout.padding(batch.input_ids.numel())
    if batch.attention_mask is None:
        return TokenLayout.from_lengths(
            batch.lengths, documents=batch.documents, epochs=batch.epochs
        )
    return TokenLayout.from_arguments(
        batch.input_ids,
        batch.attention_mask,
        documents=batch.documents,
        epochs=batch.epochs,
    )

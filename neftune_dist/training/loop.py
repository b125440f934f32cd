"""The training loop. It knows no engine, no file format and no rank.

Law 3 is one line of `accumulate_gradients`: each micro-batch's loss sum is divided by the step's
number of supervised tokens over all ranks, which the sampler knows beforehand. A step whose loss or
gradient is not finite changes nothing but the cursor; too many consecutive ones end the run.

Only a model's own dropout depends on the layout, as it draws by step and rank: with another number
of ranks, packing or micro-batches it drops other activations. The same layout resumes exactly.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from neftune_dist.checkpoint.saver import Saver
from neftune_dist.config import Config
from neftune_dist.data.loader import Loader, StepBatch
from neftune_dist.distributed.outcome import Final
from neftune_dist.distributed.signals import Stopped
from neftune_dist.distributed.straggler import Stragglers
from neftune_dist.distributed.watchdog import Watchdog
from neftune_dist.distributed.world import World
from neftune_dist.engine.base import Engine
from neftune_dist.model.flops import ModelSize
from neftune_dist.model.optimizations import check_compiled
from neftune_dist.noise.handle import NEFTuneHandle
from neftune_dist.optim.schedule import learning_rate
from neftune_dist.training.held_out import HeldOut, evaluation_due
from neftune_dist.training.metrics import RankResult, Recorder, Totals, memory_gib, step_record
from neftune_dist.training.noise import noise_alpha, noise_signs, num_passes, token_layout
from neftune_dist.training.profiling import StepProfiler
from neftune_dist.training.samples import SampleAnswers


class Diverged(Final):
    """Too many consecutive steps had no finite loss and gradient. The last update is saved; resumed
    from there unchanged, the run would end in the same way."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come; saved with every checkpoint.

    Attributes:
        step: steps made, including skipped ones; also the data cursor.
        num_tokens, num_supervised_tokens: trained on.
        num_skipped_steps: without an update, as loss or gradient was not finite.
        num_skipped_in_a_row: the last steps, if they were skipped.
        best_loss, best_step: the lowest held-out loss so far, and the step after which it was.
        num_worse: evaluations since then.
    """

    step: int = 0
    num_tokens: int = 0
    num_supervised_tokens: int = 0
    num_skipped_steps: int = 0
    num_skipped_in_a_row: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    num_worse: int = 0

    @property
    def num_updates(self) -> int:
        """Adam's count of steps."""
        return self.step - self.num_skipped_steps

    def after(self, batch: StepBatch, updated: bool) -> Progress:
        """Return the progress after one more step."""
        return replace(
            self,
            step=self.step + 1,
            num_tokens=self.num_tokens + batch.num_tokens,
            num_supervised_tokens=self.num_supervised_tokens + batch.num_supervised_tokens,
            num_skipped_steps=self.num_skipped_steps + (not updated),
            num_skipped_in_a_row=0 if updated else self.num_skipped_in_a_row + 1,
        )

    def evaluated(self, loss: float) -> Progress:
        """Return the progress after an evaluation. A loss that is not finite is never the best."""
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            return replace(self, best_loss=loss, best_step=self.step, num_worse=0)
        return replace(self, num_worse=self.num_worse + 1)

    def is_over(self, num_steps: int, patience: int) -> bool:
        """Whether all steps are made, or the held-out loss has not improved for `patience`
        evaluations; 0: never."""
        return self.step >= num_steps or 0 < patience <= self.num_worse


@dataclass
class Trainer:
    """The parts of a run, and the loop over its steps.

    Attributes:
        trainer_state: returns the part of a checkpoint beside tensors.
        stop_requested: whether this rank was asked to stop.
        evaluation_due: whether to evaluate before the first step, as at the run's start, or where a
            stop cut the last evaluation short.
    """

    config: Config
    world: World
    engine: Engine
    noise: NEFTuneHandle
    loader: Loader
    recorder: Recorder
    size: ModelSize
    held_out: HeldOut | None
    samples: SampleAnswers | None
    saver: Saver
    watchdog: Watchdog
    stragglers: Stragglers
    profiler: StepProfiler
    trainer_state: Callable[[Progress], dict[str, Any]]
    stop_requested: Callable[[], bool]
    progress: Progress
    evaluation_due: bool

    def __post_init__(self) -> None:
        self.saved_step = self.progress.step  # of the newest checkpoint; 0: there is none
        self.last_update = self.progress  # right after the newest update
        self.wait_seconds = 0.0  # this rank's wait for the current batch
        self.totals = Totals()
        self.graph_breaks: set[str] = set()  # reported

    def run(self) -> bool:
        """Train to the last step, or until the held-out loss no longer improves; return False where
        a stop was requested and saved instead.

        Raises:
            Stopped: the request came before the first step.
            Diverged: more than `train.max_skipped_steps` consecutive steps were skipped.
        """
        num_steps, saving = self.loader.sampler.num_steps, self.config.checkpoint
        patience = self.config.train.patience
        if self.evaluation_due and not self.evaluate():
            raise Stopped
        if saving.every_steps or saving.keep_best:
            self.saver.prepare(self.engine)
        evaluated = True
        for batch in self.batches():
            with self.profiler.step(batch.step + 1):
                stopping = self.train_step(batch, num_steps)
            if self.progress.num_skipped_in_a_row > self.config.train.max_skipped_steps:
                self.give_up()
            step = self.progress.step
            if evaluation_due(self.config.evaluate, step, num_steps):
                evaluated = self.evaluate()
            ended = self.progress.is_over(num_steps, patience)
            stopping = stopping or not evaluated or ended
            due = saving.every_steps > 0 and step % saving.every_steps == 0
            if stopping or due or (saving.keep_best and self.progress.best_step == step):
                self.save(self.progress)
                # A save may take minutes, in which a request came.
                stopping = stopping or self.world.any(self.stop_requested())
            if stopping:
                break
        self.watchdog.at(self.progress.step, "saving", limited=False)
        self.saver.wait()
        for line in self.totals.lines():
            self.world.log(line)
        return self.progress.is_over(num_steps, patience) and evaluated

    def batches(self) -> Iterator[StepBatch]:
        """The loader's remaining steps; the watchdog limits the wait for each of them."""
        steps = self.loader.steps(self.progress.step)
        while True:
            self.watchdog.at(self.progress.step + 1, "waiting for data")
            began = time.perf_counter()
            batch = next(steps, None)
            if batch is None:
                return
            self.wait_seconds = time.perf_counter() - began
            self.stragglers.waited(self.wait_seconds)
            yield batch

    def train_step(self, batch: StepBatch, num_steps: int) -> bool:
        """Make one update; return whether any rank was asked to stop."""
        began = time.perf_counter()
        alpha = noise_alpha(self.config.noise, batch.step, num_steps)
        self.noise.step, self.noise.alpha = batch.step, alpha
        # A model's own dropout draws from torch's generator. Seeded by step, it drops the same
        # activations in a resumed run as in an uninterrupted one.
        torch.manual_seed(dropout_seed(self.config.train.seed, batch.step, self.world.rank))
        loss_sum = self.accumulate_gradients(batch)
        self.watchdog.at(batch.step + 1, "updating")
        rate = learning_rate(self.config.optim, batch.step, num_steps)
        grad_norm = self.engine.step(rate)
        self.check_effects(batch)
        self.watchdog.at(batch.step + 1, "gathering results")
        ranks = self.world.gather_fields(self.rank_result(loss_sum, batch.step))
        self.stragglers.compare(
            [rank.probe_seconds for rank in ranks], [rank.data_wait_share for rank in ranks]
        )
        if any(rank.save_failed for rank in ranks):
            self.saver.wait()  # raises on all ranks
        updated = math.isfinite(grad_norm)
        self.progress = self.progress.after(batch, updated)
        record = step_record(
            self.config,
            self.size,
            self.world,
            batch,
            ranks,
            alpha=alpha,
            learning_rate=rate,
            grad_norm=grad_norm,
            seconds=time.perf_counter() - began,
            num_skipped_steps=self.progress.num_skipped_steps,
        )
        if updated:
            self.last_update = self.progress
        else:
            self.warn_of_skip(batch, record)
        self.totals.add(record)
        self.recorder.step(record)
        return any(rank.stop_requested for rank in ranks)

    def accumulate_gradients(self, batch: StepBatch) -> Tensor:
        """Run this rank's forwards and backwards; return its sum of token losses (float64)."""
        signs = noise_signs(self.config.noise)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.world.device)
        forwards = [(micro_batch, sign) for micro_batch in batch.micro_batches for sign in signs]
        for i, (micro_batch, self.noise.sign) in enumerate(forwards):
            self.watchdog.at(batch.step + 1, f"forward and backward {i + 1} of {len(forwards)}")
            micro_batch = micro_batch.to(self.world.device)
            self.noise.describe(token_layout(micro_batch))
            loss = self.engine.forward(micro_batch) / len(signs)
            # Exactly 1, but NaN where the loss is not finite: an infinite loss may have a finite
            # gradient, and the gradient's norm alone decides whether the step counts.
            one = 1 + 0 * loss.detach()
            share = loss * one / batch.num_supervised_tokens
            self.engine.backward(share, i == len(forwards) - 1)
            loss_sum += loss.detach()
        return loss_sum

    def check_effects(self, batch: StepBatch) -> None:
        """Raise `RuntimeError` where a forward pass of the step got no noise, and `UserError` where
        `model.compile` compiled nothing; report blocks that it compiled in pieces."""
        num_forwards = len(batch.micro_batches) * num_passes(self.config.noise)
        if self.config.noise.alpha and self.noise.num_fired != num_forwards:
            raise RuntimeError(
                f"Step {batch.step + 1}: the noise was added in {self.noise.num_fired} of "
                f"{num_forwards} forward passes; the model bypasses its input embedding. Nothing "
                "was saved of this step."
            )
        if self.config.model.compile:
            for line in check_compiled(self.graph_breaks):
                self.world.log(line)

    def rank_result(self, loss_sum: Tensor, step: int) -> RankResult:
        """This rank's contribution to the step's record. Waits for the device."""
        norm_sum, num_noised = self.noise.take_noise_norms()
        probe_seconds, data_wait_share = self.stragglers.measure(step)
        return RankResult(
            loss_sum=float(loss_sum),
            noise_norm_sum=float(norm_sum),
            num_noised_documents=float(num_noised),
            stop_requested=self.stop_requested(),
            save_failed=self.saver.failed,
            memory_gib=memory_gib(self.world.device),
            data_wait_seconds=self.wait_seconds,
            probe_seconds=probe_seconds,
            data_wait_share=data_wait_share,
        )

    def warn_of_skip(self, batch: StepBatch, record: Mapping[str, Any]) -> None:
        """Name the step that changed nothing, and the documents in it."""
        documents, _ = self.loader.sampler.documents(batch.step)
        self.world.log(
            f"warning: step {record['step']} was skipped, no weight has changed: "
            f"loss {record['loss']}, gradient norm {record['grad_norm']}; its documents, as the "
            f"training set counts them from 0: {', '.join(map(str, sorted(documents.tolist())))}"
        )

    def evaluate(self) -> bool:
        """Record sample answers and the held-out loss, where they are asked for. False, and no
        record, where a stop was requested meanwhile."""
        step, engine = self.progress.step, self.engine
        rows: list[dict[str, Any]] | None = []
        result: dict[str, Any] | None = {}
        engine.train(False)
        if self.samples:
            rows = self.samples.answer(engine, step, self.evaluating)
        if self.held_out and rows is not None:
            result = self.held_out.evaluate(engine, self.evaluating)
        engine.train(True)
        if rows is None or result is None:
            return False
        if rows:
            self.recorder.samples(rows)
        if not result:
            return True
        # Last, because a run that is resumed asks whether this record is there.
        self.recorder.evaluation({"step": step, **result})
        updated = self.last_update is self.progress
        self.progress = self.progress.evaluated(result["held_out_loss"])
        if updated:
            self.last_update = self.progress
        return True

    def evaluating(self) -> bool:
        """Whether this rank was asked to stop. Called before each batch of an evaluation, so that
        the watchdog limits the batch and not the evaluation."""
        self.watchdog.at(self.progress.step, "evaluating")
        return self.stop_requested()

    def save(self, progress: Progress) -> None:
        """Save a checkpoint of the engine's state as that of `progress`."""
        # Saving has its own limit, checkpoint.timeout_minutes.
        self.watchdog.at(self.progress.step, "saving", limited=False)
        best_step = progress.best_step if self.config.checkpoint.keep_best else None
        self.saver.save(progress.step, self.engine, self.trainer_state(progress), best_step)
        self.saved_step = progress.step
        seconds = self.saver.seconds_waited
        self.world.log(f"checkpoint: step {self.saved_step}; training stood still {seconds:.2f} s")

    def give_up(self) -> NoReturn:
        """End a run that no longer learns. The checkpoint is that of the last update: once their
        cause is fixed, the skipped steps are made again."""
        if self.last_update.step > self.saved_step:
            self.save(self.last_update)
        self.saver.wait()
        step, skipped = self.progress.step, self.progress.num_skipped_in_a_row
        first, most = step - skipped + 1, self.config.train.max_skipped_steps
        kept = (
            f"The checkpoint of step {self.saved_step} holds all training before"
            if self.saved_step
            else "Nothing had been trained before"
        )
        raise Diverged(
            f"Steps {first} to {step} had no finite loss and gradient and were skipped: more in a "
            f"row than train.max_skipped_steps={most}. {kept}; lower optim.learning_rate, with "
            "checkpoint.accept_changes=optim.learning_rate, or look at the data of these steps."
        )


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of torch's generators at a step, below 2^63, different on every rank."""
    return random.Random(f"{seed}/{step}/{rank}").getrandbits(63)

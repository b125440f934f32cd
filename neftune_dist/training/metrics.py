"""A run's metrics: metrics.jsonl, evaluations.jsonl, samples.jsonl, trackers, a progress bar.

Rank 0 alone writes them. A resumed run first drops the records beyond its checkpoint, so that the
files read as if the run had never stopped. A number that is not finite is written as null, as JSON
has no other word for it. To add a metric: a field of `RankResult` if ranks measure it, and a line
of `step_record`.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from neftune_dist.config import Config, LoggingConfig, UserError
from neftune_dist.data.loader import StepBatch
from neftune_dist.distributed.outcome import removed
from neftune_dist.distributed.world import World
from neftune_dist.model.flops import ModelSize, measured_flops, peak_flops
from neftune_dist.model.optimizations import num_compiled_graphs
from neftune_dist.noise.law import expected_norm
from neftune_dist.system import storage
from neftune_dist.system.records import EVALUATIONS, SAMPLES, STEPS, read_records
from neftune_dist.system.text import duration_text
from neftune_dist.training.noise import num_passes
from neftune_dist.training.trackers import Trackers


@dataclass(frozen=True)
class RankResult:
    """What one rank contributes to a step's record; gathered over all ranks after each step.

    Attributes:
        loss_sum: of its supervised tokens.
        noise_norm_sum: over its documents, of the L2 norm of the noise added to them.
        num_noised_documents: that the sum counts.
        stop_requested: whether this rank was asked to stop.
        save_failed: whether its save in flight has failed.
        memory_gib: its peak so far.
        data_wait_seconds: that it waited for this step's batch.
        probe_seconds, data_wait_share: see `Stragglers.measure`.
    """

    loss_sum: float
    noise_norm_sum: float
    num_noised_documents: float
    stop_requested: bool
    save_failed: bool
    memory_gib: float
    data_wait_seconds: float
    probe_seconds: float
    data_wait_share: float


def step_record(
    config: Config,
    size: ModelSize,
    world: World,
    batch: StepBatch,
    ranks: Sequence[RankResult],
    *,
    alpha: float,
    learning_rate: float,
    grad_norm: float,
    seconds: float,
    num_skipped_steps: int,
) -> dict[str, Any]:
    """Return a step's line of metrics.jsonl.

    Args:
        ranks: the results of all ranks.
        alpha: strength of the step's noise.
        grad_norm: before clipping.
        seconds: that the step took.
        num_skipped_steps: since the run began, this step included.
    """
    noised = sum(rank.num_noised_documents for rank in ranks)
    norm_sum = sum(rank.noise_norm_sum for rank in ranks)
    return {
        "step": batch.step + 1,
        "loss": sum(rank.loss_sum for rank in ranks) / batch.num_supervised_tokens,
        "learning_rate": learning_rate,
        "grad_norm": grad_norm,
        "num_documents": batch.num_documents,
        "num_tokens": batch.num_tokens,
        "num_supervised_tokens": batch.num_supervised_tokens,
        "padding_fraction": 1 - batch.num_tokens / batch.num_computed_tokens,
        "noise_norm": norm_sum / noised if noised else 0.0,
        "noise_law": expected_norm(alpha, config.noise.distribution),
        "num_skipped_steps": num_skipped_steps,
        "num_compiled_graphs": num_compiled_graphs(),
        "step_seconds": seconds,
        "tokens_per_second": batch.num_tokens / seconds,
        **_utilization(config, size, world, batch, seconds),
        "data_wait_seconds": max(rank.data_wait_seconds for rank in ranks),
        "memory_gib": max(rank.memory_gib for rank in ranks),
        "world_size": world.size,
    }


def _utilization(
    config: Config, size: ModelSize, world: World, batch: StepBatch, seconds: float
) -> dict[str, float | None]:
    """MFU by both conventions of `flops`, of a CPU's measured rate; None on unknown GPUs."""
    if world.device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(world.device), config.model.dtype)
    else:
        peak = measured_flops(config.model.dtype)
    if not peak:
        return {"mfu": None, "mfu_6n": None}
    # Per FLOP of one pass over the step's tokens.
    share = num_passes(config.noise) / (seconds * peak * world.size)
    flops = size.training_flops(batch.num_tokens, batch.sum_squared_lengths)
    return {"mfu": flops * share, "mfu_6n": size.six_n_flops(batch.num_tokens) * share}


class Totals:
    """Sums over the steps of this process, of the slowest rank."""

    def __init__(self) -> None:
        self._waited = self._seconds = self._tokens = 0.0
        self._at_peak = {"mfu": 0.0, "mfu_6n": 0.0}  # seconds at the device's peak rate

    def add(self, record: Mapping[str, Any]) -> None:
        """Count a step, see `step_record`."""
        self._waited += record["data_wait_seconds"]
        self._seconds += record["step_seconds"]
        self._tokens += record["num_tokens"]
        for name in self._at_peak:
            self._at_peak[name] += (record[name] or 0.0) * record["step_seconds"]

    def lines(self) -> list[str]:
        """Lines for the end of a run; none without a step."""
        total = self._waited + self._seconds
        if not total:
            return []
        speed = f"speed: {self._tokens / total:.0f} tokens/s"
        if self._at_peak["mfu"]:
            mfu, six_n = (seconds / total for seconds in self._at_peak.values())
            speed += f", {mfu:.1%} of the device's rate of matrix products (MFU; {six_n:.1%} by 6N)"
        waited = f"data: training waited for its batches {self._waited / total:.2%} of the time"
        return [speed, waited]


class Recorder:
    """Records steps and evaluations.

    Args:
        facts: configuration and environment, for the trackers.
        first_step: the last step made so far; 0 at a run's start.
        active: False on ranks other than 0: nothing is written.
        expected: the files in which this run has recorded something up to `first_step`.
        samples: whether sample prompts are answered.
    """

    def __init__(
        self,
        run_dir: Path,
        config: LoggingConfig,
        facts: Mapping[str, Any],
        first_step: int,
        num_steps: int,
        active: bool,
        expected: Collection[str] = (),
        samples: bool = False,
    ) -> None:
        self.active = active
        if not active:
            return
        try:
            # From the start a run evaluates at step 0 again; resumed, it does not.
            _keep_until(run_dir, first_step if first_step else -1, expected)
            names = (STEPS, EVALUATIONS, *([SAMPLES] if samples else []))
            self._files = {name: (run_dir / name).open("a") for name in names}
            self._trackers = Trackers(run_dir, config, facts, first_step)
        except OSError as error:
            where = error.filename or f"run_dir={run_dir}"
            raise UserError(f"{where} cannot be written: {error.strerror or error}.") from error
        # Without a terminal a bar would be one endless line: plain lines instead.
        self._plain = config.progress and not sys.stderr.isatty()
        self._bar = (
            tqdm(total=num_steps, initial=first_step, unit="step", dynamic_ncols=True)
            if config.progress and not self._plain
            else None
        )
        self._num_steps = num_steps
        self._run_dir = run_dir
        self._num_lost = 0
        self._seconds = 0.0
        self._recorded = 0

    def step(self, record: Mapping[str, Any]) -> None:
        """Record a step, see `step_record`."""
        if not self.active:
            return
        self._record(STEPS, record)
        self._seconds += record["step_seconds"]
        self._recorded += 1
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"loss {record['loss']:.4f}, {record['tokens_per_second']:.0f} tokens/s"
            )
            self._bar.update()
        elif self._plain:
            left = (self._num_steps - record["step"]) * self._seconds / self._recorded
            print(
                f"step {record['step']}/{self._num_steps}  loss {record['loss']:.4f}  "
                f"grad_norm {record['grad_norm']:.3f}  noise_norm {record['noise_norm']:.4f}  "
                f"{record['tokens_per_second']:.0f} tokens/s  {duration_text(left)} left",
                flush=True,
            )

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Record an evaluation: `step` and its results."""
        if not self.active:
            return
        self._record(EVALUATIONS, record)
        self._say(f"step {record['step']}: held-out loss {record['held_out_loss']:.4f} (noise off)")

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record the answers to all sample prompts after a step, see `SampleAnswers`."""
        if not self.active or not rows:
            return
        self._write(SAMPLES, rows)
        self._trackers.samples(rows)
        self._say(f"step {rows[0]['step']}: {len(rows)} sample answers, in {SAMPLES}")

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line)
        else:
            print(line, flush=True)

    def close(self, failed: bool = False) -> None:
        """Flush and close everything. Raises `UserError` where records could not be written."""
        if not self.active:
            return
        for file in self._files.values():
            with suppress(OSError):  # counted by `_write`
                file.close()
        self._trackers.close(failed)
        if self._bar is not None:
            self._bar.close()
        if self._num_lost:
            raise UserError(f"{self._num_lost} records could not be written to {self._run_dir}.")

    def _record(self, name: str, record: Mapping[str, Any]) -> None:
        record = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        self._write(name, [record])
        self._trackers.record(record)

    def _write(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        lines = [json.dumps(record) for record in records]
        try:
            if not os.fstat(self._files[name].fileno()).st_nlink:
                self._reopen(name)
            self._files[name].write("".join(f"{line}\n" for line in lines))
            self._files[name].flush()
        except OSError as error:
            # A full disk must not end the run on one rank alone: the next save ends it on all.
            if not self._num_lost:
                print(f"warning: {self._run_dir / name}: {error.strerror}", file=sys.stderr)
            self._num_lost += len(lines)

    def _reopen(self, name: str) -> None:
        """Create a file again that was removed. Raises `UserError` if its directory is gone."""
        self._files[name].close()
        try:
            self._files[name] = (self._run_dir / name).open("a")
        except FileNotFoundError as error:
            raise removed(self._run_dir) from error
        print(f"warning: {self._run_dir / name} was removed; it begins again", file=sys.stderr)


def is_evaluated(run_dir: Path, step: int, name: str = EVALUATIONS) -> bool:
    """Whether the evaluation after `step` is in the records, the last of which are those in
    `name`."""
    numbers = ("held_out_loss",) if name == EVALUATIONS else ()
    try:
        rows = read_records(run_dir / name, numbers).rows
    except OSError:
        return False
    return any(row["step"] == step for row in rows)


def memory_gib(device: torch.device) -> float:
    """Peak memory so far: allocated on a GPU, or resident on the host of a CPU run."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30


def _keep_until(run_dir: Path, step: int, expected: Collection[str]) -> None:
    """Keep one record of each step up to `step`, and warn of lost ones."""
    began_here = False  # False for a run that began from another run's checkpoint
    for name in (STEPS, EVALUATIONS, SAMPLES):
        path = run_dir / name
        exists = path.exists()
        found = read_records(path)
        kept = [row for row in found.rows if row["step"] <= step]
        missing = found.num_missing(step) if name == STEPS else 0
        # A run that began here has a record of step 0, which is evaluated.
        certain = name == STEPS or began_here or not exists
        lost: int | str = max(found.num_lost, missing)
        if not kept and certain and name in expected:
            lost = "all"
        if lost:
            print(f"warning: {path} is damaged: {lost} of its records are lost", file=sys.stderr)
        began_here = bool(kept) and kept[0]["step"] == 1
        if exists:
            storage.write(path, "".join(json.dumps(row) + "\n" for row in kept))

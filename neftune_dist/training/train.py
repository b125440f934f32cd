"""Composition root of training: from a configuration to a finished run.

Order that must not change: noise before sharding; weights or checkpoint before the first batch is
drawn; publish after every rank has finished writing.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from neftune_dist.checkpoint import flat, resume, store
from neftune_dist.checkpoint.merged import keep_small_files, keep_template, keep_vocabulary
from neftune_dist.checkpoint.run_files import seal
from neftune_dist.checkpoint.saver import Saver
from neftune_dist.config import Config, UserError, user_path
from neftune_dist.data.dataset import Dataset, prepare
from neftune_dist.data.loader import Loader
from neftune_dist.data.sampler import Sampler, make_sampler
from neftune_dist.distributed import outcome
from neftune_dist.distributed.outcome import EXIT_DONE, EXIT_STOPPED
from neftune_dist.distributed.straggler import Stragglers
from neftune_dist.distributed.watchdog import Watchdog
from neftune_dist.distributed.world import Stopped, StopSignal, World
from neftune_dist.engine.base import MASTER, Engine
from neftune_dist.model import load
from neftune_dist.model.families import check_lengths
from neftune_dist.model.flops import ModelSize, model_size
from neftune_dist.model.ulysses import share_sequences
from neftune_dist.optim import MakeOptimizer
from neftune_dist.system import storage
from neftune_dist.system.records import EVALUATIONS, STEPS
from neftune_dist.training.held_out import HeldOut
from neftune_dist.training.loop import Progress, Trainer, evaluation_due
from neftune_dist.training.metrics import Recorder, is_evaluated
from neftune_dist.training.noise import attach_noise
from neftune_dist.training.startup_report import (
    compute_line,
    data_lines,
    dropout_lines,
    environment,
    noise_lines,
    versions,
)

_MARK = "neftune_run.json"  # in a run's directory
# What a run replaces in its directory.
_REPLACED = ("config.yaml", "model", STEPS, EVALUATIONS)
_AT_ONCE_SECONDS = 1.0
# An attempt that is dying, its memory to be freed and its files to be closed, holds its run
# directory for as long as this.
_CLAIM_SECONDS = 30.0


def train(config: Config) -> int:
    """Run `config` to its end; the exit code. Call it on every rank. Raises `UserError`."""
    stop = StopSignal()
    world = World(stop)
    try:
        return _train(config, world, stop)
    except Stopped:
        world.tell_stopped()
        world.log("stopped; nothing had to be saved; the same command continues")
        return EXIT_STOPPED
    finally:
        world.close()
        stop.ignore()


@dataclass(frozen=True)
class _Prepared:
    """All that is known before anything is sharded."""

    folder: Path
    dataset: Dataset
    sampler: Sampler
    model: Any  # on the meta device
    size: ModelSize
    identity: dict[str, Any]
    found: store.Checkpoint | None
    progress: Progress
    evaluation_due: bool  # before the first step to be made
    weights: load.Weights | None  # None where a checkpoint holds all
    changes: list[str]  # of settings since the checkpoint

    def recorded(self, config: Config) -> Collection[str]:
        """The files in which this run, if it goes on, has recorded something."""
        if self.found is None or config.checkpoint.resume != "auto":
            return ()
        return (STEPS, EVALUATIONS) if len(self.dataset.held_out) else (STEPS,)

    def lines(self, config: Config) -> list[str]:
        """What is trained, with which noise, and from where it goes on."""
        lines = [f"model: {config.model.name_or_path}, {self.size.in_words()}"]
        lines += [*noise_lines(config), *dropout_lines(self.model)]
        if self.found:
            steps = f"step {self.found.step} of {self.sampler.num_steps}"
            lines += [
                f"resume: {each}" for each in (f"{self.found.folder}, {steps}", *self.changes)
            ]
        return lines


def _train(config: Config, world: World, stop: StopSignal) -> int:
    run_dir = user_path(config.run_dir, "run_dir")
    lock = _claim(run_dir, world)
    with stop.at_once():
        ready = _prepare(config, run_dir, world)
    num_steps = ready.sampler.num_steps
    with world.agree():
        sharing = world.share(config.engine.sequence_parallel)
        share_sequences(sharing.group, ready.model.config)
    loader = Loader(
        ready.dataset.train,
        ready.sampler,
        config,
        sharing.data_rank,
        sharing.data_size,
        ready.size.quadratic_tokens,
        world.device,
        sharing.part,
    )
    for line in data_lines(ready.dataset, ready.sampler, loader):
        world.log(line)
    if ready.progress.step >= num_steps and not ready.evaluation_due:
        world.log(f"done: {run_dir} has all {num_steps} steps; nothing is left to train")
        return EXIT_DONE
    world.stop_together()
    with world.agree():
        noise = attach_noise(config, ready.model, sharing.data_rank, sharing.group)
        engine = make_engine(config, world)
    engine.setup(ready.model, MakeOptimizer(config.optim, config.train.seed))
    world.stop_together()
    with world.agree():
        _fill(engine, ready, stop)
    ready = replace(ready, weights=None)  # and with them the files' pages
    world.stop_together()
    engine.after_load(ready.progress.num_updates)
    windowed = bool(getattr(ready.model.config.get_text_config(), "sliding_window", None))
    compute = compute_line(engine, config, windowed)
    for line in [*engine.describe(), compute, *ready.lines(config)]:
        world.log(line)
    with world.agree():
        recorder = Recorder(
            run_dir,
            config.logging,
            {"config": config.to_dict(), "environment": environment(world)},
            ready.progress.step,
            num_steps,
            world.is_first,
            ready.recorded(config),
        )
    world.raise_collective_timeout(config.train.hang_minutes)
    saver = Saver(run_dir, config.checkpoint, world)
    held_out = HeldOut(ready.dataset.held_out, config, world, sharing, ready.size.quadratic_tokens)
    stragglers = Stragglers(world)
    with world.agree():
        watchdog = Watchdog(world, outcome.folder_of_run(run_dir), config.train.hang_minutes)
    trainer = Trainer(
        config=config,
        world=world,
        engine=engine,
        noise=noise,
        loader=loader,
        recorder=recorder,
        size=ready.size,
        held_out=held_out if len(ready.dataset.held_out) else None,
        saver=saver,
        watchdog=watchdog,
        stragglers=stragglers,
        trainer_state=lambda now: _trainer_state(now, config, engine, ready, world),
        stop_requested=stop,
        progress=ready.progress,
        evaluation_due=ready.evaluation_due,
    )
    try:
        finished = trainer.run()
    except BaseException as error:
        watchdog.close()
        saver.abandon()
        with suppress(UserError):  # the first failure is the one to tell
            recorder.close(failed=not isinstance(error, Stopped))
        raise
    watchdog.close()
    with world.agree():
        recorder.close()
    lock.release()
    if finished:
        world.log(f"done: {num_steps} steps; checkpoint in {run_dir / 'checkpoints'}")
        return EXIT_DONE
    step = trainer.progress.step
    world.log(f"stopped at step {step}, saved; the same command continues from there")
    return EXIT_STOPPED


def _prepare(config: Config, run_dir: Path, world: World) -> _Prepared:
    """Find, tokenise, build and check; nothing in the run directory changes before all fits."""
    folder = world.local_rank_zero_first(lambda: load.find(config.model))
    tokenizer = world.local_rank_zero_first(lambda: load.load_tokenizer(folder, config.model))
    dataset = world.local_rank_zero_first(lambda: prepare(config.data, tokenizer, world.log))
    found = resume.find(run_dir, config, world)
    adapted = config.adapter.method != "none"
    with world.agree():
        sampler = make_sampler(config.train, len(dataset.train), dataset.content)
        model = load.build(folder, config.model, config.data.packing, config.adapter)
        check_vocabulary(model, tokenizer)
        check_lengths(model.config, dataset.report.longest_tokens)
        identity = {
            **dataset.identity,
            "data": dataset.content,
            "architecture": load.architecture(model.config),
        }
        weights = None
        if not found or adapted:
            weights = load.open_weights(model, folder, config.model, config.train.seed)
        digest = weights.digest((world.rank, world.size)) if weights and adapted else 0
    if adapted:
        identity["base"] = _of_all(digest, world)
    progress = Progress()
    changes: list[str] = []
    with world.agree():
        if found:
            state = found.trainer_state()
            changes = resume.check_same_run(found, state, identity, config)
            progress = Progress(**state["progress"])
    due = evaluation_due(config.evaluate, progress.step, sampler.num_steps)
    due = due and len(dataset.held_out) > 0
    if due and found:  # then only where a stop cut that evaluation short
        recorded = world.is_first and is_evaluated(run_dir, progress.step)
        due = not world.from_first("recorded" if recorded else "")
    with world.agree():
        if world.is_first:
            try:
                storage.write(run_dir / "config.yaml", config.to_yaml())
                keep_small_files(folder, run_dir)
                if config.model.add_tokens:
                    keep_vocabulary(tokenizer, model.config.vocab_size, run_dir)
                if config.data.template != "chat" or config.data.system_prompt is not None:
                    keep_template(dataset.chat_template, run_dir)
                seal(run_dir)
            except OSError as error:
                raise _unwritable(run_dir, error) from error
    return _Prepared(
        folder,
        dataset,
        sampler,
        model,
        model_size(model),
        identity,
        found,
        progress,
        due,
        weights,
        changes,
    )


def _of_all(digest: int, world: World) -> str:
    """The exclusive or of all ranks' digests of 128 bits."""
    words = [float(digest >> shift & 0xFFFFFFFF) for shift in (96, 64, 32, 0)]
    columns = zip(*world.gather(words), strict=True)
    return "".join(f"{functools.reduce(operator.xor, map(int, each)):08x}" for each in columns)


def _fill(engine: Engine, ready: _Prepared, stop: StopSignal) -> None:
    """Weights, and moments where there are any, into this rank's shards: just their ranges. Left
    unfinished where a stop is asked for."""
    shards = engine.frozen_state()
    if ready.found:
        flat.Reader(ready.found.folder).read(engine.flat_state())
    else:
        shards += [shard for shard in engine.flat_state() if shard.kind == MASTER]
    for shard in shards:
        if not stop():
            assert ready.weights is not None and isinstance(shard.tensor, Tensor)
            end = shard.start + shard.tensor.numel()
            shard.tensor.copy_(ready.weights.read(shard.name, shard.start, end))


def _trainer_state(
    now: Progress, config: Config, engine: Engine, ready: _Prepared, world: World
) -> dict[str, Any]:
    return {
        "progress": vars(now),
        "num_steps": ready.sampler.num_steps,
        "identity": ready.identity,
        "shapes": {name: list(shape) for name, shape in engine.shapes.items()},
        "config": config.to_dict(),
        "world_size": world.size,
        "versions": versions(),
    }


def _claim(run_dir: Path, world: World) -> FileLock:
    """Make the run directory, and make it this run's own until the process ends."""
    lock = FileLock(run_dir / ".lock")
    with world.agree():
        if world.is_first:
            # A checkpoint says that it is a run's, too: of an earlier version, or copied there.
            names = () if store.find_all(run_dir) else _REPLACED
            storage.claim(run_dir, names, _MARK, f"run_dir={run_dir}")
            try:
                try:
                    lock.acquire(timeout=_AT_ONCE_SECONDS)
                except Timeout:
                    world.log(f"run_dir={run_dir} is in use; waiting up to {_CLAIM_SECONDS:.0f} s")
                    lock.acquire(timeout=_CLAIM_SECONDS)
            except Timeout:
                raise UserError(
                    f"run_dir={run_dir} is in use by another run: wait for its end, or set another "
                    "run_dir."
                ) from None
            except OSError as error:
                raise _unwritable(run_dir, error) from error
    return lock


def _unwritable(run_dir: Path, error: OSError) -> UserError:
    return UserError(f"run_dir={run_dir} cannot be written: {error.strerror or error}.")


def make_engine(config: Config, world: World) -> Engine:
    """The engine that `engine.name` chooses, before its set-up."""
    # Imported here alone: the engine that was not chosen need not be importable.
    if config.engine.name == "single":
        from neftune_dist.engine.single import SingleDeviceEngine

        return SingleDeviceEngine(config, world)
    if config.engine.name == "fsdp2":
        from neftune_dist.engine.fsdp2 import FSDP2Engine

        return FSDP2Engine(config, world)
    from neftune_dist.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(config, world)


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Raise `UserError` where the tokenizer has tokens that the model cannot embed."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"The tokenizer has {len(tokenizer)} tokens, the model's embedding {rows} rows: they "
            "do not belong together."
        )

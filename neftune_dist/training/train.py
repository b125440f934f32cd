"""Composition root of training: from a configuration to a finished run.

Order that must not change: noise before sharding; weights or checkpoint before the first batch is
drawn; publish after every rank has finished writing.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from neftune_dist.checkpoint import flat, resume, store
from neftune_dist.checkpoint.run_files import claim
from neftune_dist.checkpoint.saver import Saver
from neftune_dist.config import Config, UserError, check_packages, user_path
from neftune_dist.data.loader import BatchLayout, Loader
from neftune_dist.distributed import outcome
from neftune_dist.distributed.outcome import EXIT_DONE, EXIT_STOPPED
from neftune_dist.distributed.signals import Stopped, StopSignal
from neftune_dist.distributed.straggler import Stragglers
from neftune_dist.distributed.watchdog import Watchdog
from neftune_dist.distributed.world import Sharing, World, run_among_ranks
from neftune_dist.engine import make_engine
from neftune_dist.engine.base import MASTER, Engine
from neftune_dist.model.load import fill_buffers
from neftune_dist.model.precision import fast_dtype, with_dtype
from neftune_dist.model.ulysses import share_sequences
from neftune_dist.noise.handle import NEFTuneHandle
from neftune_dist.optim.adamw import MakeOptimizer
from neftune_dist.training.held_out import HeldOut
from neftune_dist.training.inputs import Inputs, read_inputs
from neftune_dist.training.loop import Progress, Trainer
from neftune_dist.training.metrics import Recorder
from neftune_dist.training.noise import attach_noise
from neftune_dist.training.profiling import StepProfiler
from neftune_dist.training.samples import SampleAnswers
from neftune_dist.training.startup_report import (
    compute_line,
    data_lines,
    device_name,
    environment,
    versions,
)
from neftune_dist.training.trackers import check_stores


def train(config: Config, stop: StopSignal) -> int:
    """Run `config` to its end, or to a request to stop; return the exit code. Call it on every
    rank. Raises `UserError`."""
    said = "stopped; nothing had to be saved; the same command continues"
    return run_among_ranks(partial(_train, config), said, stop)


def _train(config: Config, world: World, stop: StopSignal) -> int:
    with world.agree():
        check_packages(config)
    run_dir = user_path(config.run_dir, "run_dir")
    with claim(run_dir, world):
        with world.agree():
            if world.is_first:  # a tracker that does not answer is refused before anything is read
                check_stores(run_dir, config.logging)
        return _train_in(run_dir, config, world, stop)


def _train_in(run_dir: Path, config: Config, world: World, stop: StopSignal) -> int:
    """Train in a run directory that this process holds; return the exit code."""
    with stop.at_once():
        inputs = _read(config, run_dir, world)
    config = inputs.config
    num_steps = inputs.sampler.num_steps
    with world.agree():
        sharing = world.share(config.engine.sequence_parallel)
        share_sequences(sharing.group, inputs.model.config)
    layout = _batch_layout(config, inputs, sharing, world)
    loader, held_out = Loader(inputs.dataset.train, inputs.sampler, layout), inputs.dataset.held_out
    for line in data_lines(inputs.dataset, inputs.sampler, loader):
        world.log(line)
    is_over = inputs.progress.is_over(num_steps, config.train.patience)
    if is_over and not inputs.evaluation_due:
        world.log(f"done: {_end(inputs.progress, num_steps)}; nothing is left to train")
        return EXIT_DONE
    engine, noise = _make_engine(config, inputs, sharing, world, stop)
    inputs = replace(inputs, weights=None)  # frees the pages of the mapped files
    world.stop_together()
    engine.after_load(inputs.progress.num_updates)
    for line in [*engine.describe(), compute_line(engine, config), *inputs.lines()]:
        world.log(line)
    with world.agree():
        recorder = Recorder(
            run_dir,
            config.logging,
            {"config": config.to_dict(), "environment": environment(world)},
            inputs.progress.step,
            num_steps,
            world.is_first,
            inputs.recorded(),
            samples=inputs.prompts is not None,
        )
    world.raise_collective_timeout(config.train.hang_minutes)
    saver = Saver(run_dir, config.checkpoint, world)
    with world.agree():
        watchdog = Watchdog(world, outcome.folder_of_run(run_dir), config.train.hang_minutes)
    trainer = Trainer(
        config=config,
        world=world,
        engine=engine,
        noise=noise,
        loader=loader,
        recorder=recorder,
        size=inputs.size,
        held_out=HeldOut(held_out, layout, world) if len(held_out) else None,
        samples=SampleAnswers(inputs.prompts, config, world) if inputs.prompts else None,
        saver=saver,
        watchdog=watchdog,
        stragglers=Stragglers(world),
        profiler=StepProfiler(run_dir, config.train.profile_steps, world),
        trainer_state=lambda now: _trainer_state(now, config, engine, inputs, world),
        stop_requested=stop,
        progress=inputs.progress,
        evaluation_due=inputs.evaluation_due,
    )
    if _run(trainer):
        end = _end(trainer.progress, num_steps)
        world.log(f"done: {end}; checkpoint in {run_dir / 'checkpoints'}")
        return EXIT_DONE
    step = trainer.progress.step
    world.log(f"stopped at step {step}, saved; the same command continues from there")
    return EXIT_STOPPED


def _read(config: Config, run_dir: Path, world: World) -> Inputs:
    if config.model.attention == "flex" and world.device.type == "cpu":
        raise UserError(
            "model.attention=flex trains on GPUs alone (FlexAttention has no backward on a CPU): "
            "set varlen.",
            shared=True,
        )
    found = resume.find(run_dir, config, world)
    inputs = read_inputs(_with_dtype(config, found, world), run_dir, found, world)
    if (
        inputs.weights
        and "towers" not in inputs.identity
        and (line := inputs.weights.files.left_out())
    ):
        world.log(line)
    return inputs


def _with_dtype(config: Config, found: store.Checkpoint | None, world: World) -> Config:
    """The configuration with `model.dtype=auto` decided: once for a run, for all its ranks."""
    if config.model.dtype != "auto":
        return config
    with world.agree():
        saved = found.trainer_state()["config"]["model"]["dtype"] if found else None
    dtype = saved or world.from_first(fast_dtype(world.device))
    why = "as the checkpoint" if saved else f"the faster one on {device_name(world.device)}"
    world.log(f"model.dtype=auto: {dtype}, {why}")
    return with_dtype(config, dtype)


def _end(progress: Progress, num_steps: int) -> str:
    """How far a finished run has come, and where it was best."""
    if progress.step >= num_steps:
        return f"{progress.step} steps"
    return (
        f"ended at step {progress.step} of {num_steps}, after {progress.num_worse} evaluations "
        f"without a better held-out loss than {progress.best_loss:.4f} of step "
        f"{progress.best_step} (train.patience)"
    )


def _batch_layout(config: Config, inputs: Inputs, sharing: Sharing, world: World) -> BatchLayout:
    rank, world_size, part = sharing.data_rank, sharing.data_size, sharing.part
    quadratic_tokens = inputs.size.quadratic_tokens
    return BatchLayout(config, rank, world_size, quadratic_tokens, world.device, part)


def _make_engine(
    config: Config, inputs: Inputs, sharing: Sharing, world: World, stop: StopSignal
) -> tuple[Engine, NEFTuneHandle]:
    """The engine, its shards filled, and the noise, which is put on before sharding."""
    world.stop_together()
    with world.agree():
        noise = attach_noise(config, inputs.model, sharing.data_rank, sharing.group)
        engine = make_engine(config, world)
    engine.setup(inputs.model, MakeOptimizer(config.optim, config.train.seed))
    world.stop_together()
    with world.agree():
        _fill(engine, inputs, stop)
    return engine, noise


def _fill(engine: Engine, inputs: Inputs, stop: StopSignal) -> None:
    """Read this rank's ranges of weights and, from a checkpoint, moments into its shards. A stop
    leaves them unfinished."""
    shards = engine.frozen_state()
    if inputs.found:
        flat.Reader(inputs.found.folder).read(engine.flat_state())
    else:
        shards += [shard for shard in engine.flat_state() if shard.kind == MASTER]
    for shard in shards:
        if not stop():
            assert inputs.weights is not None and isinstance(shard.tensor, Tensor)
            end = shard.start + shard.tensor.numel()
            shard.tensor.copy_(inputs.weights.read(shard.name, shard.start, end))
    if inputs.weights is not None:
        fill_buffers(inputs.model, inputs.weights)


def _run(trainer: Trainer) -> bool:
    """Train, and close what watches and records; False where a stop was requested and saved."""
    try:
        finished = trainer.run()
    except BaseException as error:
        trainer.watchdog.close()
        trainer.saver.abandon()
        with suppress(UserError):  # the first failure is the one to report
            trainer.recorder.close(failed=not isinstance(error, Stopped))
        raise
    trainer.watchdog.close()
    with trainer.world.agree():
        trainer.profiler.close()
        trainer.recorder.close()
    return finished


def _trainer_state(
    now: Progress, config: Config, engine: Engine, inputs: Inputs, world: World
) -> dict[str, Any]:
    """What a checkpoint holds beside tensors."""
    return {
        "progress": vars(now),
        "num_steps": inputs.sampler.num_steps,
        "identity": inputs.identity,
        "shapes": {name: list(shape) for name, shape in engine.shapes.items()},
        "stored": inputs.stored,
        "config": config.to_dict(),
        "world_size": world.size,
        "versions": versions(),
        "device": device_name(world.device),
    }

"""Composition root of training: from a configuration to a finished run.

Order that must not change: noise before sharding; weights or checkpoint before the first batch is
drawn; publish after every rank has finished writing.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from neftune_dist import __version__
from neftune_dist.checkpoint import flat, store
from neftune_dist.config import Config, UserError, differences
from neftune_dist.data.corpus import Corpus, prepare
from neftune_dist.data.loader import Loader
from neftune_dist.data.schedule import Schedule, make_schedule
from neftune_dist.distributed import Stopped, StopSignal, World
from neftune_dist.engine.base import MASTER, Engine
from neftune_dist.evaluate.held_out import HeldOut
from neftune_dist.export import keep_small_files
from neftune_dist.loop import Progress, Trainer
from neftune_dist.metrics import Recorder
from neftune_dist.model import load
from neftune_dist.model.flops import ModelSize, model_size
from neftune_dist.noise.hook import NEFTune
from neftune_dist.optim import MakeOptimizer

EXIT_DONE, EXIT_STOPPED = 0, 75

# What a resumed run may change: where and how it runs, how long, how it reports.
_MAY_CHANGE = (
    "run_dir",
    "model.name_or_path",  # the architecture's digest is compared instead
    "model.revision",
    "model.attention",
    "model.activation_checkpointing",
    "model.trust_remote_code",
    "data.source",  # the data's fingerprint is compared instead
    "data.packing",
    "data.cache_dir",
    "data.max_bad_fraction",
    "engine.",
    "train.max_steps",
    "train.num_epochs",
    "train.micro_batch_tokens",
    "checkpoint.",
    "logging.",
    "evaluate.",
)


def train(config: Config) -> int:
    """Run `config` to its end; the exit code. Call it on every rank. Raises `UserError`."""
    stop = StopSignal()
    world = World(stop)
    try:
        return _train(config, world, stop)
    except Stopped:
        return EXIT_STOPPED
    finally:
        world.close()


def _train(config: Config, world: World, stop: StopSignal) -> int:
    run_dir = Path(config.run_dir).expanduser()
    lock = _claim(run_dir, config, world)
    folder = world.in_turn(lambda: load.find(config.model))
    tokenizer = world.in_turn(lambda: load.load_tokenizer(folder, config.model))
    with world.agree():
        if world.is_first:
            keep_small_files(folder, run_dir)
    corpus = world.in_turn(lambda: prepare(config.data, tokenizer, world.log))
    with world.agree():
        schedule = make_schedule(config.train, len(corpus.train), corpus.fingerprint)
        model = load.build(folder, config.model, config.data.packing)
        _check_vocabulary(model, tokenizer)
        size = model_size(model)
        identity = {
            "data_fingerprint": corpus.fingerprint,
            "architecture": load.architecture_digest(model.config),
        }
        found = _find_checkpoint(run_dir, config, world)
        state = found.trainer_state() if found else None
        if state and found:
            _check_same_run(found, state, identity, config)
    progress = Progress(**state["progress"]) if state else Progress()
    loader = Loader(corpus.train, schedule, config, world.rank, world.size, size.quadratic_tokens)
    _report(corpus, schedule, loader, world)
    if progress.step >= schedule.num_steps:
        world.log(f"done: {run_dir} has all {schedule.num_steps} steps; nothing is left to train")
        return EXIT_DONE
    if stop():
        return EXIT_STOPPED

    weights_prefix = model.base_model_prefix
    aliases = load.parameter_aliases(model)
    noise = NEFTune(
        config.noise.alpha, seed=config.noise_seed, stream=config.noise.stream, rank=world.rank
    ).attach(model)
    with world.agree():
        engine = _make_engine(config, world)
    engine.setup(model, MakeOptimizer(config.optim))
    with world.agree():
        if found:
            flat.read(found.folder, engine.flat_state())
        else:
            weights = load.WeightFiles(folder, aliases, engine.shapes, weights_prefix)
            for shard in engine.flat_state():
                if shard.kind == MASTER:
                    stop_at = shard.start + shard.tensor.numel()
                    shard.tensor.copy_(weights.read(shard.name, shard.start, stop_at))
    engine.loaded(progress.step)
    for line in [*engine.describe(), *_run_lines(config, size, schedule, found)]:
        world.log(line)

    with world.agree():
        recorder = Recorder(
            run_dir, config.logging, progress.step, schedule.num_steps, world.is_first
        )

    def save(now: Progress) -> None:
        extra = {
            "progress": vars(now),
            "identity": identity,
            "model_folder": str(folder.resolve()),
            "shapes": {name: list(shape) for name, shape in engine.shapes.items()},
            "tied": {name: names for name, names in aliases.items() if len(names) > 1},
            "config": config.to_dict(),
            "world_size": world.size,
            "versions": _versions(),
        }
        store.save(run_dir, now.step, engine, extra, world, config.checkpoint.keep)

    trainer = Trainer(
        config=config,
        world=world,
        engine=engine,
        noise=noise,
        loader=loader,
        recorder=recorder,
        size=size,
        held_out=HeldOut(corpus.held_out, config, world, size.quadratic_tokens)
        if len(corpus.held_out)
        else None,
        save=save,
        stop_requested=stop,
        progress=progress,
    )
    try:
        finished = trainer.run()
    finally:
        recorder.close()
        lock.release()
    if finished:
        world.log(f"done: {schedule.num_steps} steps; checkpoint in {run_dir / 'checkpoints'}")
        return EXIT_DONE
    world.log(f"stopped at step {progress.step}, saved; the same command continues from there")
    return EXIT_STOPPED


def _claim(run_dir: Path, config: Config, world: World) -> FileLock:
    """Make the run directory this run's own, and write the resolved configuration into it."""
    lock = FileLock(run_dir / ".lock", timeout=10)
    with world.agree():
        if world.is_first:
            try:
                run_dir.mkdir(parents=True, exist_ok=True)
                lock.acquire()
                (run_dir / "config.yaml").write_text(config.to_yaml())
            except Timeout:
                raise UserError(f"run_dir={run_dir} is in use by another run.") from None
            except OSError as error:
                raise UserError(
                    f"run_dir={run_dir} cannot be written: {error.strerror or error}."
                ) from error
    return lock


def _make_engine(config: Config, world: World) -> Engine:
    # Imported here alone: the engine that was not chosen need not be importable.
    if config.engine.name == "fsdp2":
        from neftune_dist.engine.fsdp2 import FSDP2Engine

        return FSDP2Engine(config, world)
    from neftune_dist.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(config, world)


def _find_checkpoint(run_dir: Path, config: Config, world: World) -> store.Checkpoint | None:
    resume = config.checkpoint.resume
    found = store.find_all(run_dir)
    if resume == "auto":
        for folder in store.damaged(run_dir):
            world.log(f"warning: {folder} is incomplete or damaged and is passed over")
        if not found and store.damaged(run_dir):
            raise UserError(
                f"{run_dir} holds damaged checkpoints only: mend or remove them, or set another "
                "run_dir."
            )
        return found[0] if found else None
    if found:
        raise UserError(
            f"checkpoint.resume={resume}, but {run_dir} holds the checkpoint "
            f"{found[0].folder.name}: set another run_dir, or checkpoint.resume=auto."
        )
    return None if resume == "never" else store.open_checkpoint(Path(resume).expanduser())


def _check_same_run(
    found: store.Checkpoint, state: Mapping[str, Any], identity: Mapping[str, str], config: Config
) -> None:
    for key, what in (("architecture", "another model"), ("data_fingerprint", "other data")):
        if state["identity"][key] != identity[key]:
            raise UserError(
                f"The checkpoint {found.folder} is of {what} than this run: set another run_dir, "
                "or restore the configuration that made it."
            )
    changed = [
        key
        for key in differences(state["config"], config.to_dict())
        if not key.startswith(_MAY_CHANGE)
    ]
    if changed:
        raise UserError(
            f"The checkpoint {found.folder} was made with other settings of {', '.join(changed)}: "
            "restore them, or set another run_dir."
        )


def _check_vocabulary(model: Any, tokenizer: Any) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"The tokenizer has {len(tokenizer)} tokens, the model's embedding {rows} rows: they "
            "do not belong together."
        )


def _report(corpus: Corpus, schedule: Schedule, loader: Loader, world: World) -> None:
    for line in corpus.report.lines():
        world.log(line)
    first = loader.step(0)
    steps_per_epoch = schedule.num_documents / schedule.global_batch_size
    world.log(
        f"data: {schedule.num_steps} steps of {schedule.global_batch_size} documents, "
        f"{steps_per_epoch:.2f} steps an epoch; step 1: {len(first.micro_batches)} micro-batches "
        f"a rank, {1 - first.num_tokens / first.num_computed_tokens:.1%} padding"
    )


def _run_lines(
    config: Config, size: ModelSize, schedule: Schedule, found: store.Checkpoint | None
) -> list[str]:
    noise = config.noise
    lines = [
        f"model: {config.model.name_or_path}, {size.num_parameters / 1e6:.1f} M parameters",
        f"noise: alpha {noise.alpha}, {noise.distribution}, {noise.stream} stream, "
        f"seed {config.noise_seed}"
        if noise.alpha
        else "noise: off",
    ]
    if found:
        lines.append(f"resume: {found.folder}, step {found.step} of {schedule.num_steps}")
    return lines


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "deepspeed", "datasets")
    return {
        "neftune_dist": __version__,
        "python": platform.python_version(),
        "cuda": str(torch.version.cuda),
        **{name: version(name) for name in packages},
    }

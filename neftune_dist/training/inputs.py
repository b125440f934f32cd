"""A run's inputs: all that is found, read and checked before anything is sharded."""

from __future__ import annotations

import functools
import operator
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neftune_dist.checkpoint import resume, store
from neftune_dist.checkpoint.run_files import write_run_files
from neftune_dist.config import Config, UserError
from neftune_dist.data.dataset import Dataset, prepare
from neftune_dist.data.sampler import ORDER, Sampler, make_sampler
from neftune_dist.distributed.world import World
from neftune_dist.engine.automatic import choose_engine
from neftune_dist.model import load, locate
from neftune_dist.model.families import check_lengths
from neftune_dist.model.flops import ModelSize, model_size
from neftune_dist.model.stored_tensors import to_record
from neftune_dist.system.records import EVALUATIONS, SAMPLES, STEPS
from neftune_dist.system.text import count_text
from neftune_dist.training import samples
from neftune_dist.training.held_out import evaluation_due
from neftune_dist.training.loop import Progress
from neftune_dist.training.metrics import is_evaluated
from neftune_dist.training.startup_report import dropout_lines, noise_lines, warmup_lines


@dataclass(frozen=True)
class Inputs:
    """What a run starts from.

    Attributes:
        config: the run's, with nothing left to decide.
        dataset, sampler: the documents, and which of them form each step.
        model: on the meta device.
        size: of the model, for FLOPs.
        identity: data, their order, tokenizer and architecture (with adapters also the frozen
            weights, with a wrapper its towers), which a checkpoint must share to be resumed.
        stored: how the base's files name and cut the parameters, for an export.
        found: the checkpoint to resume from; None: the run begins.
        progress: how far the run has come.
        evaluation_due: whether to evaluate before the next step.
        weights: the base model's files; None where a checkpoint holds all that is needed.
        prompts: to answer while training; None: none.
        changes: settings that differ from the checkpoint's.
    """

    config: Config
    dataset: Dataset
    sampler: Sampler
    model: Any
    size: ModelSize
    identity: dict[str, Any]
    stored: dict[str, Any]
    found: store.Checkpoint | None
    progress: Progress
    evaluation_due: bool
    weights: load.Weights | None
    prompts: samples.Prompts | None
    changes: list[str]

    def recorded(self) -> Collection[str]:
        """The files in which this run, if it is resumed, has recorded something."""
        if self.found is None or self.config.checkpoint.resume != "auto":
            return ()
        return (STEPS, EVALUATIONS) if len(self.dataset.held_out) else (STEPS,)

    def lines(self) -> list[str]:
        """Lines for the start of a run: model, noise, and from where it continues."""
        lines = [f"model: {self.config.model.name_or_path}, {self.size.in_words()}"]
        if "towers" in self.identity:
            lines[0] += ": a wrapper's text model; the towers stay as they are in the base's files"
        lines += [*noise_lines(self.config), *dropout_lines(self.model)]
        lines += warmup_lines(self.config, self.sampler.num_steps)
        if self.found:
            where = f"{self.found.folder}, step {self.found.step} of {self.sampler.num_steps}"
            lines += [f"resume: {line}" for line in (where, *self.changes)]
        return lines


def read_inputs(
    config: Config, run_dir: Path, found: store.Checkpoint | None, world: World
) -> Inputs:
    """Find, tokenise, build and check; then write the run's files beside its checkpoints.

    `model.dtype` of `config` is decided; its `engine` is decided here, by the model's size.

    Nothing in the run directory changes before every check has passed.
    """
    folder = world.local_rank_zero_first(lambda: locate.find(config.model))
    tokenizer = world.local_rank_zero_first(lambda: load.load_tokenizer(folder, config.model))
    dataset = world.local_rank_zero_first(lambda: prepare(config.data, tokenizer, world.log))
    with world.agree():
        sampler = make_sampler(config.train, len(dataset.train), dataset.content)
        model = load.build(folder, config.model, config.data.packing, config.adapter)
        check_vocabulary(model, tokenizer)
        check_lengths(model.config, dataset.report.longest_tokens)
        prompts = samples.read(config, folder, tokenizer, model.config)
        identity = {
            **dataset.identity,
            "data": dataset.content,
            "order": ORDER,
            "architecture": load.architecture(model.config),
        }
        # What is not trained is in no checkpoint.
        needs_base, weights = load.holds_constants(model), None
        if not found or needs_base:
            weights = load.open_weights(model, folder, config.model, config.train.seed)
        stored = to_record(weights.files.export_layout()) if weights else {}
        part, digests = (world.rank, world.size), {}
        if weights and needs_base:
            digests["base"] = weights.files.digest(part)
        if towers := load.open_towers(model, folder, config.model):
            digests["towers"] = towers.digest_others(part)
    identity |= {kind: _xor_over_ranks(digest, world) for kind, digest in digests.items()}
    config = _with_engine(config, model, world)
    progress = Progress()
    changes: list[str] = []
    with world.agree():
        if found:
            state = found.trainer_state()
            changes = resume.check_same_run(found, state, identity, config)
            progress = _progress(state, config, sampler.num_steps)
            stored = state.get("stored", {})
    due = evaluation_due(config.evaluate, progress.step, sampler.num_steps)
    due = due and (len(dataset.held_out) > 0 or prompts is not None)
    if due and found:  # then only where a stop cut that evaluation short
        last = EVALUATIONS if len(dataset.held_out) else SAMPLES
        recorded = world.is_first and is_evaluated(run_dir, progress.step, last)
        due = not world.from_first("recorded" if recorded else "")
    with world.agree():
        if world.is_first:
            template, ends = dataset.chat_template, dataset.end_tokens
            write_run_files(run_dir, config, folder, tokenizer, model.config, template, ends)
    return Inputs(
        config=config,
        dataset=dataset,
        sampler=sampler,
        model=model,
        size=model_size(model),
        identity=identity,
        stored=stored,
        found=found,
        progress=progress,
        evaluation_due=due,
        weights=weights,
        prompts=prompts,
        changes=changes,
    )


def _progress(state: dict[str, Any], config: Config, num_steps: int) -> Progress:
    """That of a checkpoint. Raises `UserError` where it leaves nothing to train to another run,
    whose directory would get no checkpoint."""
    progress, patience = Progress(**state["progress"]), config.train.patience
    if config.checkpoint.resume != "auto" and progress.is_over(num_steps, patience):
        raise UserError(
            f"checkpoint.resume={config.checkpoint.resume} leaves nothing to train: it is of step "
            f"{progress.step}, and this run has {count_text(num_steps, 'step')} and "
            f"train.patience={patience}: "
            "set a larger train.max_steps or train.num_epochs."
        )
    return progress


def _with_engine(config: Config, model: Any, world: World) -> Config:
    """The configuration with each `auto` of `engine` decided, alike on all ranks."""
    config, lines = choose_engine(config, model, world.device_bytes(), world.size)
    for line in lines:
        world.log(line)
    return config


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Raise `UserError` where the tokenizer has tokens that the model cannot embed."""
    rows = model.get_input_embeddings().weight.shape[0]
    if (needed := load.num_token_ids(tokenizer)) > rows:
        raise UserError(
            f"The tokenizer has token ids up to {needed - 1}, the model's embedding {rows} rows: "
            "they do not belong together."
        )


def _xor_over_ranks(digest: int, world: World) -> str:
    """The exclusive or of all ranks' digests of 128 bits, in hexadecimal."""
    # Words of 32 bits, which float64 holds exactly.
    words = [float(digest >> shift & 0xFFFFFFFF) for shift in (96, 64, 32, 0)]
    columns = zip(*world.gather(words), strict=True)
    return "".join(f"{functools.reduce(operator.xor, map(int, column)):08x}" for column in columns)

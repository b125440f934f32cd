"""Needs of a run, before any GPU is touched: memory per rank, steps, disk, work, time.

Memory is that of the real step, simulated on tensors without content (`simulate`). The printed
report names the two assumptions: a margin for memory that torch's allocator does not count, and the
share of the hardware's rate at which the time is estimated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from neftune_dist.config import Config, UserError, check_packages, check_world_size
from neftune_dist.data.dataset import Dataset, prepare
from neftune_dist.data.sampler import Sampler, make_sampler
from neftune_dist.engine.automatic import choose_engine
from neftune_dist.model import load, locate
from neftune_dist.model.families import check_lengths
from neftune_dist.model.flops import ModelSize, known_gpus, model_size, peak_flops
from neftune_dist.model.precision import with_dtype
from neftune_dist.planning.batches import fullest, heaviest, sampled_steps
from neftune_dist.planning.memory import Peak
from neftune_dist.planning.simulate import simulate, simulated_settings
from neftune_dist.planning.suggestions import suggest_changes, suggest_faster
from neftune_dist.system.checkpoint_names import bytes_per_parameter
from neftune_dist.system.text import duration_text, size_text
from neftune_dist.training.inputs import check_vocabulary
from neftune_dist.training.noise import num_passes

GIB = 2**30
USUAL_GIB = 80  # memory of a GPU where none is named
# Beyond the peak of allocated bytes: the CUDA context, NCCL's buffers, and fragments that the
# caching allocator cannot use. Not yet measured on a GPU.
MARGIN_GIB, MARGIN_SHARE = 2.0, 0.05


@dataclass(frozen=True)
class PlanInput:
    """A run to plan, read once.

    Attributes:
        folder: the model's directory.
        model: on the meta device.
        size: its parameters and FLOPs.
        dataset: None if the data is not read.
        sampler: None if the data is not read.
        device_bytes: memory of each rank's GPU.
    """

    folder: Path
    model: Any
    size: ModelSize
    dataset: Dataset | None = None
    sampler: Sampler | None = None
    device_bytes: int = USUAL_GIB * GIB

    def with_engine(self, config: Config, world_size: int) -> tuple[Config, list[str]]:
        """`config` with each `auto` of `engine` decided, and a line for each."""
        decided = with_dtype(config, "bf16")
        return choose_engine(decided, self.model, self.device_bytes, world_size)

    def peak(self, config: Config, world_size: int) -> Peak:
        """Return a rank's peak under `config`, whose memory settings may differ from the run's."""
        if self.dataset is None or self.sampler is None:
            batches = fullest(config)
        else:
            batches = heaviest(self.dataset.train, self.sampler, config, world_size, self.model)
        batches = [batch for batch in batches for _ in range(num_passes(config.noise))]
        config, _ = self.with_engine(config, world_size)
        return simulate(config, self.folder, world_size, batches)


def read(
    config: Config, with_data: bool = True, log: Callable[[str], None] = lambda _: None
) -> PlanInput:
    """Find and build the model, tokenise the data.

    Args:
        config: of the run.
        with_data: False: the data is not read.
        log: called with lines of progress.

    Raises:
        UserError: where a run would raise it.
    """
    folder = locate.find(config.model, weights=False)
    model = load.build(
        folder, simulated_settings(config).model, config.data.packing, config.adapter
    )
    if not with_data:
        check_lengths(model.config, config.data.max_length)
        return PlanInput(folder, model, model_size(model))
    tokenizer = load.load_tokenizer(folder, config.model)
    check_vocabulary(model, tokenizer)
    dataset = prepare(config.data, tokenizer, log)
    check_lengths(model.config, dataset.report.longest_tokens)
    sampler = make_sampler(config.train, len(dataset.train), dataset.content)
    return PlanInput(folder, model, model_size(model), dataset, sampler)


def plan(
    config: Config,
    world_size: int,
    *,
    gpu: str | None = None,
    mfu: float = 0.4,
    with_data: bool = True,
    verbose: bool = False,
    log: Callable[[str], None] = print,
) -> None:
    """Validate and resolve `config` and log its needs on `world_size` ranks.

    Args:
        config: of the run.
        world_size: its ranks.
        gpu: name of each rank's GPU, one of `known_gpus`.
        mfu: share of the GPU's rate at which the time is estimated.
        with_data: False: the data is not read, and micro-batches are assumed to be full.
        verbose: log the whole resolved configuration first.
        log: called with the lines of the report.

    Raises:
        UserError: a mistake in `config`, an unknown GPU, or a run that does not fit on it.
    """
    gpus = known_gpus()
    gpu = next((name for name in gpus if name.lower() == (gpu or "").lower()), gpu)
    if gpu is not None and gpu not in gpus:
        raise UserError(f"--gpu={gpu} is not known; known: {', '.join(gpus)}.")
    check_world_size(config, world_size)
    check_packages(config)
    for line in config.to_yaml().splitlines() if verbose else []:
        log(f"  {line}")
    given = replace(
        read(config, with_data, log), device_bytes=(gpus[gpu] if gpu else USUAL_GIB) * GIB
    )
    log(f"model: {given.size.in_words()}, {given.size.num_layers} layers")
    decided, lines = given.with_engine(config, world_size)
    for line in lines:
        log(line)
    flops = None
    if given.dataset is not None and given.sampler is not None:
        flops = _log_work(given.dataset, given.sampler, given.size, config, log)
    disk = given.size.num_trained * bytes_per_parameter(config.optim)
    kept = f"{config.checkpoint.keep or 'all'} of them kept, one more while it is written"
    log(f"disk: {size_text(disk)} a checkpoint, {kept}")
    peak = given.peak(config, world_size)
    for line in _memory_lines(config, peak, world_size, given.sampler):
        log(line)
    log(f"GPUs: time on {world_size}, at an assumed {mfu:.0%} of the data-sheet rate")
    for name in [gpu] if gpu else gpus:
        fits = "fits" if needed(peak) <= gpus[name] * GIB else "does not fit"
        rate = peak_flops(name, with_dtype(config, "bf16").model.dtype)
        time = duration_text(flops / (mfu * rate * world_size)) if flops and rate else "-"
        log(f"  {name:<10}{gpus[name]:5} GiB  {fits:<13}{time:>11}")
    if gpu is None:
        return
    most_bytes = (gpus[gpu] - MARGIN_GIB) * GIB / (1 + MARGIN_SHARE)
    if peak.num_bytes <= most_bytes:
        if faster := suggest_faster(decided, world_size, most_bytes, given.peak):
            words, more = faster
            log(f"fewer exchanges: {words} fits, too, with {needed(more) / GIB:.1f} GiB")
    else:
        suggestion = suggest_changes(config, world_size, peak, most_bytes, given.peak, log)
        raise UserError(
            f"The run needs {needed(peak) / GIB:.1f} GiB for {_ranks(world_size)}, and "
            f"{gpu} has {gpus[gpu]}: "
            + (f"append {suggestion}." if suggestion else "no change that plan tries makes it fit.")
        )


def needed(peak: Peak) -> float:
    """Return the bytes that a device needs for the peak and for what torch does not count."""
    return peak.num_bytes * (1 + MARGIN_SHARE) + MARGIN_GIB * GIB


def _log_work(
    dataset: Dataset, sampler: Sampler, size: ModelSize, config: Config, log: Callable[[str], None]
) -> float:
    """Log the data and the work; return the run's FLOPs."""
    for line in dataset.report.lines():
        log(line)
    passes, epochs = num_passes(config.noise), sampler.total_documents / sampler.num_documents
    tokens = dataset.report.num_tokens * epochs
    squares = float(np.dot(dataset.train.lengths, dataset.train.lengths)) * epochs
    flops = passes * size.training_flops(round(tokens), round(squares))
    log(
        f"steps: {sampler.num_steps} of {sampler.global_batch_size} documents, about "
        f"{tokens / sampler.num_steps:.0f} tokens each; {tokens:.3g} tokens in all"
    )
    log(
        f"work: {flops:.3g} FLOPs (matrices, and causal attention within documents); by 6 N a "
        f"token {passes * size.six_n_flops(round(tokens)):.3g}"
    )
    return flops


def _memory_lines(
    config: Config, peak: Peak, world_size: int, sampler: Sampler | None
) -> Iterator[str]:
    if sampler is None:
        batches = "full micro-batches, every token supervised"
    else:
        seen, steps = len(sampled_steps(sampler)), sampler.num_steps
        of = f"{seen} of {steps} steps" if seen < steps else "all steps"
        batches = f"the heaviest micro-batches of {of}"
    yield f"memory: GiB of {_ranks(world_size)}, at the peak ({peak.moment}), {batches}"
    margins = (
        f"with {MARGIN_SHARE:.0%} for fragmentation and {MARGIN_GIB:.0f} GiB for CUDA and NCCL, "
        "not yet measured on a GPU"
    )
    rows = [(kind, amount, "") for kind, amount in peak.parts.items()]
    rows += [("peak", peak.num_bytes, ""), ("needed", round(needed(peak)), margins)]
    if peak.host_bytes:
        rows.append(("host", peak.host_bytes, "of the machine's memory, for each rank"))
    for kind, amount, remark in rows:
        yield f"  {kind:<12}{amount / GIB:9.2f}  {remark}".rstrip()
    left_out = [
        f"model.{name}={getattr(config.model, name)}".lower()
        for name, usual in (("compile", False), ("kernels", "torch"), ("float8", "none"))
        if getattr(config.model, name) != usual
    ]
    if left_out:
        yield f"memory: estimated without {', '.join(left_out)}"


def _ranks(world_size: int) -> str:
    return f"each of {world_size} ranks" if world_size > 1 else "the only rank"

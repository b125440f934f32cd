"""Checks and predictions of a run before it is queued: on a login node, at once, without torch.

Checks files, run directory, space and world size; predicts steps and time. A mistake is a
`UserError`; unknown quantities are called unknown, never guessed. Nothing is written.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from statistics import median
from typing import Any

from neftune_dist.cluster.submit import inventory
from neftune_dist.config import Config, UserError, check_world_size, user_path
from neftune_dist.data import files
from neftune_dist.data.sampler import num_steps
from neftune_dist.system.checkpoint_names import (
    MANIFEST,
    bytes_per_parameter,
    newest_step,
    run_claim,
)
from neftune_dist.system.records import STEPS, read_records
from neftune_dist.system.storage import check_claim, existing
from neftune_dist.system.text import duration_text, size_text

_RECENT_BYTES = 2**18  # of metrics.jsonl
_WORDS = (None, "", "auto", "never", "held_out")  # in the place of paths
_HUB_IDS = ("name_or_path", "source", "held_out_source")  # settings with an id or a path


@dataclass(frozen=True)
class Outlook:
    """Predictions for a run.

    Attributes:
        notes: lines for a person.
        num_bytes: that its checkpoints will take beside those there are; 0: not known.
        seconds: that the steps left will take; None: not known.
    """

    notes: tuple[str, ...]
    num_bytes: int
    seconds: float | None


def anchor(section: Any) -> None:
    """Make the paths of a configuration absolute: the job starts in another directory."""
    for value in vars(section).values():
        for part in value if isinstance(value, list) else [value]:
            if is_dataclass(part):
                anchor(part)
    for knob in fields(section):
        value = getattr(section, knob.name)
        if not knob.metadata.get("is_path") or value in _WORDS:
            continue
        is_id = knob.name in _HUB_IDS and not files.is_local(value)
        is_template = knob.name == "template" and not value.endswith(".jinja")
        if not is_id and not is_template:
            setattr(section, knob.name, os.path.abspath(user_path(value, knob.name)))


def preflight(config: Config, world_size: int) -> Outlook:
    """Check a run and predict its steps, disk and time.

    Args:
        config: its paths are absolute.
        world_size: ranks of the run.

    Raises:
        UserError: the job would fail.
    """
    run_dir = Path(config.run_dir)
    check_world_size(config, world_size)
    _check_run_dir(run_dir, config.checkpoint.resume)
    model, weights = inventory.find_model(config.model), config.model.weights
    folders = [folder for folder in (model, weights and Path(weights)) if folder]
    parameters = inventory.count_parameters(folders)
    rows = inventory.count_rows(config.data)
    steps, made = _num_steps(config, rows), newest_step(run_dir)
    left = None if steps is None else max(0, steps - made)
    seconds, time = _predict(run_dir, world_size, left)
    # Of an adapter's size, torch would have to be asked; it is small.
    whole = config.adapter.method == "none"
    checkpoint = (parameters or 0) * bytes_per_parameter(config.optim) if whole else 0
    number = _num_checkpoints(config, steps, made)
    disk = f"{number} x {size_text(checkpoint)} for checkpoints" if checkpoint else "not checked"
    size = f"{parameters / 1e6:.1f} M parameters" if parameters else "size not known from here"
    place = "" if model else ", which the job takes from the hub"
    about = "" if config.train.max_steps else "about "
    length = "not known before the data is read" if steps is None else f"{about}{steps}"
    notes = (
        f"model: {config.model.name_or_path}, {size}{place}",
        f"data: {_sources(config)}, {f'{rows} rows' if rows else 'rows not counted here'}",
        f"steps: {length}" + (f", {left or 'none'} of them left" if made and steps else ""),
        f"disk: {disk}",
        f"time: {time}",
    )
    return Outlook(notes, checkpoint * number, seconds)


def check_space(needs: Iterable[tuple[Path, int]]) -> None:
    """Refuse where new checkpoints of so many bytes do not fit where their run directories are."""
    disks: dict[int, list[tuple[Path, int]]] = {}
    for run_dir, num_bytes in needs:
        place = existing(run_dir)
        disks.setdefault(place.stat().st_dev, []).append((place, num_bytes))
    for runs in disks.values():
        place, needed = runs[0][0], sum(num_bytes for _, num_bytes in runs)
        free = shutil.disk_usage(place).free
        if needed > free:
            raise UserError(
                f"The checkpoints need {size_text(needed)}, and {size_text(free)} are free on the "
                f"disk of {place}: set a lower checkpoint.keep, or another run_dir."
            )


def _check_run_dir(run_dir: Path, resume: str) -> None:
    check_claim(*run_claim(run_dir))
    place = existing(run_dir)
    if not place.is_dir():
        raise UserError(f"run_dir={run_dir} cannot be made: {place} is no directory.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"run_dir={run_dir} cannot be written: {place} does not allow it.")
    if resume == "auto":
        return
    if newest_step(run_dir):
        raise UserError(
            f"checkpoint.resume={resume}, but {run_dir} holds checkpoints: set another run_dir, or "
            "checkpoint.resume=auto."
        )
    if resume != "never" and not (Path(resume) / MANIFEST).is_file():
        raise UserError(
            f"checkpoint.resume={resume} is no complete checkpoint directory (step_00000020)."
        )


def _num_steps(config: Config, rows: int | None) -> int | None:
    """Steps of a run in which every row becomes a document; None: unknown. Refuses too few rows."""
    train, data = config.train, config.data
    held_out = data.num_held_out
    if rows is None:
        return train.max_steps
    if data.held_out_fraction:
        held_out = max(1, round(rows * data.held_out_fraction))
    if rows - held_out < train.global_batch_size:
        raise UserError(
            f"data.source={_sources(config)} has {rows} rows, too few for one step of "
            f"train.global_batch_size={train.global_batch_size} beside "
            f"data.num_held_out={held_out}."
        )
    return num_steps(train, rows - held_out)


def _sources(config: Config) -> str:
    return " + ".join(source.source for source in config.data.sources.values())


def _num_checkpoints(config: Config, steps: int | None, made: int) -> int:
    """The most that will be there at one time, less those there are."""
    settings, total = config.checkpoint, steps or 0
    every, keep, for_good = settings.every_steps, settings.keep, settings.keep_every_steps
    if not keep:  # all stay: one every so many steps, and the last
        return max(1, math.ceil((total - made) / every)) if every else 1
    most = keep + 1  # the next is written before the oldest goes
    if for_good:
        most += max(0, total - keep * every) // for_good
    folders = (Path(config.run_dir) / "checkpoints").glob("step_*")
    return max(1, most - sum(path.name.removeprefix("step_").isdigit() for path in folders))


def _predict(run_dir: Path, world_size: int, left: int | None) -> tuple[float | None, str]:
    """Predict the seconds for the steps left, and describe the prediction."""
    measured = _step_seconds(run_dir / STEPS, world_size)
    if not measured:
        return None, f"not known before the run has recorded a step on {world_size} ranks"
    pace_seconds = median(measured)
    pace = f"{pace_seconds:.3g} s a step (median of {len(measured)} on {world_size} ranks)"
    if left is None:
        return None, pace
    seconds = pace_seconds * left
    return seconds, f"about {duration_text(seconds)} for the steps left, {pace}"


def _step_seconds(path: Path, world_size: int) -> Sequence[float]:
    """Seconds of the newest steps that were made on `world_size` ranks."""
    rows = read_records(path, ("world_size", "step_seconds"), _RECENT_BYTES).rows
    own = [row["step_seconds"] for row in rows if row["world_size"] == world_size]
    return [float(seconds) for seconds in own if seconds is not None]

"""The table of a run directory's checkpoints."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from neftune_dist.checkpoint import choice, flat, store
from neftune_dist.config import UserError
from neftune_dist.system.checkpoint_names import step_of
from neftune_dist.system.text import count_text, duration_text, size_text

# How torch alone reads a checkpoint, as `contents` prints it.
_READING = """import json, torch, torch.distributed.checkpoint as dcp
stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
state = {key: torch.empty(of.size, dtype=of.properties.dtype) for key, of in stored.items()}
dcp.load(state, checkpoint_id=folder)  # every tensor is flat; its shape:
shapes = json.load(open(f"{folder}/trainer_state.json"))["shapes"]"""
_MEANINGS = {
    "master": "weights in float32",
    "exp_avg": "Adam's first moments",
    "exp_avg_sq": "Adam's second moments",
}


class Row(NamedTuple):
    """A folder among a run's checkpoints, in words."""

    step: str
    size: str
    age: str
    state: str
    saved_by: str = ""
    continues: str = "nothing"

    @property
    def is_damaged(self) -> bool:
        """Whether it should be a checkpoint and is not what was written."""
        return self.state.startswith(store.DAMAGED)


_HEADS = Row("step", "size", "age", "state", "saved by", "continues")


def rows(run_dir: Path, *, verify: bool) -> list[Row]:
    """The rows of the verb `checkpoints`, one a folder, oldest first.

    Args:
        verify: also read every file and compare its checksum.

    Raises:
        UserError: no run directory.
    """
    if not (run_dir / "checkpoints").is_dir():
        raise UserError(f"{run_dir} holds no checkpoints.")
    found = []
    for path, fate, why in store.entries(run_dir):
        with suppress(FileNotFoundError):  # a run that continues has removed or renamed it
            if fate == store.COMPLETE:
                found.append(_complete_row(store.Checkpoint(path), verify))
            else:
                sizes = (part.stat().st_size for part in path.rglob("*") if part.is_file())
                found.append(_row(path, sum(sizes), f"{fate}{why}"))
    return found


def table(found: Sequence[Row]) -> list[str]:
    """The rows under their heads, in columns: a line each."""
    shown = [_HEADS, *found]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in shown]


def contents(run_dir: Path) -> list[str]:
    """Return lines that say what the newest complete checkpoint holds, and how torch alone reads
    it. Raises `UserError`."""
    newest = next((checkpoint.step for checkpoint in store.find_all(run_dir)), None)
    checkpoint = choice.choose(run_dir, newest)
    kinds: dict[str, list[int]] = {}
    for key, num_elements in flat.Reader(checkpoint.folder, alone=True).tensors.items():
        kinds.setdefault(key.partition("/")[0], []).append(num_elements)
    lines = [f"{checkpoint.folder} holds, in torch's distributed checkpoint format (DCP):"]
    for kind, sizes in kinds.items():
        meaning = f": {_MEANINGS[kind]}" if kind in _MEANINGS else ""
        lines.append(f"  {kind}/NAME  {len(sizes)} tensors, {sum(sizes):,} elements{meaning}")
    lines.append("NAME is the model's own. torch alone reads it:")
    reading = [f"folder = {str(checkpoint.folder)!r}", *_READING.splitlines()]
    return [*lines, *(f"  {line}" for line in reading)]


def _complete_row(checkpoint: store.Checkpoint, verify: bool) -> Row:
    size = 0
    try:
        size = sum(file.size for file in checkpoint.files().values())
        state = checkpoint.trainer_state()
        flaw = _flaw(checkpoint) if verify else None
    except UserError:
        flaw = "trainer_state.json cannot be read"
    if flaw:
        return _row(checkpoint.folder, size, f"{store.DAMAGED}{flaw}")
    engine = state["config"]["engine"]
    stage = f" stage {engine['zero_stage'] or 3}" if engine["name"] == "deepspeed" else ""
    left = state["num_steps"] - checkpoint.step
    return _row(
        checkpoint.folder,
        size,
        f"{store.COMPLETE}, verified" if verify else store.COMPLETE,
        f"{engine['name']}{stage}, {count_text(state['world_size'], 'rank')}",
        f"{count_text(left, 'step')} left of {state['num_steps']}, on any engine and world size",
    )


def _flaw(checkpoint: store.Checkpoint) -> str | None:
    """What is wrong with a checkpoint's bytes, or with the description of its tensors, which could
    have been changed together with the manifest."""
    if name := checkpoint.first_flaw():
        return f"{name} is not what was written"
    try:
        flat.Reader(checkpoint.folder, alone=True)
    except UserError as error:
        return str(error)
    return None


def _row(
    folder: Path, num_bytes: int, state: str, saved_by: str = "", continues: str = "nothing"
) -> Row:
    step = step_of(folder.with_name(folder.name.partition(".")[0]))
    age = duration_text(max(0.0, time.time() - folder.lstat().st_mtime))
    shown = "?" if step is None else str(step)
    return Row(shown, size_text(num_bytes), age, state, saved_by, continues)

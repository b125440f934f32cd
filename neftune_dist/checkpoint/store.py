"""Law 6: a checkpoint is complete or invisible.

Owns `RUN_DIR/checkpoints/`. A checkpoint is written to `step_N.partial`, its manifest last; then
one rename makes it `step_N`, and `latest` is replaced. So a crash at any instant leaves published
ones as they were, and what was half written carries another name, is never read, and is swept away
by the next save.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp

from neftune_dist.checkpoint import flat
from neftune_dist.config import UserError
from neftune_dist.distributed import World
from neftune_dist.engine.base import Engine

_STEP = re.compile(r"step_(\d{8,})")
_PARTIAL = ".partial"
_MANIFEST = "manifest.json"
_STATE = "trainer_state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint. step: updates made when it was saved."""

    folder: Path
    step: int

    def trainer_state(self) -> dict[str, Any]:
        """What was saved beside the tensors."""
        state: dict[str, Any] = json.loads((self.folder / _STATE).read_text())
        return state


def save(
    run_dir: Path, step: int, engine: Engine, state: Mapping[str, Any], world: World, keep: int
) -> None:
    """Save and publish a checkpoint, then prune; a collective of all ranks.

    Args:
        step: updates made so far.
        state: JSON-able, the same on every rank.
        keep: newest complete checkpoints to keep; 0 keeps all.

    Raises:
        UserError: it could not be written (a full disk). What was published before is unharmed.
    """
    root = run_dir / "checkpoints"
    final = root / f"step_{step:08d}"
    partial = final.with_name(final.name + _PARTIAL)
    with world.agree():
        if world.is_first:
            with _explained(final):
                for leftover in root.glob(f"step_*{_PARTIAL}"):
                    shutil.rmtree(leftover)
                partial.mkdir(parents=True)
    with world.agree():
        try:
            flat.write(partial, engine.flat_state() if engine.saves else [])
        except dcp.CheckpointException as error:
            reasons = {str(failure[0]) for failure in error.failures.values()}
            raise UserError(
                f"The checkpoint {final} could not be written: {'; '.join(sorted(reasons))}."
            ) from error
    with world.agree():
        if world.is_first:
            with _explained(final):
                _write_durably(partial / _STATE, json.dumps({"step": step, **state}, indent=1))
                sizes = {p.name: p.stat().st_size for p in sorted(partial.iterdir())}
                _write_durably(partial / _MANIFEST, json.dumps({"step": step, "files": sizes}))
                _sync_folder(partial)
                _make_room(final)
                partial.rename(final)
                _sync_folder(root)
                _write_durably(root / "latest.new", final.name + "\n")
                os.replace(root / "latest.new", root / "latest")
                _sync_folder(root)
                _prune(run_dir, keep)


def find_all(run_dir: Path) -> list[Checkpoint]:
    """Complete checkpoints, newest first. Damaged ones are passed over."""
    found = []
    for folder in (run_dir / "checkpoints").glob("step_*"):
        match = _STEP.fullmatch(folder.name)
        if match and is_complete(folder):
            found.append(Checkpoint(folder, int(match[1])))
    return sorted(found, key=lambda c: -c.step)


def is_complete(folder: Path) -> bool:
    """Whether the manifest is there and every file has the size that it says."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        return all(
            (folder / name).stat().st_size == size for name, size in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


def damaged(run_dir: Path) -> list[Path]:
    """Folders that bear a published checkpoint's name, yet are not complete."""
    return [
        folder
        for folder in sorted((run_dir / "checkpoints").glob("step_*"))
        if _STEP.fullmatch(folder.name) and not is_complete(folder)
    ]


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at a path that the user named. Raises `UserError`."""
    match = _STEP.fullmatch(path.name)
    if not match or not path.is_dir():
        raise UserError(f"checkpoint.resume={path} is no checkpoint directory (step_00000020).")
    if not is_complete(path):
        raise UserError(f"The checkpoint {path} is incomplete or damaged; it is not used.")
    return Checkpoint(path, int(match[1]))


class _explained:
    """Turns a failed file operation into a `UserError` that names the checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            raise UserError(
                f"The checkpoint {self.folder} could not be written: {error.strerror or error}."
            ) from error


def _make_room(final: Path) -> None:
    """A checkpoint of this name that was passed over as damaged is put aside, not destroyed."""
    if final.exists():
        aside = final.with_name(final.name + ".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)


def _prune(run_dir: Path, keep: int) -> None:
    if not keep:
        return
    for old in find_all(run_dir)[keep:]:
        # Renamed first, so that a crash while deleting leaves nothing that looks published.
        doomed = old.folder.with_name(old.folder.name + _PARTIAL)
        old.folder.rename(doomed)
        shutil.rmtree(doomed)


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

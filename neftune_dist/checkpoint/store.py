"""Law 6: a checkpoint is complete or invisible.

Owns `RUN_DIR/checkpoints/`. A checkpoint is written to `step_N.partial`, its manifest last; then
one rename makes it `step_N`, and `latest` is replaced. So a crash at any instant leaves published
ones as they were, and what was half written carries another name, is never read, and is swept away
by the next save. The manifest's sizes and checksums are those of the bytes that each rank meant to
write, not of what one node sees of a shared file system.

Removed is what saves have made, and nothing else: of a link, the link alone; a folder that holds
anything that no save wrote is kept, and so is whatever else lies there under a name like ours.
Saves go on all the same, and `odd_entries` names it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import xxhash

from neftune_dist.checkpoint.flat import WrittenFile
from neftune_dist.config import CheckpointConfig, UserError, checksummed, read_json
from neftune_dist.distributed.outcome import removed
from neftune_dist.system import storage

_STEP = re.compile(r"step_(\d{8,})")
_PARTIAL = ".partial"
_DAMAGED = ".damaged"
# What crashes while saving or pruning leave, and what is put aside.
_LEFT = re.compile(r"step_\d{8,}\.(partial|damaged)(-\d+)?")
# The files of saves, finished or not; the last are an NFS client's, of files still open.
_FILES = re.compile(
    r"__\d+_\d+\.distcp|\.?metadata.*|manifest\.json|trainer_state\.json|\..*\.new|.*\.tmp|\.nfs.*"
)
_MANIFEST = "manifest.json"
_STATE = "trainer_state.json"
_MANIFEST_FORM = {"step": int, "files": {str: WrittenFile}}
# A node may see another's new folder on a shared file system as late as this.
_VISIBLE_SECONDS = 60.0


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint. step: updates made when it was saved."""

    folder: Path
    step: int

    def trainer_state(self) -> dict[str, Any]:
        """What was saved beside the tensors. Raises `UserError` where that is not what it holds."""
        path = self.folder / _STATE
        try:
            sound = WrittenFile.of(path) == self.files().get(_STATE)
        except OSError:
            sound = False
        if not sound:
            raise damage_error(self, _STATE)
        state: dict[str, Any] = read_json(path)
        return state

    def files(self) -> dict[str, WrittenFile]:
        """What the manifest says of its files, by name. Raises `UserError` where it is damaged."""
        try:
            manifest = read_json(self.folder / _MANIFEST, _MANIFEST_FORM)
        except UserError as error:
            raise damage_error(self, _MANIFEST) from error
        if manifest["step"] != _step(self.folder):
            raise damage_error(self, _MANIFEST)
        return dict(sorted(manifest["files"].items()))

    def num_bytes(self) -> int:
        """On disk."""
        return sum(file.size for file in self.files().values())

    def first_flaw(self, part: int = 0, num_parts: int = 1) -> str | None:
        """The first file whose bytes are not those that were written, of every `num_parts`-th from
        `part` on; None: all are. Reads them whole."""
        for name, file in list(self.files().items())[part::num_parts]:
            try:
                if WrittenFile.of(self.folder / name) != file:
                    return name
            except OSError:
                return name
        return None


def begin(run_dir: Path, step: int) -> Path:
    """The folder to write into, empty; what earlier crashes left is swept away. Rank 0 alone."""
    if not run_dir.is_dir():
        raise removed(run_dir)
    root = run_dir / "checkpoints"
    partial = root / f"step_{step:08d}{_PARTIAL}"
    with explained(partial):
        for leftover in root.glob(f"step_*{_PARTIAL}"):
            if _is_of_saves(leftover):
                storage.remove(leftover)
        _clear(partial, partial.name)
        partial.mkdir(parents=True)
    return partial


def publish(
    partial: Path, state: str, files: Mapping[str, WrittenFile], settings: CheckpointConfig
) -> None:
    """Make what all ranks have written a checkpoint, then prune, which fails nothing. Rank 0 alone.

    Args:
        state: of the trainer, JSON.
        files: of all ranks, by name.

    Raises:
        UserError: it could not be written. What was published before is unharmed.
    """
    root, final = partial.parent, partial.with_suffix("")
    step = int(final.name.removeprefix("step_"))
    with explained(final):
        content = state.encode()
        storage.write(partial / _STATE, content, durable=True)
        checksum = xxhash.xxh3_128(content).hexdigest()
        all_files = {**files, _STATE: WrittenFile(len(content), checksum)}
        manifest = {"step": step, "files": {name: vars(f) for name, f in all_files.items()}}
        storage.write(
            partial / _MANIFEST, json.dumps(checksummed(manifest), indent=1), durable=True
        )
        _clear(final, final.name + _DAMAGED)
        partial.rename(final)
        storage.sync(root)
        storage.write(root / "latest", f"{final.name}\n", durable=True)
    try:
        _prune(root, step, settings)
        for path, why in odd_entries(root.parent):
            _warn_once(f"{path} is passed over: {why}.")
    except OSError as error:  # the checkpoint is there, and the next save tries again
        where = error.filename or root
        _warn_once(f"an old checkpoint was not removed: {where}: {error.strerror or error}.")


def find_all(run_dir: Path) -> list[Checkpoint]:
    """Complete checkpoints, newest first, by their manifests' sizes."""
    return _complete(run_dir / "checkpoints")


def choose(run_dir: Path, step: int | None) -> Checkpoint:
    """The complete checkpoint of that step; None: the newest. Raises `UserError` where there is
    none, or where a damaged one is newer: an older model must not pass for the newest."""
    found = find_all(run_dir)
    broken = damaged_folders(run_dir)
    if not found:
        flaws = "".join(f"; {folder.name} is damaged: {flaw}" for folder, flaw in broken)
        raise UserError(f"{run_dir} holds no complete checkpoint{flaws}.")
    if step is None:
        for folder, flaw in reversed(broken):
            if (_step(folder) or 0) > found[0].step:
                raise UserError(
                    f"The newest checkpoint {folder} is damaged: {flaw}. Choose the one before it "
                    f"with --step {found[0].step}, or let the same train command go on from it."
                )
        return found[0]
    for checkpoint in found:
        if checkpoint.step == step:
            return checkpoint
    steps = ", ".join(str(c.step) for c in found)
    raise UserError(f"{run_dir} has no complete checkpoint of step {step}; it has: {steps}.")


def damage_error(checkpoint: Checkpoint, flaw: str) -> UserError:
    """For a checkpoint whose `first_flaw` is that file: it is damaged, or no longer there."""
    if not checkpoint.folder.is_dir():
        return UserError(
            f"The checkpoint {checkpoint.folder} was removed while it was read: a run that goes on "
            "removes those before its newest (checkpoint.keep). The same command takes the newest."
        )
    return UserError(
        f"The checkpoint {checkpoint.folder} is damaged: {flaw} is not what was written. "
        "Choose another with --step."
    )


def damaged_folders(run_dir: Path) -> list[tuple[Path, str]]:
    """Folders that bear a published checkpoint's name, yet are not complete; and what is wrong."""
    folders = sorted((run_dir / "checkpoints").glob("step_*"))
    named = [each for each in folders if _STEP.fullmatch(each.name) and each.is_dir()]
    flaws = [(folder, _flaw(folder)) for folder in named]
    return [(folder, flaw) for folder, flaw in flaws if flaw]


def leftovers(run_dir: Path) -> list[Path]:
    """What a crash left while saving or pruning; swept away by the next save."""
    found = (run_dir / "checkpoints").glob(f"step_*{_PARTIAL}")
    return sorted(each for each in found if _is_of_saves(each))


def odd_entries(run_dir: Path) -> list[tuple[Path, str]]:
    """What lies among the checkpoints under a name like theirs and is never removed, and why."""
    odd = []
    for path in sorted((run_dir / "checkpoints").glob("step_*")):
        if path.is_symlink() and not path.exists():
            odd.append((path, "a link that leads nowhere"))
        elif _STEP.fullmatch(path.name) and path.is_dir():
            is_linked = path.is_symlink()
            if not is_linked and not _flaw(path) and (name := _unlisted(Checkpoint(path, 0))):
                odd.append((path, f"it holds {name}, which no save wrote"))
        elif not _is_of_saves(path):
            odd.append((path, "not made by a save"))
    return odd


def open_checkpoint(path: Path, *, patient: bool = False, key: str = "") -> Checkpoint:
    """The checkpoint at a path.

    Args:
        patient: another node has seen it, so wait for this one to see it too.
        key: of the setting that names it, for the message.

    Raises:
        UserError: there is none, or it is incomplete.
    """
    match = _STEP.fullmatch(path.name)
    deadline = time.monotonic() + (_VISIBLE_SECONDS if patient else 0)
    while (flaw := _flaw(path)) and time.monotonic() < deadline:
        time.sleep(0.5)
    if not match or not path.is_dir():
        raise UserError(f"{key}{path} is no checkpoint directory (step_00000020).")
    if flaw:
        raise UserError(f"The checkpoint {path} is incomplete or damaged: {flaw}.")
    return Checkpoint(path, int(match[1]))


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turns a failed file operation into a `UserError` that names the checkpoint."""
    try:
        yield
    except OSError as error:
        name = folder.with_suffix("") if folder.suffix == _PARTIAL else folder
        raise UserError(
            f"The checkpoint {name} could not be written: {error.strerror or error}."
        ) from error


def _step(folder: Path) -> int | None:
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def _complete(root: Path) -> list[Checkpoint]:
    found = []
    for folder in root.glob("step_*"):
        match = _STEP.fullmatch(folder.name)
        if match and not _flaw(folder):
            found.append(Checkpoint(folder, int(match[1])))
    return sorted(found, key=lambda c: -c.step)


def _flaw(folder: Path) -> str | None:
    """What is wrong with a checkpoint as far as sizes tell; None: nothing."""
    try:
        files = Checkpoint(folder, 0).files()
    except UserError:
        return f"{_MANIFEST} is missing or cannot be read"
    for name, file in files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if size != file.size:
            return f"{name} has {size} bytes instead of {file.size}"
    return None


def _unlisted(checkpoint: Checkpoint) -> str | None:
    """What a checkpoint's folder holds that its manifest does not list: a name; None: nothing."""
    listed = {*checkpoint.files(), _MANIFEST}
    names = (entry.name for entry in checkpoint.folder.iterdir())
    return min((n for n in names if n not in listed and not n.startswith(".nfs")), default=None)


def _is_of_saves(path: Path) -> bool:
    """Whether `path`, no published checkpoint, was made by saves alone, so that it may go."""
    if not _LEFT.fullmatch(path.name):
        return False
    if path.is_symlink():  # which goes alone, not what it leads to
        return True
    return path.is_dir() and all(_FILES.fullmatch(entry.name) for entry in path.iterdir())


def _clear(path: Path, aside_name: str) -> None:
    """Make a name free. A link goes; anything else is put aside, under the next name that is free
    or an earlier save's."""
    if path.is_symlink():
        path.unlink()
    if not path.exists():
        return
    number, aside = 1, path.with_name(aside_name)
    while aside == path or (os.path.lexists(aside) and not _is_of_saves(aside)):
        number += 1
        aside = path.with_name(f"{aside_name}-{number}")
    storage.remove(aside)
    path.rename(aside)


def _prune(root: Path, newest: int, settings: CheckpointConfig) -> None:
    if not settings.keep:
        return
    every = settings.keep_every_steps
    # What bears a later step than the one just published was passed over as damaged: it must not
    # take the place of a sound one.
    for old in [each for each in _complete(root) if each.step <= newest][settings.keep :]:
        if every and old.step % every == 0:
            continue
        if old.folder.is_symlink():
            old.folder.unlink()
        elif not _unlisted(old):
            # Renamed first, so that a crash while deleting leaves nothing that looks published.
            doomed = old.folder.with_name(old.folder.name + _PARTIAL)
            _clear(doomed, doomed.name)
            old.folder.rename(doomed)
            shutil.rmtree(doomed)


@cache
def _warn_once(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)

"""Law 6: a checkpoint is complete or invisible.

Owns `RUN_DIR/checkpoints/`. A checkpoint is written to `step_N.partial`, its manifest last; then
one rename makes it `step_N`, and `latest` is replaced. A crash at any instant leaves published
checkpoints as they were; a half-written one has another name, is never read, and is removed by the
next save. The manifest's sizes and checksums are those of the bytes that each rank meant to write,
not of the files that one node sees on a shared file system.

Only files that a save wrote are ever removed; of a link only the link. A folder that holds any
other file is kept, and so is any other entry whose name resembles a checkpoint's. Saving continues,
and `entries` says why.
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
from typing import Any, NamedTuple

import xxhash

from neftune_dist.checkpoint.flat import WrittenFile
from neftune_dist.config import CheckpointConfig, UserError, read_json, with_checksum
from neftune_dist.distributed.outcome import removed
from neftune_dist.system import storage
from neftune_dist.system.checkpoint_names import MANIFEST, step_of

_PARTIAL = ".partial"
_DAMAGED = ".damaged"
# Left by crashes while saving or pruning, or put aside.
_LEFT = re.compile(r"step_\d{8,}\.(partial|damaged)(-\d+)?")
# The files of saves, finished or not; the last are an NFS client's, for files still open.
_FILES = re.compile(
    r"__\d+_\d+\.distcp|\.?metadata.*|manifest\.json|trainer_state\.json|\..*\.new|.*\.tmp|\.nfs.*"
)
STATE = "trainer_state.json"
# What becomes of an entry named like a checkpoint, in words for people; some are followed by why.
COMPLETE, DAMAGED, ODD = "complete", "damaged: ", "passed over: "
UNFINISHED = "unfinished; the next save removes it"
PUT_ASIDE = "damaged and put aside; nothing reads it"  # a later save of that step took its name
_MANIFEST_FORM = {"step": int, "files": {str: WrittenFile}}
# What is read of the trainer's state; versions to come may write more.
_STATE_FORM = {
    "progress": dict,
    "num_steps": int,
    "identity": {"architecture": dict},
    "shapes": {str: [int]},
    "config": {str: dict | str | None},
    "world_size": int,
    "versions": {"neftune_dist": str},
}
# A node may see another's new folder on a shared file system as late as this.
_VISIBLE_SECONDS = 60.0


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, by its folder. `find_all` and `open_checkpoint` give complete ones."""

    folder: Path

    @property
    def step(self) -> int:
        """The step after which it was saved, from the folder's name."""
        return step_of(self.folder) or 0

    def trainer_state(self) -> dict[str, Any]:
        """The state saved beside the tensors. Raises `UserError` where the file is damaged, or of a
        version of this package that recorded less."""
        path = self.folder / STATE
        if not self.files()[STATE].is_at(path):
            raise damage_error(self, STATE)
        fix = "another version of neftune_dist made this checkpoint: use that one"
        state: dict[str, Any] = read_json(path, _STATE_FORM, fix=fix)
        return state

    def files(self) -> dict[str, WrittenFile]:
        """The manifest's entries by file name. Raises `UserError` where it is damaged."""
        try:
            manifest = read_json(self.folder / MANIFEST, _MANIFEST_FORM)
        except UserError as error:
            raise damage_error(self, MANIFEST) from error
        if manifest["step"] != step_of(self.folder) or STATE not in manifest["files"]:
            raise damage_error(self, MANIFEST)
        return dict(sorted(manifest["files"].items()))

    def first_flaw(self, part: int = 0, num_parts: int = 1) -> str | None:
        """The first file whose bytes are not those written; None: all are. Reads whole files.

        Args:
            part, num_parts: check every `num_parts`-th file, from number `part` on.
        """
        mine = list(self.files().items())[part::num_parts]
        return next((name for name, file in mine if not file.is_at(self.folder / name)), None)


def begin(run_dir: Path, step: int) -> Path:
    """Make the empty folder to write into, and remove leftovers of crashes. Rank 0 alone."""
    if not run_dir.is_dir():
        raise removed(run_dir)
    root = run_dir / "checkpoints"
    partial = root / f"step_{step:08d}{_PARTIAL}"
    with explained(partial):
        for path in root.glob(f"step_*{_PARTIAL}*"):  # not `entries`, which stats every shard
            if _entry(path).fate == UNFINISHED:
                storage.remove(path)
        _clear(partial, partial.name)
        partial.mkdir(parents=True)
    return partial


def publish(
    partial: Path,
    state: str,
    files: Mapping[str, WrittenFile],
    settings: CheckpointConfig,
    best_step: int | None = None,
) -> None:
    """Publish the files of all ranks as a checkpoint, then prune older ones. Rank 0 alone.

    Args:
        partial: the folder of `begin`.
        state: of the trainer, JSON.
        files: of all ranks, by name; each is on the disk.
        settings: how many checkpoints to keep.
        best_step: of one that is kept beside those.

    Raises:
        UserError: it could not be written; earlier checkpoints are unharmed. A failure to prune is
            only a warning.
    """
    root, final = partial.parent, partial.with_suffix("")
    step = int(final.name.removeprefix("step_"))
    with explained(final):
        content = state.encode()
        storage.write(partial / STATE, content, durable=True)
        checksum = xxhash.xxh3_128(content).hexdigest()
        all_files = {**files, STATE: WrittenFile(len(content), checksum)}
        manifest = {"step": step, "files": {name: vars(f) for name, f in all_files.items()}}
        storage.write(
            partial / MANIFEST, json.dumps(with_checksum(manifest), indent=1), durable=True
        )
        _clear(final, final.name + _DAMAGED)
        partial.rename(final)
        storage.sync(root)
        # The name is on the disk first: `latest` never names a folder that is not there.
        storage.write(root / "latest", f"{final.name}\n", durable=True)
    try:
        _prune(root.parent, step, settings, best_step)
        for path, fate, why in entries(root.parent):
            if why and fate != DAMAGED:
                _warn_once(f"{path} is passed over: {why}.")
    except OSError as error:  # the checkpoint is there, and the next save tries again
        where = error.filename or root
        _warn_once(f"an old checkpoint was not removed: {where}: {error.strerror or error}.")


class Entry(NamedTuple):
    """An entry that is named like a checkpoint.

    Attributes:
        fate: COMPLETE, DAMAGED, UNFINISHED, PUT_ASIDE or ODD.
        why: of one that is DAMAGED or ODD, or is COMPLETE and never removed.
    """

    path: Path
    fate: str
    why: str = ""


def entries(run_dir: Path) -> list[Entry]:
    """What is named like a checkpoint, by name."""
    return [_entry(path) for path in sorted((run_dir / "checkpoints").glob("step_*"))]


def find_all(run_dir: Path) -> list[Checkpoint]:
    """Checkpoints whose files have their manifests' sizes, newest first."""
    complete = [Checkpoint(e.path) for e in entries(run_dir) if e.fate == COMPLETE]
    return sorted(complete, key=lambda checkpoint: -checkpoint.step)


def damage_error(checkpoint: Checkpoint, flaw: str) -> UserError:
    """The error for a checkpoint whose file `flaw` is damaged, or that is no longer there."""
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
    """Folders with a published checkpoint's name that are not complete, and the flaw of each."""
    return [(path, why) for path, fate, why in entries(run_dir) if fate == DAMAGED]


def open_checkpoint(path: Path, *, patient: bool = False, key: str = "") -> Checkpoint:
    """Return the checkpoint at a path.

    Args:
        patient: wait until this node sees it too: another one has seen it.
        key: of the setting that names it, for the message.

    Raises:
        UserError: there is none, or it is incomplete.
    """
    deadline = time.monotonic() + (_VISIBLE_SECONDS if patient else 0)
    while (flaw := _flaw(path)) and time.monotonic() < deadline:
        time.sleep(0.5)
    if step_of(path) is None or not path.is_dir():
        raise UserError(f"{key}{path} is no checkpoint directory (step_00000020).")
    if flaw:
        raise UserError(f"The checkpoint {path} is incomplete or damaged: {flaw}.")
    return Checkpoint(path)


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn a failed file operation into a `UserError` that names the checkpoint."""
    try:
        yield
    except OSError as error:
        name = folder.with_suffix("") if folder.suffix == _PARTIAL else folder
        raise UserError(
            f"The checkpoint {name} could not be written: {error.strerror or error}."
        ) from error


def _flaw(folder: Path) -> str | None:
    """The flaw of a checkpoint as far as names and sizes tell; None: none."""
    try:
        files = Checkpoint(folder).files()
    except UserError:
        return f"{MANIFEST} is missing or cannot be read"
    for name, file in files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if size != file.size:
            return f"{name} has {size} bytes instead of {file.size}"
    return None


def _unlisted(folder: Path) -> str | None:
    """The first entry of a checkpoint's folder that its manifest does not list; None: none."""
    try:
        listed, names = {*Checkpoint(folder).files(), MANIFEST}, os.listdir(folder)
    except (UserError, FileNotFoundError):  # a run that continues has removed it
        return None
    return min((n for n in names if n not in listed and not n.startswith(".nfs")), default=None)


def _entry(path: Path) -> Entry:
    if step_of(path) is not None and path.is_dir():
        if flaw := _flaw(path):
            return Entry(path, DAMAGED, flaw)
        name = None if path.is_symlink() else _unlisted(path)
        return Entry(path, COMPLETE, f"it holds {name}, which no save wrote" if name else "")
    if _is_of_saves(path):
        return Entry(path, UNFINISHED if _PARTIAL in path.name else PUT_ASIDE)
    leads_nowhere = path.is_symlink() and not path.exists()
    return Entry(path, ODD, "a link that leads nowhere" if leads_nowhere else "not made by a save")


def _is_of_saves(path: Path) -> bool:
    """Whether `path`, no published checkpoint, holds files of saves alone and may be removed."""
    if not _LEFT.fullmatch(path.name):
        return False
    if path.is_symlink():  # which goes alone, not what it leads to
        return True
    try:
        return all(map(_FILES.fullmatch, os.listdir(path)))
    except (NotADirectoryError, FileNotFoundError):  # a file, or a run has removed it meanwhile
        return False


def _clear(path: Path, aside_name: str) -> None:
    """Free the name `path`: remove a link, rename anything else to `aside_name`, or to
    `aside_name`-2, -3, ..., the first that is free or holds only files of saves."""
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


def _prune(run_dir: Path, newest: int, settings: CheckpointConfig, best_step: int | None) -> None:
    if not settings.keep:
        return
    every = settings.keep_every_steps
    # A checkpoint of a later step than the one just published was passed over as damaged: it must
    # not count as one of those to keep.
    for old in [c for c in find_all(run_dir) if c.step <= newest][settings.keep :]:
        if old.step == best_step or (every and old.step % every == 0):
            continue
        if old.folder.is_symlink():
            old.folder.unlink()
        elif not _unlisted(old.folder):
            # Renamed first, so that a crash while deleting leaves nothing that looks published.
            doomed = old.folder.with_name(old.folder.name + _PARTIAL)
            _clear(doomed, doomed.name)
            old.folder.rename(doomed)
            shutil.rmtree(doomed)


@cache
def _warn_once(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)

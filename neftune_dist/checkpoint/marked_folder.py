"""Folders with this project's mark, replaced whole: either the old or the new one is always there.

The mark is a JSON file, written last, that lists every file of the folder with its size and
checksum. A folder is replaced only if it carries a mark and holds exactly what the mark lists: no
other file, no changed one, no link, no folder. So only files that this project wrote are removed.

    .NAME.neftune-new   being written; its mark lists nothing until it is complete
    NAME                published by a rename
    .NAME.neftune-old   the one before it, until it is removed; put back after a crash that left
                        nothing under NAME
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from neftune_dist import __version__
from neftune_dist.checkpoint.flat import WrittenFile
from neftune_dist.config import Nullable, UserError, read_json
from neftune_dist.system import storage

_PROJECT = "neftune_dist"


@contextmanager
def replaced(folder: Path, mark: str) -> Iterator[Path]:
    """Yield a new folder to fill, which replaces `folder` when the block ends without an error.

    Args:
        folder: need not exist; no link.
        mark: name of the file that marks folders of this kind.

    Raises:
        UserError: `folder` holds files of others, or another process is replacing it.
        OSError: it cannot be written; `folder` is unchanged.
    """
    refuse_other(folder, mark, thorough=False)
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = (folder.with_name(f".{folder.name}.neftune-{which}") for which in ("new", "old"))
    busy = f"{folder} is being written by another process: wait for it, or choose another one."
    with storage.hold(folder.with_name(f".{folder.name}.neftune-lock"), busy):
        _recover(folder, new, old, mark)
        new.mkdir()
        try:
            _write_mark(new, mark, None)
            yield new
            _seal(new, mark)
            refuse_other(folder, mark)
            _publish(folder, new, old)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        if os.path.lexists(old):
            try:
                _remove_marked(old, mark)
            except OSError as error:  # the next one removes it
                print(f"warning: {old} was not removed: {error.strerror}", file=sys.stderr)


def refuse_other(folder: Path, mark: str, *, thorough: bool = True) -> None:
    """Raise `UserError` where `folder` holds anything that this project did not write.

    Args:
        thorough: compare checksums, not sizes alone.
    """
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise UserError(f"{folder} exists and is no directory: choose another one.")
    files = _files(folder / mark)
    if files is None:
        raise UserError(
            f"{folder} exists and carries no {mark}, by which this project knows what it may "
            "replace (earlier versions left none): choose another directory, or remove this one."
        )
    if name := _other(folder, mark, files, thorough):
        raise UserError(
            f"{folder} is not replaced: {name} in it is not what this project wrote. Choose "
            "another directory, or remove this one."
        )


def _other(
    folder: Path, mark: str, files: dict[str, WrittenFile], thorough: bool = True
) -> str | None:
    """The first entry of a folder that is not as its mark lists it; None: none. Listed files may
    be missing."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name == mark:
            continue
        listed = files.get(entry.name)
        if listed is None or not entry.is_file(follow_symlinks=False):
            return entry.name
        path = Path(entry.path)
        same = listed.is_at(path) if thorough else path.stat().st_size == listed.size
        if not same:
            return entry.name
    return None


def _files(path: Path) -> dict[str, WrittenFile] | None:
    """The files that a mark lists; None: the mark is not this project's."""
    try:
        content = read_json(path, {"made_by": str, "files": Nullable({str: WrittenFile})})
    except UserError:
        return None
    files: dict[str, WrittenFile] = content["files"] or {}
    is_ours = content["made_by"].startswith(_PROJECT) and not path.is_symlink()
    within = all(Path(name).name == name and name != ".." for name in files)
    return files if is_ours and within else None


def _write_mark(folder: Path, mark: str, files: dict[str, WrittenFile] | None) -> None:
    listed = {name: vars(file) for name, file in files.items()} if files else None
    content = {"made_by": f"{_PROJECT} {__version__}", "files": listed}
    storage.write(folder / mark, json.dumps(content, indent=1) + "\n", durable=True)


def _seal(folder: Path, mark: str) -> None:
    """Sync all files, then write the mark that lists them."""
    paths = sorted(path for path in folder.iterdir() if path.name != mark)
    for path in paths:
        storage.sync(path)
    _write_mark(folder, mark, {path.name: WrittenFile.of(path) for path in paths})


def _publish(folder: Path, new: Path, old: Path) -> None:
    replaces = os.path.lexists(folder)
    if replaces:
        folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        if replaces:
            old.rename(folder)
        raise
    storage.sync(folder.parent)


def _recover(folder: Path, new: Path, old: Path, mark: str) -> None:
    """Recover from a crash. Called by the holder of the lock alone."""
    with suppress(OSError):
        old.rmdir()  # its files were removed already
    if os.path.lexists(old):
        files = None if old.is_symlink() else _files(old / mark)
        if files is None or _other(old, mark, files):
            raise _in_the_way(old)
        if os.path.lexists(folder) or any(not (old / name).exists() for name in files):
            _remove_marked(old, mark)
        else:
            old.rename(folder)
    if os.path.lexists(new):
        if new.is_symlink() or not new.is_dir():
            raise _in_the_way(new)
        # Begun and not yet marked: it is empty, or holds part of a mark.
        names = {entry.name for entry in new.iterdir()}
        begun = all(name.startswith(f".{mark}.") for name in names)
        if not begun and _files(new / mark) is None:
            raise _in_the_way(new)
        shutil.rmtree(new)


def _in_the_way(path: Path) -> UserError:
    return UserError(f"{path} is in the way, and not this project's: move it, or remove it.")


def _remove_marked(folder: Path, mark: str) -> None:
    """Remove the files that the mark lists, the mark last, and the folder if it is then empty."""
    for name in [*(_files(folder / mark) or ()), mark]:
        with suppress(FileNotFoundError):
            (folder / name).unlink()
    with suppress(OSError):  # a file that came into it meanwhile is kept
        folder.rmdir()

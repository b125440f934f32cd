"""Writing whole files, removing what stands in the way, and one process at a time in a folder.

Needs the standard library alone: the launcher, which may run outside the container that holds the
ranks, writes by it, too.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

from neftune_dist import __version__
from neftune_dist.config import UserError

_POLL_SECONDS = 0.1
# A file system that has no locks says one of these.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def write(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Put a file in its place whole: readers, and a crash, find the old one or the new one.

    A link in its place is replaced, not followed. The mode follows the umask.

    Args:
        path: of the file.
        content: text is written as UTF-8.
        durable: return when it is on the disk, its name included.

    Raises:
        OSError: it cannot be written; the old one is as it was.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with aside.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise
    if durable:
        sync(path.parent)


def sync(path: Path) -> None:
    """Put a file's content, or a folder's names, on the disk. Raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def existing(path: Path) -> Path:
    """Return the path, made absolute, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if os.path.lexists(place))


def remove(path: Path) -> None:
    """Remove a folder with all that it holds, or a file; of a link, the link alone. Raises
    `OSError`."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Turn a failed file operation within the block into a `UserError` that names `what`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} cannot be written: {error.strerror or error}.") from error


# What shows that a folder is for something else: a repository, a model.
_OTHER_USE = (".git", "config.json", "*.safetensors", "*.bin", "*.gguf")


def check_claim(folder: Path, names: Sequence[str], mark: str, setting: str) -> None:
    """Raise `UserError` where the folder is for something else, or holds what we would overwrite.

    Args:
        folder: to be claimed.
        names: see `refuse_foreign`.
        mark: the file that says the folder is ours.
        setting: that names the folder, such as `run_dir=runs/7b`.
    """
    if folder.resolve() in (Path("/"), Path(os.path.expanduser("~")).resolve()):
        raise UserError(f"{setting} is a root or home directory: choose one below it.")
    refuse_foreign(folder, (*names, *_OTHER_USE), mark, setting)


def claim(folder: Path, names: Sequence[str], mark: str, setting: str) -> None:
    """Make a folder where it is missing, and mark it as ours. Arguments, and `UserError`, as of
    `check_claim`; `UserError` also where it cannot be written."""
    check_claim(folder, names, mark, setting)
    with writing(setting):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / mark).is_file():
            write(folder / mark, json.dumps({"made_by": f"neftune_dist {__version__}"}) + "\n")


def refuse_foreign(folder: Path, names: Sequence[str], mark: str, setting: str) -> None:
    """Raise `UserError` where a folder without our mark holds what others have written.

    Args:
        folder: to be written into.
        names: of what is refused, as glob patterns.
        mark: the file that says the folder is ours.
        setting: that names the folder, such as `run_dir=runs/7b`.
    """
    if (folder / mark).is_file() or not folder.is_dir():
        return
    with writing(setting):
        present = sorted(os.listdir(folder))
    for there in present:
        if any(fnmatchcase(there, name) for name in names):
            raise UserError(
                f"{setting} holds {there}, but no {mark}, so this project did not write it and "
                "does not write there: choose another directory, or move it away."
            )


class Busy(UserError):
    """Another process keeps a lock."""


@contextmanager
def hold(path: Path, busy: str, seconds: float = 10.0) -> Iterator[None]:
    """Let one process at a time into the block. A process that dies lets go. On a disk without
    locks it is a warning, and all get in.

    Args:
        path: of the lock, a file that exists while it is held.
        busy: the error where another process keeps it.
        seconds: to wait for that process.

    Raises:
        Busy: another process keeps it.
        UserError: the file cannot be made.
    """
    with writing(str(path)):
        descriptor = _lock(path, busy, time.monotonic() + seconds)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held: whoever waits for it sees that, and makes another
        os.close(descriptor)


def _lock(path: Path, busy: str, deadline: float) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    while True:
        descriptor = os.open(path, flags, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
            os.close(descriptor)  # its last holder has removed it
            continue
        except OSError as error:
            if error.errno in _NO_LOCKS:
                text = f"{path.parent} is on a disk without locks: nothing keeps another run out"
                print(f"warning: {text}", file=sys.stderr, flush=True)
                return descriptor
            os.close(descriptor)
            if not isinstance(error, BlockingIOError):
                raise
        if time.monotonic() > deadline:
            raise Busy(busy)
        time.sleep(_POLL_SECONDS)

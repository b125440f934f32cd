"""Entries of a cache: folders that one process makes, that appear whole, and that are checked
whenever they are opened.

An entry lists the checksums of its files, and has a checksum of that list. Checking reads all files
once: by xxh3, 4 GB/s measured on one core where they are in memory, else as long as the disk takes.
A million documents of 250 tokens are 1.3 GB, so about 0.3 s; every process checks for itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import xxhash
from filelock import FileLock

_CHECKSUMS = "checksums.json"


def obtain(
    root: Path, name: str, make: Callable[[Path], None], tell: Callable[[str], None]
) -> Path:
    """The entry of that name, made where it is missing, made again where it is damaged.

    Args:
        root: of the cache; made where it is missing.
        make: fills a folder, which it makes.
        tell: called with a sentence where an entry is damaged.

    Raises:
        OSError, NotImplementedError: the cache cannot be written, or its disk has no file locks.
    """
    entry = root / name
    root.mkdir(parents=True, exist_ok=True)
    if first_flaw(entry) is not None:
        with FileLock(root / f"{name}.lock"):
            flaw = first_flaw(entry)  # another process may have made it meanwhile
            if flaw is not None:
                if entry.exists():
                    tell(f"warning: {entry} is damaged and is made again: {flaw}")
                _make(entry, make)
    return entry


def first_flaw(entry: Path) -> str | None:
    """What is not as it was when the entry was made, or None."""
    try:
        listed = json.loads((entry / _CHECKSUMS).read_bytes())
        if listed["checksum"] != _checksum_of_list(listed["files"]):
            return f"{_CHECKSUMS} is not what was written"
        for name, checksum in listed["files"].items():
            if _checksum(entry / name) != checksum:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return str(error)
    return None


def _make(entry: Path, make: Callable[[Path], None]) -> None:
    # Only the holder of the entry's lock is here: what others have left was left by the dead.
    for left in entry.parent.glob(f"{entry.name}.*.part"):
        shutil.rmtree(left, ignore_errors=True)
    aside, old = (
        entry.with_name(f"{entry.name}.{os.getpid()}{end}") for end in (".part", ".old.part")
    )
    try:
        make(aside)
        files = sorted(each for each in aside.iterdir() if each.is_file())
        checksums = {each.name: _checksum(each) for each in files}
        listed = {"files": checksums, "checksum": _checksum_of_list(checksums)}
        (aside / _CHECKSUMS).write_text(json.dumps(listed, indent=1) + "\n")
        for file in (*files, aside / _CHECKSUMS):
            _sync(file)
        if entry.exists():
            entry.rename(old)
        aside.rename(entry)
    finally:
        for left in (aside, old):
            shutil.rmtree(left, ignore_errors=True)


def _checksum(file: Path) -> str:
    with file.open("rb", buffering=0) as opened:
        return hashlib.file_digest(opened, xxhash.xxh3_128).hexdigest()


def _checksum_of_list(checksums: dict[str, str]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(checksums, sort_keys=True).encode())


def _sync(file: Path) -> None:
    """Put a file on the disk, so that a machine that dies leaves no entry with a name and no
    content."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())

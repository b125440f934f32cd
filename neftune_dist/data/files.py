"""Which files a local source is, told by their names alone: without torch, numpy or pyarrow.

Owns the suffixes, and what a path, a directory and a glob stand for; training and the checks on a
login node must agree on that. Names that stand for nothing readable are a `UserError`.
"""

from __future__ import annotations

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path

from neftune_dist.config import BUILTIN_SOURCE, UserError, user_path

# How a file is read, by its suffix; tables are compressed inside, if at all.
KINDS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SUFFIX = re.compile(r"(\.jsonl?|\.csv|\.tsv)(\.gz|\.zst)?$|(\.parquet|\.arrow)$")
_READABLE = ".json, .jsonl, .csv or .tsv (.gz and .zst too), .parquet or .arrow"
# What `Dataset.save_to_disk` writes beside the rows.
_ABOUT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class Files:
    """paths: in order of their names; left_out: names in a directory that are no files of rows."""

    paths: tuple[Path, ...]
    left_out: tuple[str, ...] = ()


def file_kind(path: Path) -> str:
    """How the file is read: one of the values of `KINDS`; nothing where it cannot be."""
    found = _SUFFIX.search(path.name.lower())
    return KINDS[found[1] or found[3]] if found else ""


def is_local(source: str) -> bool:
    """Whether a source names files on this machine, not the built-in set or the hub."""
    if source == BUILTIN_SOURCE:
        return False
    named = source.startswith(("/", ".", "~")) or bool(file_kind(Path(source))) or _is_glob(source)
    return named or os.path.exists(source)


def find_files(source: str, key: str) -> Files:
    """The files of a local source: a file, all in a directory (not in those below it), or all that
    a glob matches (`**` for any depth).

    Args:
        key: of the setting, for messages.

    Raises:
        UserError: there is none, or one that cannot be read.
    """
    path = user_path(source, key)
    what = f"{key}={path}"
    if not os.path.exists(path):
        if not _is_glob(source):
            raise UserError(f"{what} does not exist.")
        return _of_glob(path, what)
    if path.is_dir():
        return _of_directory(path, what)
    if not file_kind(path) or not path.is_file():
        raise UserError(f"{what} cannot be read: give a {_READABLE} file, or a directory of them.")
    return Files((path,))


def _is_glob(source: str) -> bool:
    return glob.has_magic(source)


def _of_glob(path: Path, what: str) -> Files:
    found = sorted(each for each in glob.glob(str(path), recursive=True) if os.path.isfile(each))
    if not found:
        raise UserError(f"{what} matches no file.")
    for each in found:
        if not file_kind(Path(each)):
            raise UserError(f"{what} matches {each}, which cannot be read: it is no {_READABLE}.")
    return Files(tuple(map(Path, found)))


def _of_directory(path: Path, what: str) -> Files:
    try:
        entries = sorted(each for each in path.iterdir() if not each.name.startswith("."))
    except OSError as error:
        raise UserError(f"{what} cannot be read: {error.strerror or error}.") from error
    rows = [
        each
        for each in entries
        if file_kind(each) and each.name not in _ABOUT_ROWS and each.is_file()
    ]
    if not rows:
        raise UserError(f"{what} is a directory without a {_READABLE} file.")
    left_out = tuple(each.name for each in entries if each not in rows)
    return Files(tuple(rows), left_out)

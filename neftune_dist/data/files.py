"""The files of a local source, found by their names alone, without torch, numpy or pyarrow.

Training and the checks on a login node share this reading of paths, directories and globs. A name
without a readable file is a `UserError`.
"""

from __future__ import annotations

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path

from neftune_dist.config import BUILTIN_SOURCE, UserError, user_path

# Kind of file by suffix. Parquet and Arrow compress inside the file, if at all.
FILE_KINDS = {
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
# Written by `Dataset.save_to_disk` beside the rows.
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class SourceFiles:
    """Files of rows, in order of their names.

    left_out: names of the other files in a directory.
    """

    paths: tuple[Path, ...]
    left_out: tuple[str, ...] = ()


def file_kind(path: Path) -> str:
    """One of the values of `FILE_KINDS`, or "" for a file that cannot be read."""
    found = _SUFFIX.search(path.name.lower())
    return FILE_KINDS[found[1] or found[3]] if found else ""


def is_local(source: str) -> bool:
    """Whether a source names local files, rather than the built-in set or a dataset of the hub."""
    if source == BUILTIN_SOURCE:
        return False
    named = (
        source.startswith(("/", ".", "~"))
        or bool(file_kind(Path(source)))
        or glob.has_magic(source)
    )
    return named or os.path.exists(source)


def find_files(source: str, key: str) -> SourceFiles:
    """The files of a local source.

    Args:
        source: a file, a directory (not those below it) or a glob (`**` for any depth).
        key: the setting, for messages.

    Raises:
        UserError: no file is found, or one that cannot be read.
    """
    path = user_path(source, key)
    setting = f"{key}={path}"
    if not os.path.exists(path):
        if not glob.has_magic(source):
            raise UserError(f"{setting} does not exist.")
        return _of_glob(path, setting)
    if path.is_dir():
        return _of_directory(path, setting)
    if not file_kind(path) or not path.is_file():
        raise UserError(
            f"{setting} cannot be read: give a {_READABLE} file, or a directory of them."
        )
    return SourceFiles((path,))


def _of_glob(path: Path, setting: str) -> SourceFiles:
    found = sorted(name for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
    if not found:
        raise UserError(f"{setting} matches no file.")
    for name in found:
        if not file_kind(Path(name)):
            raise UserError(
                f"{setting} matches {name}, which cannot be read: it is not a {_READABLE} file."
            )
    return SourceFiles(tuple(map(Path, found)))


def _of_directory(path: Path, setting: str) -> SourceFiles:
    try:
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"{setting} cannot be read: {error.strerror or error}.") from error
    rows = [e for e in entries if file_kind(e) and e.name not in _METADATA and e.is_file()]
    if not rows:
        raise UserError(f"{setting} is a directory without a {_READABLE} file.")
    left_out = tuple(entry.name for entry in entries if entry not in rows)
    return SourceFiles(tuple(rows), left_out)

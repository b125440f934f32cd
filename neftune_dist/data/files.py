"""The files of a local source, found by their names alone, without torch, numpy or pyarrow.

Training and the checks on a login node share this reading of paths, directories and globs. A name
without a readable file is a `UserError`.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from neftune_dist.config import BUILTIN_SOURCE, Nullable, UserError, read_json, user_path

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Parquet and Arrow compress inside the file, if at all.
_SUFFIX = re.compile(r"\.(?:(json)l?|(csv)|(tsv))(?:\.gz|\.zst)?$|\.(parquet|arrow)$")
_READABLE = ".json, .jsonl, .csv or .tsv (.gz and .zst too), .parquet or .arrow"
# Written by `Dataset.save_to_disk` beside the rows.
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# Words that name a split in a folder's or file's name, and the files that `push_to_hub` writes: the
# rules of `datasets`.
_SPLITS = {"train": "train|training", "validation": "validation|valid|dev|val"}
_SPLITS |= {"test": "test|testing|eval|evaluation"}
_SPLIT_WORDS = {
    split: re.compile(rf"(^|[-._ 0-9])({words})([-._ 0-9]|$)", re.IGNORECASE)
    for split, words in _SPLITS.items()
}
_SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*")


@dataclass(frozen=True)
class SourceFiles:
    """Files of rows, in order of their names.

    Attributes:
        paths: the files.
        left_out: names of the other files in a directory.
        has_splits: whether they are one split of several.
        hidden: columns that a saved dataset's format leaves out.
    """

    paths: tuple[Path, ...]
    left_out: tuple[str, ...] = ()
    has_splits: bool = False
    hidden: frozenset[str] = frozenset()


def file_kind(path: Path) -> str:
    """json, csv, tsv, parquet or arrow; "" for a file that cannot be read."""
    found = _SUFFIX.search(path.name.lower())
    return found[found.lastindex or 0] if found else ""


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


def find_files(source: str, key: str, split: str = "train") -> SourceFiles:
    """The files of a local source.

    Args:
        source: a file, a directory or a glob (`**` for any depth). Of a directory: the files that
            its `state.json` lists, where `datasets` saved it; one split, where it is divided by
            `dataset_dict.json`, by the `configs` of its README.md or by names as on the hub; else
            its files, not those below it.
        key: the setting, for messages.
        split: the split to read of a directory with splits.

    Raises:
        UserError: no file is found, or one that cannot be read, or there is no such split.
    """
    path = user_path(source, key)
    setting = f"{key}={path}"
    if not os.path.exists(path):
        if not glob.has_magic(source):
            raise UserError(f"{setting} does not exist.")
        return _of_glob(path, setting)
    if path.is_dir():
        return _of_directory(path, setting, split)
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


def _of_directory(path: Path, setting: str, split: str) -> SourceFiles:
    if (path / "dataset_dict.json").is_file():
        splits = read_json(path / "dataset_dict.json", {"splits": [str]})["splits"]
        chosen = path / _chosen(split, splits, setting)
        if chosen.parent != path or not _is_saved(chosen):
            raise UserError(f"{setting}: {chosen} is not a dataset that `datasets` saved.")
        others = tuple(f"{name} (split)" for name in splits if name != chosen.name)
        return SourceFiles(_saved(chosen), others, has_splits=True, hidden=_hidden(chosen))
    if (path / "README.md").is_file():
        configured = _of_card(path, setting)
        if isinstance(configured, Path):
            return _of_directory(configured, setting, split)
        if configured:
            paths = configured[_chosen(split, [*configured], setting)]
            every = sorted(entry for entry in path.rglob("*") if file_kind(entry))
            left_out = tuple(str(entry.relative_to(path)) for entry in every if entry not in paths)
            return SourceFiles(paths, left_out, has_splits=True)
    try:
        entries = _entries(path)
    except OSError as error:
        raise UserError(f"{setting} cannot be read: {error.strerror or error}.") from error
    folders = {entry.parent for entry in entries}
    listed = {folder: _saved(folder) for folder in folders if _is_saved(folder)}
    rows = [
        entry
        for entry in entries
        if file_kind(entry) and entry.name not in _METADATA
        if entry.is_file() or not entry.exists()  # a link to nothing is an error later
        if entry in listed.get(entry.parent, (entry,))
    ]
    if not rows:
        inside = ", ".join(entry.name for entry in entries if entry.is_dir())
        hint = f"; it has the folders {inside}: choose one" if inside else ""
        raise UserError(f"{setting} is a directory without a {_READABLE} file{hint}.")
    named = {entry: found for entry in rows if (found := _split_of(entry.relative_to(path)))}
    if named:
        chosen_split = _chosen(split, sorted({*named.values()}), setting)
        rows = [entry for entry in rows if named.get(entry) == chosen_split]
    kept = {*rows}
    left_out = tuple(str(entry.relative_to(path)) for entry in entries if entry not in kept)
    hidden = frozenset(name for folder in listed for name in _hidden(folder))
    return SourceFiles(tuple(rows), left_out, has_splits=bool(named), hidden=hidden)


def _of_card(path: Path, setting: str) -> dict[str, tuple[Path, ...]] | Path | None:
    """The files of every split, by the default one of the `configs` at the head of a README.md, as
    on the hub; the directory that it names in their place; None where it names neither."""
    card = f"{setting}: its README.md"
    try:
        text = (path / "README.md").read_text(encoding="utf-8-sig", errors="replace")
        head = re.match(r"---[ \t]*\r?\n(.*?)^---[ \t]*$", text, re.DOTALL | re.MULTILINE)
        named = yaml.safe_load(head[1]) if head else None
        configs = named.get("configs") if isinstance(named, dict) else None
        if not configs:
            return None
        by_name = {str(config["config_name"]): config for config in configs}
        marked = next((config for config in configs if config.get("default")), None)
        chosen = marked or by_name.get("default") or (configs[0] if len(configs) == 1 else None)
        if chosen is None:
            raise UserError(
                f"{card} has the configurations {', '.join(by_name)}, none of them the default: "
                "name the files of one in place of the directory."
            )
        root, files = path / chosen.get("data_dir", ""), chosen.get("data_files")
        if not root.resolve().is_relative_to(path.resolve()) or not root.is_dir():
            raise UserError(f"{card} names {root}, which is no folder in the directory.")
        if files is None:
            return root if root != path else None
        listed: list[Any] = [files] if isinstance(files, str) else files
        splits: dict[str, tuple[Path, ...]] = {}
        for entry in listed:
            if isinstance(entry, str):
                entry = {"split": "train", "path": entry}
            patterns = [entry["path"]] if isinstance(entry["path"], str) else entry["path"]
            for pattern in patterns:
                if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
                    raise UserError(f"{card} names {pattern}, which is outside of the directory.")
                place = Path(glob.escape(str(root))) / pattern
                found = _of_glob(place, f"{card} names {pattern}, which").paths
                splits[entry["split"]] = (*splits.get(entry["split"], ()), *found)
    except UserError:
        raise
    except Exception as error:  # of YAML, or of what is not the type that it should be
        raise UserError(
            f"{card} has 'configs' that cannot be read ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:150]}): write them as the hub does, or remove it."
        ) from error
    return splits


def _entries(path: Path) -> list[Path]:
    """What a directory holds, in order of the names; also what its folders hold that are called
    `data` or like a split."""
    entries = []
    for entry in sorted(path.iterdir()):
        if entry.name.startswith("."):
            continue
        is_split = entry.name == "data" or _split_of(Path(entry.name))
        entries += _entries(entry) if is_split and entry.is_dir() else [entry]
    return entries


def _is_saved(path: Path) -> bool:
    """Whether `Dataset.save_to_disk` wrote a directory."""
    return all((path / name).is_file() for name in ("state.json", "dataset_info.json"))


def _saved(path: Path) -> tuple[Path, ...]:
    state = read_json(path / "state.json", {"_data_files": [{"filename": str}]})
    paths = tuple(path / listed["filename"] for listed in state["_data_files"])
    for file in paths:
        if file.parent != path or not file.is_file():
            raise UserError(f"{path / 'state.json'} lists {str(file)!a}, which is no file in it.")
    return paths


def _hidden(path: Path) -> frozenset[str]:
    """The columns that a saved dataset's format leaves out (`set_format`)."""
    form = {"_format_columns?": Nullable([str]), "_output_all_columns?": bool}
    state = read_json(path / "state.json", form)
    shown, shows_all = state.get("_format_columns"), state.get("_output_all_columns")
    names = read_json(path / "dataset_info.json", {"features?": Nullable(dict)}).get("features")
    if shown is None or names is None or shows_all:
        return frozenset()
    return frozenset(names) - {*shown}


def _split_of(path: Path) -> str | None:
    """The split that the first part of a relative path names which names one."""
    if shard := _SHARD.fullmatch(path.as_posix()):
        return shard[1]
    parts = ((part, *found) for part in path.parts for found in _SPLIT_WORDS.items())
    return next((split for part, split, words in parts if words.search(part)), None)


def _chosen(split: str, splits: Sequence[str], setting: str) -> str:
    named = split if split in splits else _split_of(Path(split))
    if named is None or named not in splits:
        key = setting.partition("=")[0].removesuffix("source") + "split"
        raise UserError(
            f"{setting} has no split {split!a}; there are {', '.join(splits)}: choose one by {key}."
        )
    return named

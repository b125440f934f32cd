"""The model and the data of a run as they are on this machine, read without torch.

Reads no more than takes an instant: headers of weights, numbers of rows, the hub's caches. A file
that the job would miss is a `UserError` here.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
from safetensors import safe_open

from neftune_dist.config import (
    BUILTIN_SOURCE,
    DataConfig,
    ModelConfig,
    SourceConfig,
    UserError,
    parse_json,
)
from neftune_dist.data import builtin, files
from neftune_dist.model import locate
from neftune_dist.system.model_files import weight_files
from neftune_dist.system.text import first_line

_TRUE = ("1", "ON", "YES", "TRUE")
_COUNTED_BYTES = (
    64 * 2**20
)  # read in a fraction of a second; of a longer file, the rest is inferred


@dataclass(frozen=True)
class Hub:
    """The Hugging Face hub as the job will see it: whether it may be asked, and its caches."""

    offline: bool
    cache: Path
    datasets: Path

    @staticmethod
    def of(environment: Mapping[str, str]) -> Hub:
        """By the variables that the hub's clients read."""
        home = environment.get("HF_HOME")
        if not home:
            home = (environment.get("XDG_CACHE_HOME") or "~/.cache") + "/huggingface"
        switches = [environment.get(name, "") for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")]
        return Hub(
            any(switch.upper() in _TRUE for switch in switches),
            Path(environment.get("HF_HUB_CACHE") or f"{home}/hub").expanduser(),
            Path(environment.get("HF_DATASETS_CACHE") or f"{home}/datasets").expanduser(),
        )

    def find(self, kind: str, name: str, revision: str | None) -> Path | None:
        """Return the folder of a cached `model` or `dataset` (`kind`), or None."""
        cached = huggingface_hub.snapshot_download
        try:
            return Path(
                cached(
                    name,
                    repo_type=kind,
                    revision=revision,
                    cache_dir=self.cache,
                    local_files_only=True,
                )
            )
        except (OSError, ValueError):
            folder = self.datasets / name.replace("/", "___")
            return folder if kind == "dataset" and folder.is_dir() else None


@dataclass(frozen=True)
class Rows:
    """The number of rows of a source; `exact`: all were counted, none inferred."""

    number: int
    exact: bool = True

    def __str__(self) -> str:
        return f"{'' if self.exact else 'about '}{self.number} rows"


def find_model(model: ModelConfig, hub: Callable[[], Hub]) -> Path | None:
    """Return the model's directory; None where the job has to download it. Raises `UserError`."""
    name = model.name_or_path
    if model.weights is not None and not Path(model.weights).is_dir():
        raise UserError(f"model.weights={model.weights} is no directory.")
    folder = locate.find_local(model)
    if folder is None and not files.HUB_ID.fullmatch(name):
        raise UserError(f"model.name_or_path={name} is neither a directory nor a hub id.")
    return folder or _cached("model.name_or_path", "model", name, model.revision, hub())


def count_parameters(folders: Iterable[Path]) -> int | None:
    """Count from the headers of the safetensors files in the first folder that has some.

    Returns:
        None where no folder has any.

    Raises:
        UserError: a file is missing or was cut off.
    """
    for folder in folders:
        if found := weight_files(folder):
            return sum(map(_count_in_file, found))
    return None


@cache  # the tasks of an array read the same files
def _count_in_file(file: Path) -> int:
    try:
        with safe_open(file, framework="np") as opened:
            shapes = [opened.get_slice(name).get_shape() for name in opened.keys()]  # noqa: SIM118
    except FileNotFoundError as error:
        raise UserError(f"The weights are incomplete: {file} is missing.") from error
    except Exception as error:  # the library has its own
        raise UserError(f"The weights in {file} cannot be read: {first_line(error)}.") from error
    return sum(math.prod(shape) for shape in shapes)


def count_rows(data: DataConfig, hub: Callable[[], Hub]) -> Rows | None:
    """Documents of an epoch and those held out, if every row is one; None where that takes reading
    a source whole. Raises `UserError`."""
    counted = [_weighted(_count_source(each, key, hub), each) for key, each in data.sources.items()]
    if data.held_out:
        _count_source(data.held_out, "data.held_out_source", hub)
    known = [rows for rows in counted if rows]
    if len(known) < len(counted):
        return None
    return Rows(sum(rows.number for rows in known), all(rows.exact for rows in known))


def _weighted(rows: Rows | None, config: SourceConfig) -> Rows | None:
    if rows is None:
        return None
    number = min(rows.number, config.max_documents or rows.number)
    return Rows(round(number * config.weight), rows.exact and config.weight % 1 == 0)


def _count_source(config: SourceConfig, key: str, hub: Callable[[], Hub]) -> Rows | None:
    source = config.source
    if source == BUILTIN_SOURCE:
        return Rows(len(builtin.rows()))
    if not files.is_local(source):
        if not files.HUB_ID.fullmatch(source):
            raise UserError(f"{key}={source} is neither a file nor a hub id such as org/name.")
        _cached(key, "dataset", source, config.revision, hub())
        return None
    counted = []
    for path in files.find_files(source, key, config.split).paths:
        try:
            counted.append(_count(path))
        except (OSError, EOFError, ValueError, csv.Error) as error:  # pyarrow's are among them
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{key}={path} cannot be read: {reason}.") from error
    known = [rows for rows in counted if rows]
    if len(known) < len(counted):
        return None
    rows = Rows(sum(rows.number for rows in known), all(rows.exact for rows in known))
    if not rows.number:
        raise UserError(f"{key}={source} is empty.")
    return rows


def _cached(key: str, kind: str, name: str, revision: str | None, hub: Hub) -> Path | None:
    found = hub.find(kind, name, revision)
    if found is None and hub.offline:
        raise UserError(
            f"{key}={name} is not on this machine: it is no local path, the hub's cache "
            f"{hub.cache} does not hold it, and HF_HUB_OFFLINE keeps the job from asking the hub."
        )
    return found


@cache  # the tasks of an array read the same file
def _count(path: Path) -> Rows | None:
    kind = files.file_kind(path)
    if path.stat().st_size == 0:
        return Rows(0)
    if kind == "parquet":
        try:
            parquet = importlib.import_module("pyarrow.parquet")
        except ImportError:  # a login node may lack it
            return None
        return Rows(parquet.read_metadata(path).num_rows)
    if kind == "arrow" or path.suffix.lower() == ".zst":
        return None
    with path.open("rb") as raw, gzip.open(raw) as unzipped:
        text: Any = unzipped if path.suffix.lower() == ".gz" else raw
        if kind != "json":
            return _count_table(text, "\t" if kind == "tsv" else ",")
        head = text.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        text.seek(0)
        if head.startswith(b"["):
            content = text.read(_COUNTED_BYTES + 1)
            fits = len(content) <= _COUNTED_BYTES
            return Rows(len(parse_json(content.decode("utf-8-sig"), list))) if fits else None
        number = read = 0
        for line in text:
            number += not line.isspace()
            read += len(line)
            if read > _COUNTED_BYTES:
                return Rows(round(number * path.stat().st_size / raw.tell()), exact=False)
    return Rows(number)


def _count_table(text: Any, delimiter: str) -> Rows | None:
    content = text.read(_COUNTED_BYTES + 1)
    if len(content) > _COUNTED_BYTES or (delimiter == "\t" and b'"' in content):
        return None  # line breaks may stand within quotes, if they are quotes
    csv.field_size_limit(_COUNTED_BYTES)
    lines = io.StringIO(content.decode("utf-8-sig"), newline="")
    return Rows(max(0, sum(1 for row in csv.reader(lines, delimiter=delimiter) if row) - 1))

"""A run's model and data as they lie on this machine, looked at without torch.

Reads no more than takes an instant: headers of weights, numbers of rows, the hub's caches. What the
job would refuse for want of a file is refused here, with `UserError`.
"""

from __future__ import annotations

import gzip
import importlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from neftune_dist.config import BUILTIN_SOURCE, DataConfig, ModelConfig, UserError
from neftune_dist.data import builtin

_SUFFIX = re.compile(r"(\.jsonl?|\.parquet(?!\.gz))(\.gz)?$")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
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
        """The folder of a cached model (`kind` models) or dataset (datasets); None: not cached."""
        root, wanted = self.cache / f"{kind}--{name.replace('/', '--')}", revision or "main"
        reference = root / "refs" / wanted
        commit = reference.read_text().strip() if reference.is_file() else wanted
        folders = [root / "snapshots" / commit]
        if kind == "datasets":
            folders.append(self.datasets / name.replace("/", "___"))
        return next((folder for folder in folders if folder.is_dir()), None)


@dataclass(frozen=True)
class Rows:
    """How many rows a source has; `exact`: all were counted."""

    number: int
    exact: bool = True

    def __str__(self) -> str:
        return f"{'' if self.exact else 'about '}{self.number} rows"


def is_model_path(name: str) -> bool:
    """Whether `model.name_or_path` names a place on this machine, not on the hub."""
    named = name.startswith(("/", ".", "~")) or name.count("/") > 1
    return named or os.path.exists(name)


def is_data_path(source: str) -> bool:
    """Whether `data.source` names a file on this machine."""
    named = source.startswith(("/", ".", "~")) or bool(_suffix(source))
    return source != BUILTIN_SOURCE and (named or os.path.exists(source))


def find_model(model: ModelConfig, hub: Callable[[], Hub]) -> Path | None:
    """The model's directory; None where the job has to download it. Raises `UserError`."""
    name = model.name_or_path
    if model.weights is not None and not Path(model.weights).is_dir():
        raise UserError(f"model.weights={model.weights} is no directory.")
    if not is_model_path(name):
        if not _HUB_ID.fullmatch(name):
            raise UserError(f"model.name_or_path={name} is neither a directory nor a hub id.")
        return _cached("model.name_or_path", "models", name, model.revision, hub())
    path = Path(name)
    if not path.is_dir():
        raise UserError(f"model.name_or_path={name} is no model directory.")
    if not (path / "config.json").is_file():
        raise UserError(f"model.name_or_path={name} is a directory without a config.json.")
    if model.revision is not None:
        raise UserError(
            f"model.revision={model.revision} has no effect with the directory {name}: leave it "
            "out."
        )
    return path


def count_parameters(folders: Iterable[Path]) -> int | None:
    """From the headers of the safetensors files in the first folder that has some; None where none
    has. Raises `UserError` where a file is missing or was cut off."""
    for folder in folders:
        if files := _weight_files(folder):
            tensors = [tensor for file in files for tensor in _tensors(file).values()]
            return sum(int(math.prod(tensor["shape"])) for tensor in tensors)
    return None


def count_rows(data: DataConfig, hub: Callable[[], Hub]) -> Rows | None:
    """Of the source; None where that takes reading it whole. Raises `UserError`."""
    source = data.source
    if source == BUILTIN_SOURCE:
        return Rows(len(builtin.rows()))
    if not is_data_path(source):
        if not _HUB_ID.fullmatch(source):
            raise UserError(
                f"data.source={source} is neither a file nor a hub id such as org/name."
            )
        _cached("data.source", "datasets", source, data.revision, hub())
        return None
    path = Path(source)
    if not path.exists():
        raise UserError(f"data.source={path} does not exist.")
    if not _suffix(source) or not path.is_file():
        what = "is a directory" if path.is_dir() else "cannot be read"
        raise UserError(
            f"data.source={path} {what}: give a .json, .jsonl (.gz too) or .parquet file."
        )
    try:
        rows = _count(path)
    except (OSError, EOFError, ValueError) as error:  # of which pyarrow's are subclasses
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"data.source={path} cannot be read: {reason}.") from error
    if rows and not rows.number:
        raise UserError(f"data.source={path} is empty.")
    return rows


def _cached(key: str, kind: str, name: str, revision: str | None, hub: Hub) -> Path | None:
    found = hub.find(kind, name, revision)
    if found is None and hub.offline:
        raise UserError(
            f"{key}={name} is not on this machine: it is no local path, the hub's cache "
            f"{hub.cache} does not hold it, and HF_HUB_OFFLINE keeps the job from asking the hub."
        )
    return found


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    try:
        names = json.loads(index.read_text())["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no index of weight files.") from error


@cache
def _tensors(file: Path) -> dict[str, Any]:
    """What a safetensors file says it holds: 8 bytes of length, that much JSON, the tensors."""
    try:
        with file.open("rb") as opened:
            length, size = int.from_bytes(opened.read(8), "little"), file.stat().st_size
            # A damaged length must not have the whole file read.
            header = json.loads(opened.read(length)) if length < size else {}
        header.pop("__metadata__", None)
        wanted = 8 + length + max((each["data_offsets"][1] for each in header.values()), default=0)
    except FileNotFoundError as error:
        raise UserError(f"The weights are incomplete: {file} is missing.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"The weights in {file} cannot be read: {error}.") from error
    if size != wanted:
        raise UserError(f"The weights are incomplete: {file} has {size} bytes, not {wanted}.")
    return dict(header)


def _suffix(name: str) -> str:
    """The suffix that tells how to read a file, or nothing."""
    found = _SUFFIX.search(os.path.basename(name).lower())
    return found[1] if found else ""


@cache  # the tasks of an array read the same file
def _count(path: Path) -> Rows | None:
    if path.stat().st_size == 0:
        return Rows(0)
    if _suffix(path.name) == ".parquet":
        try:
            parquet = importlib.import_module("pyarrow.parquet")
        except ImportError:  # a login node may lack it
            return None
        return Rows(parquet.read_metadata(path).num_rows)
    with path.open("rb") as raw, gzip.open(raw) as unzipped:
        text: Any = unzipped if path.suffix.lower() == ".gz" else raw
        head = text.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        text.seek(0)
        if head.startswith(b"["):
            content = text.read(_COUNTED_BYTES + 1)
            fits = len(content) <= _COUNTED_BYTES
            return Rows(len(json.loads(content.decode("utf-8-sig")))) if fits else None
        number = read = 0
        for line in text:
            number += not line.isspace()
            read += len(line)
            if read > _COUNTED_BYTES:
                return Rows(round(number * path.stat().st_size / raw.tell()), exact=False)
    return Rows(number)

"""The model and the data of a run as they are on this machine, read without torch.

Reads no more than takes seconds: headers of weights, rows of files that are not long, the hub's
caches. A file that the job would miss is a `UserError` here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from safetensors import safe_open

from neftune_dist.config import BUILTIN_SOURCE, DataConfig, ModelConfig, SourceConfig, UserError
from neftune_dist.data import files
from neftune_dist.data.errors import BadRow
from neftune_dist.data.sources import open_source
from neftune_dist.model import locate
from neftune_dist.system.model_files import weight_files
from neftune_dist.system.text import first_line

_COUNTED_BYTES = 256 * 2**20  # read in seconds; rows of longer files are not counted


def find_model(model: ModelConfig) -> Path | None:
    """Return the model's directory; None where the job has to download it. Raises `UserError`."""
    name = model.name_or_path
    if model.weights is not None and not Path(model.weights).is_dir():
        raise UserError(f"model.weights={model.weights} is no directory.")
    folder = locate.find_local(model)
    if folder is None and not files.HUB_ID.fullmatch(name):
        raise UserError(f"model.name_or_path={name} is neither a directory nor a hub id.")
    return folder or _cached("model.name_or_path", "model", name, model.revision)


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
    except Exception as error:  # the library has its own
        raise UserError(f"The weights in {file} cannot be read: {first_line(error)}.") from error
    return sum(math.prod(shape) for shape in shapes)


def count_rows(data: DataConfig) -> int | None:
    """Documents of an epoch and those held out, if every row is one; None where that takes long.

    Raises:
        UserError: a source is missing, or a file of it cannot be read.
    """
    numbers = []
    for key, config in data.sources.items():
        number = _count_source(config, key)
        if number is not None:
            number = round(min(number, config.max_documents or number) * config.weight)
        numbers.append(number)
    if data.held_out:
        _count_source(data.held_out, "data.held_out_source")
    known = [number for number in numbers if number is not None]
    return sum(known) if len(known) == len(numbers) else None


def _count_source(config: SourceConfig, key: str) -> int | None:
    source = config.source
    if source == BUILTIN_SOURCE or files.is_local(source):
        return _count(key, source, config.revision, config.split)
    if not files.HUB_ID.fullmatch(source):
        raise UserError(f"{key}={source} is neither a file nor a hub id such as org/name.")
    _cached(key, "dataset", source, config.revision)
    return None


@cache  # the tasks of an array read the same files
def _count(key: str, source: str, revision: str | None, split: str) -> int | None:
    if source != BUILTIN_SOURCE:
        sizes = [path.stat().st_size for path in files.find_files(source, key, split).paths]
        if sum(sizes) > _COUNTED_BYTES:
            return None
    opened = open_source(SourceConfig(source, revision=revision, split=split), key)
    number = sum(not isinstance(row, BadRow) for _, row in opened.rows)
    if not number:
        raise UserError(f"{key}={source} has no row that can be read.")
    return number


def _cached(key: str, kind: str, name: str, revision: str | None) -> Path | None:
    """The folder of what the hub's caches hold; None where the job may ask the hub for it."""
    with suppress(OSError, ValueError):
        return Path(
            snapshot_download(name, repo_type=kind, revision=revision, local_files_only=True)
        )
    prepared = os.environ.get("HF_DATASETS_CACHE") or f"{constants.HF_HOME}/datasets"
    folder = Path(prepared, name.replace("/", "___"))  # by the package `datasets`
    if kind == "dataset" and folder.is_dir():
        return folder
    if constants.HF_HUB_OFFLINE or os.environ.get("HF_DATASETS_OFFLINE", "0") != "0":
        raise UserError(
            f"{key}={name} is not on this machine: it is no local path, the hub's cache "
            f"{constants.HF_HUB_CACHE} does not hold it, and HF_HUB_OFFLINE keeps the job from "
            "asking the hub."
        )
    return None

"""Files that an evaluation reads whole: instructions, task items, other models' answers.

They are small and complete: a row that cannot be used is an error, since figures over different
rows could not be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any, TypeVar

from neftune_dist.config import SourceConfig, UserError
from neftune_dist.config.limits import limited
from neftune_dist.data import files
from neftune_dist.data.errors import BadRow
from neftune_dist.data.sources import open_source

_SECONDS, _GIB = 60.0, 4.0  # limits for a downloaded file

T = TypeVar("T")


def read_row_file(
    name: str, key: str, convert: Callable[[Mapping[str, Any]], T], most: int = 0
) -> list[T]:
    """Read the rows of a local file, of any kind that `data.source` takes.

    Args:
        name: path of the file.
        key: the setting that names it.
        convert: makes of a row what is kept; raises `BadRow`.
        most: rows to read; 0: all.

    Raises:
        UserError: there is no such file, it has no row, or one of them cannot be used.
    """
    if not files.is_local(name):
        raise UserError(f"{key}={name} is no file (.json or .jsonl, .gz too).")
    found = []
    try:
        with limited(_SECONDS, _GIB):
            for place, row in islice(open_source(SourceConfig(name), key).rows, most or None):
                try:
                    if isinstance(row, BadRow):
                        raise row
                    found.append(convert(row))
                except BadRow as error:
                    raise UserError(f"{key}={name}, {place}: {error}.") from error
    except MemoryError as error:
        raise UserError(f"{key}={name} takes more than {_GIB:g} GiB of memory.") from error
    if not found:
        raise UserError(f"{key}={name} holds no row.")
    return found

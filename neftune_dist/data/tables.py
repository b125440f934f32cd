"""Rows of Parquet and Arrow files, read in small batches.

The offsets in a damaged or malicious table may point outside its memory, or expand to any amount of
it: batches are validated in full before a value is read, and read within limits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from neftune_dist.config.limits import limited
from neftune_dist.data.errors import LONGEST_ROW_BYTES, BadRow

_BATCH_ROWS = 1000  # converted to Python values at a time; fewer where rows are long
_BATCH_BYTES = 64 * 2**20
_BATCH_SECONDS, _BATCH_GIB = 120.0, 4.0  # limits of one batch
_BUFFER_BYTES = 2**20

Numbered = Iterator[tuple[int, "Mapping[str, Any] | BadRow"]]


def parquet_rows(path: Path) -> Numbered:
    """Rows of a Parquet file with their numbers, from 1."""
    with pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES) as file:
        yield from enumerate(_values(_parquet_batches(file)), 1)


def _parquet_batches(file: Any) -> Iterator[Any]:
    for i in range(file.num_row_groups):
        group = file.metadata.row_group(i)
        num_rows = _BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)
        yield from file.iter_batches(max(1, min(_BATCH_ROWS, num_rows)), row_groups=[i])


def arrow_rows(path: Path) -> Numbered:
    """Rows of an Arrow file, in the file format or in the stream format that `datasets` writes."""
    with pyarrow.memory_map(str(path)) as file:
        try:
            stored = pyarrow.ipc.open_file(file)
        except pyarrow.ArrowInvalid:
            file.seek(0)
            batches: Any = pyarrow.ipc.open_stream(file)
        else:
            batches = map(stored.get_batch, range(stored.num_record_batches))
        yield from enumerate(_values(batches), 1)


def _values(batches: Iterable[Any]) -> Iterator[Mapping[str, Any] | BadRow]:
    """The rows of batches, converted some at a time. Raises `ValueError` where a batch contradicts
    its header: reading its values would crash the process."""
    following = iter(batches)
    while True:
        with _batch_limits():
            batch = next(following, None)
            if batch is None:
                return
            batch.validate(full=True)
        num_rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES * batch.num_rows // max(1, batch.nbytes)))
        for first in range(0, batch.num_rows, num_rows):
            piece = batch.slice(first, num_rows)
            if piece.nbytes <= LONGEST_ROW_BYTES:
                with _batch_limits():
                    values = piece.to_pylist()
                yield from values
                continue
            for row in (piece.slice(i, 1) for i in range(piece.num_rows)):
                if row.nbytes > LONGEST_ROW_BYTES:
                    yield BadRow(f"a row of more than {LONGEST_ROW_BYTES // 2**20} MiB")
                else:
                    yield from row.to_pylist()


@contextmanager
def _batch_limits() -> Iterator[None]:
    try:
        with limited(_BATCH_SECONDS, _BATCH_GIB):
            yield
    except (TimeoutError, MemoryError) as error:  # Arrow's memory error is a MemoryError
        raise ValueError(
            f"some rows of it take more than {_BATCH_GIB:g} GiB of memory or {_BATCH_SECONDS:g} s"
        ) from error

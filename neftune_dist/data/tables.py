"""Rows of Parquet and Arrow files, read in small batches.

The offsets in a damaged or malicious table may point outside its memory, or expand to any amount of
it: batches are validated in full before a value is read, and read within limits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from neftune_dist.config.limits import limited
from neftune_dist.data.errors import LONGEST_ROW_BYTES, BadRow, Numbered, parse_json

_BATCH_ROWS = 1000  # converted to Python values at a time; fewer where rows are long
_BATCH_BYTES = 64 * 2**20
_BATCH_SECONDS, _BATCH_GIB = 120.0, 4.0  # limits of one batch
_BUFFER_BYTES = 2**20


def parquet_rows(path: Path, skip: Collection[str] = ()) -> Numbered:
    """Rows of a Parquet file with their numbers, from 1."""
    with pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES) as file:
        names = _unique(file.schema_arrow.names)
        skipped = {name: None for name in names if name in skip}
        batches = _parquet_batches(file, [name for name in names if name not in skip])
        for number, row in enumerate(rows(batches), 1):
            yield number, {**row, **skipped} if skipped and not isinstance(row, BadRow) else row


def _parquet_batches(file: Any, columns: list[str]) -> Iterator[Any]:
    for i in range(file.num_row_groups):
        group = file.metadata.row_group(i)
        num_rows = _BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)
        num_rows = max(1, min(_BATCH_ROWS, num_rows))
        yield from file.iter_batches(num_rows, row_groups=[i], columns=columns)


def arrow_rows(path: Path, skip: Collection[str] = ()) -> Numbered:
    """Rows of an Arrow file, in the file format or in the stream format that `datasets` writes."""
    with pyarrow.memory_map(str(path)) as file:
        try:
            stored = pyarrow.ipc.open_file(file)
        except pyarrow.ArrowInvalid:
            file.seek(0)
            batches: Any = pyarrow.ipc.open_stream(file)
        else:
            batches = map(stored.get_batch, range(stored.num_record_batches))
        yield from enumerate(rows(batches, skip), 1)


def rows(
    batches: Iterable[Any], skip: Collection[str] = ()
) -> Iterator[Mapping[str, Any] | BadRow]:
    """The rows of batches, converted some at a time; columns to skip are null. Raises `ValueError`
    where a batch contradicts its header: reading its values would crash the process."""
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
                yield from _converted(piece, skip)
                continue
            for row in (piece.slice(i, 1) for i in range(piece.num_rows)):
                if row.nbytes > LONGEST_ROW_BYTES:
                    yield BadRow(f"a row of more than {LONGEST_ROW_BYTES // 2**20} MiB")
                else:
                    yield from _converted(row, skip)


def _converted(batch: Any, skip: Collection[str]) -> list[dict[str, Any]]:
    with _batch_limits():
        names = _unique(batch.schema.names)
        columns = [
            [None] * batch.num_rows if name in skip else _column(name, column)
            for name, column in zip(names, batch.columns, strict=True)
        ]
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _column(name: str, array: Any) -> list[Any]:
    try:
        return _values(array)
    except (OverflowError, NotImplementedError) as error:  # a date that Python cannot hold
        raise ValueError(
            f"its column {name!a} cannot be read ({error}): data.ignore_fields={name} leaves it out"
        ) from error


def _values(array: Any) -> list[Any]:
    """The values of a column as Python's.

    A struct lacks the keys whose value is null: Arrow gives every struct of a column the keys of
    all, so that a key which no row's writer gave cannot be told from a null. Times are null: no
    text is made of them, and Python's types cannot hold all.
    """
    kind = array.type
    if pyarrow.types.is_temporal(kind):
        return [None] * len(array)
    if getattr(kind, "extension_name", "") == "arrow.json":
        return [None if text is None else parse_json(text) for text in array.storage.to_pylist()]
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _values(array.storage)
    if pyarrow.types.is_dictionary(kind):
        return _values(array.dictionary_decode())
    if pyarrow.types.is_struct(kind):
        names = _unique([field.name for field in kind])
        columns = [array.is_valid().to_pylist(), *map(_values, array.flatten())]
        return [
            {name: value for name, value in zip(names, values, strict=True) if value is not None}
            if is_valid
            else None
            for is_valid, *values in zip(*columns, strict=True)
        ]
    is_rare = pyarrow.types.is_union(kind) or pyarrow.types.is_run_end_encoded(kind)
    if is_rare or not pyarrow.types.is_nested(kind):
        return array.to_pylist()  # type: ignore[no-any-return]
    if pyarrow.types.is_map(kind):
        pairs = pyarrow.struct([("key", kind.key_type), ("value", kind.item_type)])
        lists = _values(array.cast(pyarrow.list_(pairs)))
        return [items and _mapping(items) for items in lists]
    flat = iter(_values(array.flatten()))
    lengths = array.value_lengths().to_pylist()
    return [None if length is None else list(islice(flat, length)) for length in lengths]


def _mapping(items: list[dict[str, Any]]) -> dict[Any, Any]:
    _unique([item["key"] for item in items])
    return {item["key"]: item.get("value") for item in items}


def _unique(names: list[str]) -> list[str]:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"it has two columns of the name {str(name)[:40]!a}")
    return names


def _batch_limits() -> AbstractContextManager[None]:
    return limited(_BATCH_SECONDS, _BATCH_GIB, ValueError, "reading some rows of it")

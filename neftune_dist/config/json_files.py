"""JSON files whose content is checked against a schema, with one sentence where it is damaged.

A schema is written as the value is: `int`, `str | None`, `[float]` for a list of any length,
`{"step": int, "loss?": float}` for an object that may lack the fields with a question mark and may
have others, `{str: schema}` for an object with any fields, a dataclass for an object with its
fields, `Nullable(schema)` for it or null. `float` takes whole numbers; only `bool` takes true and
false.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

from neftune_dist.config.errors import UserError, brief

_KINDS = {dict: "an object", list: "a list", str: "text", int: "a whole number", float: "a number"}
_KINDS |= {bool: "true or false", type(None): "null"}
_CHECKSUM = "checksum"
_MOST_DIGITS = 308  # of a whole number that a float can always hold
_hints = cache(get_type_hints)


@dataclass(frozen=True)
class Nullable:
    """The schema, or null."""

    schema: Any


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of an object and its checksum, which `read_json` and `parse_json` compare."""
    return {**content, _CHECKSUM: _checksum(json.loads(json.dumps(content)))}


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def read_json(path: Path, schema: Any = dict, *, fix: str = "", has_checksum: bool = False) -> Any:
    """Read a JSON file that matches a schema; a dataclass as schema gives an instance of it.

    Args:
        schema: see above.
        fix: advice for a user whose file is damaged: "remove it".
        has_checksum: whether it is damaged without a checksum, too.

    Raises:
        UserError: the file cannot be read, is no JSON, or does not match; with the place in it.
    """
    end = f"; {fix}." if fix else "."
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}{end}") from error
    try:
        return parse_json(content, schema, has_checksum)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}{end}") from error


def parse_json(content: bytes | str, schema: Any = dict, has_checksum: bool = False) -> Any:
    """Parse a JSON file's content, or a line of it, as `read_json` does. Raises `ValueError`."""
    try:
        value = json.loads(content, parse_int=_whole_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except ValueError as error:
        raise ValueError(f"it is no JSON ({error})") from None
    if isinstance(value, dict) and (has_checksum or _CHECKSUM in value):
        written = value.pop(_CHECKSUM, None)
        if written != _checksum(value):
            raise ValueError("its checksum does not match its content")
    return match_schema(value, schema)


def _whole_number(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def match_schema(value: Any, schema: Any, where: str = "it") -> Any:
    """The value, instances of dataclasses in it made. Raises `ValueError` naming the place."""
    if isinstance(schema, Nullable):
        return None if value is None else match_schema(value, schema.schema, where)
    if isinstance(schema, list):
        _check_kind(value, (list,), where)
        return [match_schema(item, schema[0], f"[{i}]") for i, item in enumerate(value)]
    if isinstance(schema, dict):
        _check_kind(value, (dict,), where)
        if str in schema:
            return {key: match_schema(item, schema[str], brief(key)) for key, item in value.items()}
        found = dict(value)
        for name, wanted in schema.items():
            key = name.removesuffix("?")
            if key in value:
                found[key] = match_schema(value[key], wanted, key)
            elif key == name:
                raise ValueError(f"it lacks {key}")
        return found
    if is_dataclass(schema):
        return _instance(value, schema, where)
    _check_kind(value, get_args(schema) if isinstance(schema, UnionType) else (schema,), where)
    return value


def _check_kind(value: Any, kinds: tuple[Any, ...], where: str) -> None:
    if Any in kinds or type(value) in kinds or (float in kinds and type(value) is int):
        return
    wanted = " or ".join(_KINDS.get(kind, kind.__name__) for kind in kinds)
    raise ValueError(f"{where} is {_KINDS[type(value)]}, not {wanted}")


def _instance(value: Any, schema: Any, where: str) -> Any:
    hints, form = _hints(schema), {}
    for field in fields(schema):
        is_needed = field.default is MISSING and field.default_factory is MISSING
        form[field.name if is_needed else f"{field.name}?"] = hints[field.name]
    match_schema(value, form, where)
    if unknown := value.keys() - hints.keys():
        raise ValueError(f"{brief(min(unknown))} is no field of it")
    return schema(**value)

"""JSON files whose content has a form: read, checked, and one sentence where they are damaged.

A form is written as the value is: `int`, `str | None`, `[float]` for a list of any length,
`{"step": int, "loss?": float}` for an object with at least the fields that have no question mark,
`{str: form}` for an object with any fields, a dataclass for an object with its fields,
`Optional(form)` for it or null. `float` takes whole numbers; only `bool` takes true and false.
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


@dataclass(frozen=True)
class Optional:
    """The form, or null."""

    form: Any


_KINDS = {dict: "an object", list: "a list", str: "text", int: "a whole number", float: "a number"}
_KINDS |= {bool: "true or false", type(None): "null"}


_CHECKSUM = "checksum"


def checksummed(content: Mapping[str, Any]) -> dict[str, Any]:
    """An object that says of itself whether it is whole: `read_json` and `parse_json` look."""
    return {**content, _CHECKSUM: _checksum(json.loads(json.dumps(content)))}


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def read_json(path: Path, form: Any = dict, *, fix: str = "") -> Any:
    """The content of a JSON file, which has the form; where that is a dataclass, an instance.

    Args:
        fix: what a user can do where the file is damaged: "remove it".

    Raises:
        UserError: the file cannot be read, is no JSON, or has another form; with the place in it.
    """
    end = f"; {fix}." if fix else "."
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}{end}") from error
    try:
        return parse_json(content, form)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}{end}") from error


def parse_json(content: bytes | str, form: Any = dict) -> Any:
    """As `read_json`, of a file's content or one line of it. Raises `ValueError`."""
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except ValueError as error:
        raise ValueError(f"it is no JSON ({error})") from None
    if isinstance(value, dict) and _CHECKSUM in value:
        written = value.pop(_CHECKSUM)
        if written != _checksum(value):
            raise ValueError("it is not what was written: its checksum is another")
    return formed(value, form)


def formed(value: Any, form: Any, where: str = "it") -> Any:
    """The value, which has the form (see above). Raises `ValueError` naming the place."""
    if isinstance(form, Optional):
        return None if value is None else formed(value, form.form, where)
    if isinstance(form, list):
        _check_kind(value, (list,), where)
        return [formed(each, form[0], f"[{i}]") for i, each in enumerate(value)]
    if isinstance(form, dict):
        _check_kind(value, (dict,), where)
        if str in form:
            return {key: formed(each, form[str], brief(key)) for key, each in value.items()}
        found = dict(value)
        for name, each in form.items():
            key = name.removesuffix("?")
            if key in value:
                found[key] = formed(value[key], each, key)
            elif key == name:
                raise ValueError(f"it lacks {key}")
        return found
    if is_dataclass(form):
        return _instance(value, form, where)
    _check_kind(value, get_args(form) if isinstance(form, UnionType) else (form,), where)
    return value


def _check_kind(value: Any, kinds: tuple[Any, ...], where: str) -> None:
    if Any in kinds or type(value) in kinds or (float in kinds and type(value) is int):
        return
    wanted = " or ".join(_KINDS.get(kind, kind.__name__) for kind in kinds)
    raise ValueError(f"{where} is {_KINDS[type(value)]}, not {wanted}")


def _instance(value: Any, form: Any, where: str) -> Any:
    _check_kind(value, (dict,), where)
    hints, known = _hints(form), {field.name: field for field in fields(form)}
    for key in value:
        if key not in known:
            raise ValueError(f"{brief(key)} is no field of it")
    for key, field in known.items():
        if key in value:
            formed(value[key], hints[key], key)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"it lacks {key}")
    return form(**value)


@cache
def _hints(form: Any) -> dict[str, Any]:
    return get_type_hints(form)

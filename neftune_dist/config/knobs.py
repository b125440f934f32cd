"""Knobs: the fields of a configuration, each declared once with its type, default and limits.

`choice`, `number` and `path` make dataclass fields that carry what is allowed; the docstring below
a field describes it. Validation, the reference of all settings (`reference`) and its JSON schema
are derived from them.
"""

from __future__ import annotations

import ast
import inspect
import json
import math
import operator
import re
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from itertools import pairwise
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from neftune_dist.config.errors import UserError, brief
from neftune_dist.config.paths import user_path

_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_KINDS |= {list: "a list of entries", dict: "a mapping of names"}
_COMPARISONS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
_TOO_GREAT = 2**1000  # for a float, and to be shown
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


def choice(*values: Any) -> Any:
    """A field that takes one of `values`; the first is the default."""
    return field(default=values[0], metadata={"choices": values})


def number(default: float | None, **bounds: float) -> Any:
    """A field for a finite number within bounds, which are named as in `operator` and pydantic: ge,
    gt, le, lt."""
    return field(default=default, metadata={"bounds": {**bounds, "lt": bounds.get("lt", math.inf)}})


def path(default: str | None) -> Any:
    """A field that names a file or a folder, or may do so."""
    return field(default=default, metadata={"is_path": True})


@dataclass(frozen=True)
class Knob:
    """One setting and all that is known about it without looking at the others.

    Attributes:
        key: dotted; `data.mixture[].weight` for a field of a list's entries.
        types: Python types it takes; NoneType among them where it may be null.
        default: its value where nothing sets it.
        choices: the values it takes; empty: any.
        bounds: limits by the name of their comparison: ge, gt, le, lt.
        is_path: whether it names a file or a folder, or may do so.
        section: the dataclass that declares it.
    """

    section: Any
    key: str
    types: tuple[type, ...]
    default: Any
    choices: tuple[Any, ...] = ()
    bounds: Mapping[str, float] = field(default_factory=dict)
    is_path: bool = False

    @property
    def description(self) -> str:
        """The sentence below its declaration."""
        return _descriptions(self.section)[self.key.rpartition(".")[2]]

    @property
    def kind(self) -> str:
        """Its type in words: "a whole number or null"."""
        return _KINDS[self.types[0]] + (" or null" if NoneType in self.types else "")

    @property
    def allowed(self) -> str:
        """Its choices or its range in words; empty where any value is allowed."""
        if self.choices:
            return ", ".join(str(value) for value in self.choices if value is not None)
        finite = {name: bound for name, bound in self.bounds.items() if math.isfinite(bound)}
        return " and ".join(f"{_COMPARISONS[name]} {bound}" for name, bound in finite.items())

    @property
    def words(self) -> list[str]:
        """The words that may be written, where they can be listed."""
        choices = (True, False) if self.types == (bool,) else self.choices
        return [json.dumps(value).strip('"') for value in choices]

    @property
    def values(self) -> str:
        """What may be written: "bf16 | fp32", or "a number, at least 0 and at most 10"."""
        if self.choices:
            return " | ".join(self.words)
        return ", ".join(filter(None, (self.kind, self.allowed)))

    def check_type(self, name: str, value: Any) -> None:
        """Refuse a value of another type by a `UserError` that calls the knob `name`."""
        # By type(), because True is an instance of int; "???" is OmegaConf's word for no value.
        allowed = (*self.types, int) if float in self.types else self.types
        if type(value) is int and abs(value) >= _TOO_GREAT:
            raise UserError(f"{name} is a number of too many digits.")
        if type(value) not in allowed or value == "???":
            quotes = str in self.types and type(value) in (int, float, bool)
            shown = "null" if value is None else brief(value)
            fix = ": put it in quotes" if quotes else ""
            if type(value) is str and re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", value, re.I):
                fix = ": leave out its quotes"
            raise UserError(f"{name}={shown} is not {self.kind}{fix}.")

    def check(self, name: str, value: Any) -> None:
        """Refuse a value that is not allowed by a `UserError` that calls the knob `name`."""
        if self.choices and value not in self.choices:
            raise UserError(f"{name}={brief(value)} is not known; allowed: {self.allowed}.")
        if value is None:
            return
        if isinstance(value, str) and not value.replace(",", " ").strip():
            raise UserError(f"{name} is empty.")
        # NaN fails every comparison.
        if not all(getattr(operator, test)(value, bound) for test, bound in self.bounds.items()):
            finite = "" if math.isfinite(value) else " and finite"
            raise UserError(f"{name}={value} is out of range: it must be {self.allowed}{finite}.")
        if isinstance(value, str) and _UNPRINTABLE.search(value):
            raise UserError(f"{name}={value!a} contains control characters.")
        if self.is_path:
            user_path(value, name)


def find_knobs(section: Any, prefix: str = "") -> dict[str, Knob]:
    """The knobs of a configuration's dataclass by their keys, those of its sections included."""
    found: dict[str, Knob] = {}
    hints = get_type_hints(section)
    for declared in fields(section):
        key, hint = prefix + declared.name, hints[declared.name]
        if is_dataclass(hint):
            found |= find_knobs(hint, f"{key}.")
            continue
        # The dataclass of a list's entries.
        entry = next((item for item in get_args(hint) if is_dataclass(item)), None)
        members = get_args(hint) if NoneType in get_args(hint) else (hint,)
        types = (list,) if entry else tuple(get_origin(member) or member for member in members)
        factory = declared.default_factory
        default = declared.default if factory is MISSING else factory()
        found[key] = Knob(section, key, types, default, **declared.metadata)
        if entry:
            found |= find_knobs(entry, f"{key}[].")
    return found


@cache
def _descriptions(section: Any) -> dict[str, str]:
    """The docstring below each field of a dataclass, which Python keeps in the source alone."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for statement, following in pairwise(definition.body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            match following:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    found[statement.target.id] = " ".join(text.split())
    return found

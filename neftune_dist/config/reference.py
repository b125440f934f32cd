"""The reference of every setting, derived from its declaration: as YAML for people, as a JSON
schema for editors."""

from __future__ import annotations

import difflib
import inspect
import json
import math
import textwrap
from collections.abc import Iterator
from types import NoneType
from typing import Any

import yaml

from neftune_dist.config.config import KNOBS
from neftune_dist.config.errors import UserError, brief
from neftune_dist.config.knobs import Knob

_SECTIONS = list(dict.fromkeys(key.partition(".")[0] for key in KNOBS if "." in key))
_JSON_TYPES = {
    dict: "object",
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    list: "array",
    NoneType: "null",
}
_JSON_BOUNDS = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
}


def reference(key: str = "") -> str:
    """The reference of all settings or of a section, as YAML; or of one setting, as it is written
    on the command line.

    Above a setting stands its description, after it its type and choices or range. The whole loads
    as the defaults.

    Args:
        key: a section or a setting, such as `noise` or `noise.alpha`; "": all.

    Raises:
        UserError: the key is unknown.
    """
    if not key:
        sections = (f"{_comment(_meaning(f'{name}.'))}\n{_section(name)}" for name in _SECTIONS)
        return "\n\n".join([_settings(""), *sections])
    if key in _SECTIONS:
        return _section(key)
    if key not in KNOBS:
        near = difflib.get_close_matches(key, [*KNOBS, *_SECTIONS], n=1)
        hint = f"did you mean {near[0]}?" if near else f"sections are {', '.join(_SECTIONS)}."
        raise UserError(f"There is no setting {brief(key)}; {hint}")
    knob = KNOBS[key]
    return f"{_comment(knob.description)}\n{key}={json.dumps(knob.default)}  # {knob.values}"


def _section(name: str) -> str:
    return f"{name}:\n{textwrap.indent(_settings(f'{name}.'), '  ')}"


def _settings(prefix: str) -> str:
    """The settings right below a prefix, those of a list's entries as comments."""
    lines = []
    for name, knob in _below(prefix):
        value = yaml.safe_dump({name: knob.default}, allow_unicode=True).strip()
        lines += [_comment(knob.description), f"{value}  # {knob.values}"]
        if entries := _settings(f"{knob.key}[]."):
            lines.append(textwrap.indent(entries, "#   "))
    return "\n".join(lines)


def _below(prefix: str) -> Iterator[tuple[str, Knob]]:
    """The names and the knobs right below a prefix: "" for the whole, `noise.` for a section,
    `data.mixture[].` for a list's entries."""
    for key, knob in KNOBS.items():
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and "." not in name:
            yield name, knob


def _meaning(prefix: str) -> str:
    """The docstring of the section whose settings stand below a prefix."""
    _, first = next(_below(prefix))
    return inspect.getdoc(first.section) or ""


def _comment(text: str) -> str:
    return textwrap.fill(text, 96, initial_indent="# ", subsequent_indent="# ")


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a configuration file, for editors that check and complete
    YAML by one."""
    schema = _section_schema("")
    extends = {
        "type": "string",
        "description": "A file beside this one, or a shipped one's name: its settings come first.",
    }
    sections = {name: _section_schema(f"{name}.") for name in _SECTIONS}
    schema["properties"] = {"extends": extends, **schema["properties"], **sections}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A configuration of neftune_dist",
        **schema,
    }


def _section_schema(prefix: str) -> dict[str, Any]:
    return {
        "type": "object",
        "description": _meaning(prefix),
        "properties": {name: _knob_schema(knob) for name, knob in _below(prefix)},
        "additionalProperties": False,
    }


def _knob_schema(knob: Knob) -> dict[str, Any]:
    """What one setting may be; also an interpolation such as `${oc.env:ALPHA}`, which is text."""
    types = [_JSON_TYPES[kind] for kind in knob.types]
    allowed: dict[str, Any] = {"type": types if len(types) > 1 else types[0]}
    if knob.choices:
        allowed = {"enum": list(knob.choices)}
    for test, bound in knob.bounds.items():
        if math.isfinite(bound):
            allowed[_JSON_BOUNDS[test]] = bound
    free_text = str in knob.types and not knob.choices
    if not free_text and not {list, dict} & {*knob.types}:
        interpolation = {"type": "string", "pattern": r"\$\{.*\}"}
        allowed = {"anyOf": [allowed, interpolation]}
    items = {"items": _section_schema(f"{knob.key}[].")} if list in knob.types else {}
    return {**allowed, "default": knob.default, "description": knob.description, **items}

"""The reference of every setting, derived from its declaration: as YAML for people, as a JSON
schema for editors."""

from __future__ import annotations

import difflib
import inspect
import json
import math
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Any, get_type_hints

import yaml

from neftune_dist.config.config import KNOBS, Config
from neftune_dist.config.errors import UserError, brief
from neftune_dist.config.knobs import Knob, descriptions, entry_type

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
        return "\n".join(_section_lines(Config, ""))
    section = get_type_hints(Config).get(key)
    if is_dataclass(section):
        return "\n".join([f"{key}:", *_indented(_section_lines(section, f"{key}."))])
    if key not in KNOBS:
        names = [name for name, hint in get_type_hints(Config).items() if is_dataclass(hint)]
        near = difflib.get_close_matches(key, [*KNOBS, *names], n=1)
        hint = f"did you mean {near[0]}?" if near else f"sections are {', '.join(names)}."
        raise UserError(f"There is no setting {brief(key)}; {hint}")
    default = json.dumps(KNOBS[key].default)
    return "\n".join([*_comment(describe(key)), f"{key}={default}  # {KNOBS[key].values}"])


def describe(key: str) -> str:
    """The sentence that describes a setting."""
    *above, name = key.split(".")
    section: Any = Config
    for part in above:
        hint = get_type_hints(section)[part.removesuffix("[]")]
        section = entry_type(hint) or hint
    return descriptions(section).get(name, "")


def _section_lines(section: Any, prefix: str) -> Iterator[str]:
    hints = get_type_hints(section)
    for declared in fields(section):
        name, hint = declared.name, hints[declared.name]
        if is_dataclass(hint):
            yield from ("", *_comment(inspect.getdoc(hint) or ""), f"{name}:")
            yield from _indented(_section_lines(hint, f"{prefix}{name}."))
        else:
            yield from _knob_lines(section, name, prefix)


def _knob_lines(section: Any, name: str, prefix: str) -> Iterator[str]:
    """The lines of one setting, and of those of a list's entries as comments below it."""
    knob = KNOBS[prefix + name]
    yield from _comment(descriptions(section)[name])
    value = yaml.safe_dump({name: knob.default}, allow_unicode=True).strip()
    yield f"{value}  # {knob.values}"
    if entry := entry_type(get_type_hints(section)[name]):
        yield from (f"#   {line}" for line in _section_lines(entry, f"{prefix}{name}[]."))


def _indented(lines: Iterator[str]) -> Iterator[str]:
    return (f"  {line}" for line in lines)


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, 94)]


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a configuration file, for editors that check and complete
    YAML by one."""
    schema = _section_schema(Config, "")
    extends = {
        "type": "string",
        "description": "A configuration file beside this one, whose settings come first.",
    }
    schema["properties"] = {"extends": extends, **schema["properties"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A configuration of neftune_dist",
        **schema,
    }


def _section_schema(section: Any, prefix: str) -> dict[str, Any]:
    hints, properties = get_type_hints(section), {}
    for declared in fields(section):
        name, hint = declared.name, hints[declared.name]
        if is_dataclass(hint):
            properties[name] = _section_schema(hint, f"{prefix}{name}.")
            continue
        found = _knob_schema(KNOBS[prefix + name])
        found["description"] = descriptions(section)[name]
        if entry := entry_type(hint):
            found["items"] = _section_schema(entry, f"{prefix}{name}[].")
        properties[name] = found
    return {
        "type": "object",
        "description": inspect.getdoc(section) or "",
        "properties": properties,
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
    return {**allowed, "default": knob.default}

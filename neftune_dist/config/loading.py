"""A configuration from its sources: defaults, then YAML, then `key=value` words."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from neftune_dist.config.checks import check
from neftune_dist.config.config import KNOBS, Config
from neftune_dist.config.errors import UserError, brief
from neftune_dist.config.limits import limited
from neftune_dist.config.shipped import find_config

_MAX_DEPTH = 100  # of nested lists and mappings
# YAML 1.1 reads 064 as octal, 52, and 1:30 as sexagesimal, 90.
_AMBIGUOUS = re.compile(r"[-+]?(0[0-7_]+|[1-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")
_LISTS, _MAPPINGS = (
    [key for key, knob in KNOBS.items() if kind in knob.types and "[" not in key]
    for kind in (list, dict)
)
_INDEX = re.compile(r"\[(\d{1,9})\](\.|\Z)")  # of an entry of a list
# Aliases (`*name`) and interpolations let a short file stand for any amount of content.
_READING_SECONDS, _READING_GIB = 20.0, 1.0


def load_config(path: str | os.PathLike[str] | None, words: Sequence[str] = ()) -> Config:
    """Load and check a configuration: defaults, then a YAML file, then `key=value` words.

    `path` may be the name of a shipped configuration, too. A file may begin with `extends:
    OTHER.yaml`, a file beside it or a shipped one's name, whose settings come first.

    Raises `UserError` naming the key, the value and what is allowed.
    """
    where = f"The configuration {brief(path if path is not None else ' '.join(words))}"
    try:
        with limited(_READING_SECONDS, _READING_GIB, UserError, where):
            return _load(path, words)
    except RecursionError as error:
        raise UserError(f"{where} nests too deeply, or its aliases repeat too much.") from error


def _load(path: str | os.PathLike[str] | None, words: Sequence[str]) -> Config:
    config = OmegaConf.structured(Config)
    for where, update in [] if path is None else _read_files(find_config(path)):
        _merge(config, update, where)
    for word in words:
        _merge(config, _read_word(word, config), f"'{brief(word)}'")
    try:
        resolved = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key} cannot be resolved: {_reason(error)}.") from error
    assert isinstance(resolved, Config)
    check(resolved, [word.partition("=")[0] for word in words])
    return resolved


def _merge(config: Any, update: dict[str, Any], where: str) -> None:
    """Put settings into the configuration. A mapping of names replaces the one before, whose names
    could not be taken back otherwise."""
    _check_update(update, where)
    try:
        for key in _MAPPINGS:
            section, name = key.split(".")
            if name in update.get(section, ()):
                config[section][name] = {}
        config.merge_with(update)  # in place: `OmegaConf.merge` would copy all for each word
    except OmegaConfBaseException as error:
        raise UserError(f"{where} cannot be read: {_reason(error)}.") from error


def _read_yaml(path: Path) -> Any:
    if path.is_fifo():
        raise UserError(f"{path} is a pipe: give a file, since a configuration is read repeatedly.")
    try:
        _check_text(path.read_text(encoding="utf-8"))
        loaded = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        raise UserError(f"{path} is not valid YAML{line}: {_reason(error)}.") from error
    except (OSError, ValueError) as error:  # not a file, not UTF-8, only a bare word
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"The configuration file {path} cannot be read: {reason}.") from error
    if not OmegaConf.is_dict(loaded):
        raise UserError(f"{path} must hold sections such as 'model:' and 'noise:'.")
    return OmegaConf.to_container(loaded, resolve=False)


def _check_text(text: str) -> None:
    """Refuse deep nesting before the parser, which is written in C, overflows the stack, and
    numbers that mean others than they show."""
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise YAMLError(f"lists and mappings nest more than {_MAX_DEPTH} levels deep")
        is_plain = isinstance(event, yaml.ScalarEvent) and event.implicit[0]
        if is_plain and _AMBIGUOUS.fullmatch(event.value):
            problem = (
                f"{brief(event.value)} is not decimal in YAML: write the number without leading "
                "zeros or colons, or put text in quotes"
            )
            raise MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def _read_files(path: Path, extended_by: tuple[Path, ...] = ()) -> list[tuple[str, Any]]:
    """The settings of the files that this one extends, then its own, each with its file's name."""
    loaded = _read_yaml(path)
    if "extends" not in loaded:
        return [(str(path), loaded)]
    extends = loaded.pop("extends")
    if not isinstance(extends, str) or not extends:
        raise UserError(f"{path}: extends={brief(extends)} is not a file name.")
    parent = find_config(extends, path.parent)
    chain = (*extended_by, path)
    if os.path.realpath(parent) in map(os.path.realpath, chain):
        raise UserError(f"{path}: extends={extends} leads back to the file itself.")
    return [*_read_files(parent, chain), (str(path), loaded)]


def _read_word(word: str, config: Any) -> Any:
    """The update by a `key=value` word. One that goes into a list or a mapping of the configuration
    so far, as `data.mixture[0].weight=2` does, has the whole of that."""
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise UserError(f"'{brief(word)}' is not of the form key=value, such as noise.alpha=5.")
    types = KNOBS[_pattern(key)].types if _pattern(key) in KNOBS else ()
    if str in types and text != "null":
        text = json.dumps(text, ensure_ascii=False)  # quoted: YAML reads run_dir=007 as 7
    try:
        _check_text(text)
        given: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"x={text}"]), resolve=False)
        update = OmegaConf.create()
        inside = (*(f"{k}." for k in _MAPPINGS), *(f"{k}[" for k in _LISTS))
        if whole := next((k[:-1] for k in inside if key.startswith(k)), None):
            section, name = whole.split(".")
            stored: Any = OmegaConf.to_container(config, resolve=False)
            current = stored[section][name]
            index = _INDEX.match(key, len(whole))
            if isinstance(current, list) and not (index and int(index[1]) < len(current)):
                raise UserError(
                    f"'{brief(word)}': {whole} has {len(current)} entries, numbered from 0."
                )
            update = OmegaConf.create({section: {name: current}})
        OmegaConf.update(update, key, _spaced(given["x"]), merge=False)
        return OmegaConf.to_container(update, resolve=False)
    except (YAMLError, OmegaConfBaseException, RecursionError, ValueError, LookupError) as error:
        raise UserError(f"{brief(word)!a} cannot be read: {_reason(error)}.") from error


def _spaced(item: Any) -> Any:
    """Split entries without spaces, {source:a.json,weight:2}, which YAML reads as keys alone."""
    if isinstance(item, list):
        return [_spaced(part) for part in item]
    if not isinstance(item, dict):
        return item
    spaced: dict[Any, Any] = {}
    for key, value in item.items():
        name, colon, text = str(key).partition(":")
        spaced |= {name: OmegaConf.from_dotlist([f"x={text}"])["x"]} if colon else {key: value}
    return spaced


def _check_update(update: dict[Any, Any], where: str, prefix: str = "") -> None:
    """Refuse unknown keys and wrong types; the value of an interpolation is checked later."""
    for name, value in update.items():
        key = f"{prefix}{name}"
        pattern = f"{_pattern(prefix)}{name}"
        if pattern in KNOBS and "." not in str(name):
            if KNOBS[pattern].types == (list,):
                _check_list(key, value, where)
            elif not (isinstance(value, str) and "${" in value):
                KNOBS[pattern].check_type(f"{where}: {key}", value)
        elif any(known.startswith(f"{pattern}.") for known in KNOBS):
            if not isinstance(value, dict):
                raise UserError(f"{where}: {key} is a section and takes keys below it.")
            _check_update(value, where, f"{key}.")
        else:
            raise UserError(f"{where}: unknown key {brief(key)}; {_hint(brief(key), prefix)}")


def _check_list(key: str, items: Any, where: str) -> None:
    form = f"{key}=[{{source: a.json, weight: 2}}, {{source: b.json}}]"
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise UserError(f"{where}: {key} is a list of entries, such as {form}.")
    for i, item in enumerate(items):
        _check_update(item, where, f"{key}[{i}].")
        if not item.get("source"):
            raise UserError(f"{where}: {key}[{i}] names no source; write {form}.")


def _pattern(key: str) -> str:
    """The key under which a knob is known: data.mixture[].weight for data.mixture[0].weight."""
    return re.sub(r"\[\d+\]", "[]", key)


def _hint(key: str, prefix: str) -> str:
    if key in KNOBS:
        section, _, name = key.rpartition(".")
        return f"write '{section}:' and, on the next line, indented, '{name}:'."
    pattern, sections = _pattern(prefix), () if prefix else vars(Config())
    near = difflib.get_close_matches(key, [*KNOBS, *sections], n=1)
    if near:
        return f"did you mean {near[0].replace(pattern, prefix)}?"
    below = (known.removeprefix(pattern) for known in KNOBS if known.startswith(pattern))
    return f"known: {', '.join(sorted({name.split('.')[0].strip('[]') for name in below}))}."


def _reason(error: Exception) -> str:
    """One line of an error's message, without the full stop."""
    text = str(getattr(error, "problem", None) or error).strip() or type(error).__name__
    line = text.splitlines()[0].rstrip(".")
    return line if len(line) <= 200 else f"{line[:197]}..."

"""A commented configuration to begin with."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from neftune_dist.config import (
    KNOBS,
    Config,
    UserError,
    load_config,
    settings_yaml,
    shipped_configs,
    user_path,
)
from neftune_dist.planning.report import GIB, needed, read

_BASE = "alpaca-7b"
# What a run decides; the starter also has whatever else its base sets.
_DECISIVE = (
    "run_dir",
    "model.name_or_path",
    "model.activation_checkpointing",
    "data.source",
    "data.template",
    "data.max_length",
    "data.num_held_out",
    "noise.alpha",
    "engine.name",
    "optim.learning_rate",
    "optim.warmup_steps",
    "train.num_epochs",
    "train.global_batch_size",
    "train.micro_batch_tokens",
    "checkpoint.every_steps",
    "evaluate.every_steps",
)
_WORLD_SIZES = (1, 8)


def write_configuration(name: str, words: Sequence[str], output: Path | None) -> Path:
    """Write a commented configuration.

    Args:
        name: a shipped configuration to begin from, or the name of a new run, which begins from
            `alpaca-7b`.
        words: settings, `key=value`.
        output: the file; None: NAME.yaml.

    Raises:
        UserError: a wrong setting, or a file that exists.
    """
    path = output or user_path(f"{name}.yaml", "NAME")
    if path.exists():
        raise UserError(f"{path} exists and is not overwritten: choose another with --output.")
    base = shipped_configs().get(name, shipped_configs()[_BASE])
    config = load_config(base, [f"run_dir=runs/{Path(name).name}", *words])
    lines = [
        f"# {name}: each setting stands below its meaning; its allowed values follow it. All other",
        "# settings have their defaults: neftune-dist config",
        *(f"# {line}" for line in _memory_lines(config, path)),
        *_setting_lines(config),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("x", encoding="utf-8") as file:  # another process may have made it meanwhile
        try:
            file.write("\n".join(lines) + "\n")
            file.flush()
        except OSError as error:  # no half of a configuration is left behind
            path.unlink()
            raise UserError(f"{path} cannot be written: {error.strerror}.") from error
    return path


def _setting_lines(config: Config) -> Iterator[str]:
    """The decisive settings and those that differ from their defaults, section by section."""
    section, values = "", config.to_dict()
    for key, knob in KNOBS.items():
        if "[]" in key:
            continue
        above, _, name = key.rpartition(".")
        value = (values[above] if above else values)[name]
        if key not in _DECISIVE and value == knob.default:
            continue
        if above != section:
            section = above
            yield from ("", f"{above}:")
        indent = "  " if above else ""
        yield from (f"{indent}# {line}" for line in textwrap.wrap(knob.description, 94))
        *lines, last = settings_yaml({name: value}).rstrip("\n").split("\n")
        yield from (f"{indent}{line}" for line in (*lines, f"{last}  # {knob.values}"))


def _memory_lines(config: Config, path: Path) -> list[str]:
    """What `plan` finds for full micro-batches; how to ask it, where the model cannot be read."""
    try:
        given = read(config, with_data=False)
        found = [
            f"{needed(given.peak(config, size)) / GIB:.1f} GiB a rank on {size}"
            for size in _WORLD_SIZES
        ]
    except UserError:
        return [f"Memory: neftune-dist plan {path} --world-size 8, where the model can be read."]
    return [f"Memory by `neftune-dist plan`, full micro-batches: {', '.join(found)}."]

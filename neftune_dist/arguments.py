"""The parser of the command line, made from its verbs. Imports nothing heavy."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from neftune_dist import __version__
from neftune_dist.config import KNOBS, UserError, user_path
from neftune_dist.distributed import outcome

Run = TypeVar("Run", bound=Callable[..., int])
Argument = tuple[tuple[str, ...], dict[str, Any]]


# Verbs by their names: the function, which takes the arguments by name and returns the exit code,
# and the arguments.
VERBS: dict[str, tuple[Callable[..., int], tuple[Argument, ...]]] = {}


def verb(*arguments: Argument) -> Callable[[Run], Run]:
    """Make a function a verb: called without the underscore, its docstring the help."""

    def register(run: Run) -> Run:
        VERBS[run.__name__.removeprefix("_")] = run, arguments
        return run

    return register


def argument(*names: str, **options: Any) -> Argument:
    """An argument of a verb, as `add_argument` takes it; text may not be empty."""
    if options.get("action", "append") == "append":
        options.setdefault("type", _text)
    return names, options


def flag(name: str, help: str) -> Argument:
    """An argument that is given or not."""
    return argument(name, action="store_true", help=help)


def _text(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("it is empty: give a value, or leave it out")
    return text


def bounded(kind: type[int] | type[float], least: float, greatest: float) -> Callable[[str], float]:
    """An argument's type: a number from `least` to `greatest`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text[:60]!r} is not {wanted}") from None
        if not least <= value <= greatest:  # written so that NaN is refused
            raise argparse.ArgumentTypeError(
                f"{value} is out of range: it must be at least {least} and at most {greatest}"
            )
        return value

    return parse


def _run_dir(text: str) -> Path:
    path = user_path(text, "RUN_DIR")
    if path.is_file():
        raise UserError(f"RUN_DIR={text} is a file: give the directory of a run.")
    for part in (path, path.parent):
        # A run may itself lie in a folder of that name.
        if part.name == "checkpoints" and (part.parent / "config.yaml").is_file():
            raise UserError(
                f"RUN_DIR={text} is a part of a run: give its directory, {part.parent}."
            )
    return path


# Arguments of several verbs.
Words = Sequence[str]
WHOLE = bounded(int, 0, 2**20)

_SETTINGS = partial(argument, "settings", nargs="*", default=[], metavar="key=value")
SETTINGS = _SETTINGS(help="such as noise.alpha=5")
EVALUATION_SETTINGS = _SETTINGS(help="such as evaluate.max_instructions=50")
CONFIG = (
    argument("config", help="YAML file, or the name of a shipped one, such as alpaca-7b"),
    SETTINGS,
)
RUN_DIR = argument("run_dir", type=_run_dir, help="directory of a run")
OUTPUT = partial(argument, "--output", type=partial(user_path, key="--output"))
MAX_RESTARTS = argument(
    "--max-restarts",
    type=WHOLE,
    default=3,
    help="attempts in a row without a new checkpoint before giving up; default: %(default)s",
)
RENDEZVOUS_MINUTES = argument(
    "--rendezvous-minutes",
    dest="minutes",
    type=bounded(float, 0.01, 2**20),
    default=15.0,
    help="how long nodes wait for each other; default: %(default)s",
)
STEP = argument(
    "--step", type=bounded(int, 0, 2**32), help="step of the run's checkpoint; default: the newest"
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help).")


def parse(words: Sequence[str] | None = None) -> dict[str, Any]:
    """The arguments of a command line by their names, with `verb`. Raises `UserError`."""
    codes = f"{outcome.EXIT_DONE} done, {outcome.EXIT_MISTAKE} a mistake in configuration or input"
    parser = _Parser(
        prog="neftune-dist",
        description="Fine-tune causal language models with exact NEFTune noise over FSDP2 or "
        "DeepSpeed ZeRO.",
        epilog=f"Exit codes: {codes}, {outcome.EXIT_STOPPED} stopped at a checkpoint to be "
        "continued, anything else a failure.",
    )
    parser.add_argument("--version", action="version", version=f"neftune-dist {__version__}")
    parsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (run, arguments) in VERBS.items():
        summary, _, notes = (inspect.getdoc(run) or "").partition("\n\n")
        added = parsers.add_parser(name, help=summary, description=summary, epilog=notes)
        for names, options in arguments:
            added.add_argument(*names, **options)
    # argparse takes key=value words in one place only; here they may stand after options, too.
    given, rest = parser.parse_known_args(words)
    takes_settings = hasattr(given, "settings")
    late = [w for w in rest if takes_settings and "=" in w and not w.startswith("-")]
    if unknown := [word for word in rest if word not in late]:
        name = unknown[0].removeprefix("--").partition("=")[0]
        hint = f"; a setting is written {name}=VALUE" if takes_settings and name in KNOBS else ""
        parser.error(f"unknown words: {' '.join(unknown)}{hint}")
    if late:
        given.settings = [*given.settings, *late]
    return vars(given)

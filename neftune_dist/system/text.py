"""Errors, numbers, sizes and durations as people read them."""

from __future__ import annotations

import math
import re

_MOST = 300  # characters of an error of several lines
# Control characters, and those that turn the direction of a text; not the spaces and joiners with
# which Japanese, Persian or an emoji is written.
_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without a full stop, and those that follow where it
    ends with a colon; the error's type where it has none."""
    said = str(error).strip() or type(error).__name__
    first = said.splitlines()[0]
    return (" ".join(said.split())[:_MOST] if first.rstrip().endswith(":") else first).rstrip(".")


def printable(text: str) -> str:
    """Return a text of unknown origin with U+FFFD in place of every character that would control a
    terminal, other than tabs and line breaks."""
    return _OBEYED.sub("\ufffd", text)


def count_text(number: int, noun: str) -> str:
    """A number of things: 1 seed, 2 seeds."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def size_text(num_bytes: float) -> str:
    """A size in MiB or GiB: 1.5 GiB."""
    large = num_bytes >= 2**29
    return f"{num_bytes / 2**30:.1f} GiB" if large else f"{num_bytes / 2**20:.1f} MiB"


def duration_text(seconds: float) -> str:
    """A duration in its two largest units: 3 h 20 min. `?` where it is not finite."""
    if not math.isfinite(seconds):
        return "?"
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"

"""The processor's name and instruction sets, as Linux lists them."""

from __future__ import annotations

import platform
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")


def processor_name() -> str:
    """The processor's name, or its architecture where the system does not name it."""
    return next(iter(_listed("model name")), platform.machine())


def instruction_sets() -> set[str]:
    """Names of the processor's instruction sets; none where the system does not list them."""
    return {
        flag for key in ("flags", "Features") for flags in _listed(key) for flag in flags.split()
    }


def _listed(key: str) -> list[str]:
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:  # Linux alone has the file
        return []
    fields = (line.partition(":") for line in lines)
    return [value.strip() for name, _, value in fields if name.strip() == key]

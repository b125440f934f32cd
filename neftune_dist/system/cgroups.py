"""Memory and cores that this process may use, within the limits of its control groups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")
# Version 2 of control groups, then version 1: the limit, and what counts as used but can be freed.
_MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def memory_bytes() -> tuple[int, int, int]:
    """Return the bytes available to this process, their limit, and the memory of the machine.

    The limit is that of a job, a container or the machine.
    """
    rows = (row.partition(":") for row in (_ROOT / "proc/meminfo").read_text().splitlines())
    machine = {name: int(rest.split()[0]) * 1024 for name, _, rest in rows}
    available, limit = machine["MemAvailable"], machine["MemTotal"]
    for folder in _control_groups("memory"):
        for limit_file, used_file, freeable in _MEMORY_FILES:
            if (group_limit := _number(folder / limit_file)) is not None:
                used = (_number(folder / used_file) or 0) - _row(folder / "memory.stat", freeable)
                limit = min(limit, group_limit)
                available = min(available, group_limit - used)
    return max(0, available), limit, machine["MemTotal"]


def num_cores() -> float:
    """Cores that this process may use: its affinity and its control groups' quota."""
    cores = float(len(os.sched_getaffinity(0)))
    for folder in _control_groups("cpu"):
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if (folder / "cpu.max").exists():
            words = (folder / "cpu.max").read_text().split()
            quota, period = (None if words[0] == "max" else int(words[0])), int(words[1])
        if quota and period:
            cores = min(cores, quota / period)
    return cores


def _control_groups(controller: str) -> Iterator[Path]:
    """Folders of this process's control group and of those around it; the narrowest first."""
    try:
        rows = (_ROOT / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for row in rows:
        _, controllers, path = row.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = _ROOT / "sys/fs/cgroup" / controllers
        folder = base / path.lstrip("/")
        yield from (group for group in (folder, *folder.parents) if group.is_relative_to(base))


def _number(path: Path) -> int | None:
    """The number in a file; None where there is none: no file, or no limit."""
    try:
        number = int(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return number if 0 <= number < 2**60 else None  # version 1 has a huge number for no limit


def _row(path: Path, name: str) -> int:
    try:
        rows = dict(row.split() for row in path.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(rows.get(name, 0))

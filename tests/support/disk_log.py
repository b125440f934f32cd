"""The operations on a disk, in their order: what a power cut at any instant would leave.

Content is safe once its file was synced, a name once its folder was. A kill cannot show the order,
as the kernel lives on; so it is recorded.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch


@dataclass
class DiskLog:
    """What was done below `root`, and what was safe before each operation.

    Attributes:
        operations: name, then the paths it was given, relative to `root`.
        safe_contents, safe_names: of each operation, the paths whose content or name was on the
            disk when it began.
    """

    root: Path
    operations: list[tuple[str, ...]] = field(default_factory=list)
    safe_contents: list[set[str]] = field(default_factory=list)
    safe_names: list[set[str]] = field(default_factory=list)

    def add(self, operation: str, *paths: Path) -> None:
        """Record an operation that is about to be made."""
        contents = set(self.safe_contents[-1]) if self.operations else set()
        names = set(self.safe_names[-1]) if self.operations else set()
        if self.operations:
            self._apply(self.operations[-1], contents, names)
        self.safe_contents.append(contents)
        self.safe_names.append(names)
        self.operations.append((operation, *(self._name(path) for path in paths)))

    def _apply(self, operation: tuple[str, ...], contents: set[str], names: set[str]) -> None:
        kind, first, *rest = operation
        path = self.root / first
        if kind == "sync" and path.is_dir():
            names |= {self._name(entry) for entry in path.iterdir()}
        elif kind == "sync":
            contents.add(first)
        elif kind == "rename":
            names -= {first, rest[0]}
            if first in contents:
                contents.remove(first)
                contents.add(rest[0])

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.root))

    def index(self, *operation: str) -> int:
        """Where an operation was made, which was made once."""
        (where,) = [i for i, other in enumerate(self.operations) if other == operation]
        return where


@contextmanager
def disk_log(root: Path) -> Iterator[DiskLog]:
    """Record what this process does below `root`."""
    log, root = DiskLog(root), root.resolve()

    def recording(
        operation: str, function: Callable[..., Any], num_paths: int = 1
    ) -> Callable[..., Any]:
        def recorded(*arguments: Any, **options: Any) -> Any:
            paths = [
                Path(os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else path)
                for path in arguments[:num_paths]
            ]
            if "dir_fd" not in options and all(path.is_relative_to(root) for path in paths):
                log.add(operation, *paths)
            return function(*arguments, **options)

        return recorded

    with ExitStack() as stack:
        for owner, name, operation, num_paths in (
            (os, "fsync", "sync", 1),
            (os, "rename", "rename", 2),
            (os, "replace", "rename", 2),
            (os, "unlink", "remove", 1),
            (os, "remove", "remove", 1),
            (shutil, "rmtree", "remove", 1),
        ):
            recorded = recording(operation, getattr(owner, name), num_paths)
            stack.enter_context(patch.object(owner, name, recorded))
        yield log

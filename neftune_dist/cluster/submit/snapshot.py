"""The snapshot of a submission: RUN_DIR/submit/0001, 0002 and so on.

    config.yaml  resolved, as the job trains it     code.txt    version, commit, changed files
    words        the command                        code.patch  uncommitted changes
    job.sbatch   the script                         job         the ids of its jobs

Imports no torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from neftune_dist import __version__


def next_folder(run_dir: Path) -> Path:
    """The folder of the next snapshot."""
    taken = [int(path.name) for path in run_dir.glob("submit/*") if path.name.isdigit()]
    return run_dir / "submit" / f"{max(taken, default=0) + 1:04d}"


def jobs(run_dir: Path) -> list[str]:
    """The ids of all jobs that were submitted for the run."""
    files = sorted(run_dir.glob("submit/*/job"))
    return [number for file in files for number in file.read_text().split()]


def code(root: Path) -> dict[str, str]:
    """The files that say which code it is, by name."""
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain")
    text = f"neftune_dist {__version__}\ncommit {commit.rstrip()}\n{changes}"
    return {"code.txt": text, "code.patch": _git(root, "diff", "HEAD", "--binary")}


def _git(root: Path, *words: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words],
            # `git status` would write its index.
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
        )
    except OSError as error:
        return f"not known: git: {error.strerror}\n"
    if done.returncode:
        return f"not known: {done.stderr.strip()}\n"
    return done.stdout


class Writer:
    """Writes snapshots, and removes all of them where the submission fails."""

    def __init__(self) -> None:
        self._above: list[Path] = []  # in the order they were made
        self._snapshots: list[Path] = []

    def make(self, folder: Path) -> None:
        """A folder, and those above it. Raises `OSError`."""
        for above in [*reversed(folder.parents), folder]:
            if not above.is_dir():
                above.mkdir(exist_ok=True)
                self._above.append(above)

    def write(self, folder: Path, files: Mapping[str, str]) -> None:
        """A new snapshot. Raises `OSError`, also where another submission has just made it."""
        self.make(folder.parent)
        folder.mkdir()
        self._snapshots.append(folder)
        for name, content in files.items():
            (folder / name).write_text(content, "utf-8", "surrogateescape")

    def undo(self) -> None:
        """Remove the snapshots and folders that it made, and no other file."""
        for folder in self._snapshots:
            shutil.rmtree(folder, ignore_errors=True)
        for folder in reversed(self._above):
            with suppress(OSError):  # not empty
                folder.rmdir()

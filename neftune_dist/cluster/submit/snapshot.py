"""The snapshot of a submission: RUN_DIR/submit/0001, 0002 and so on.

    config.yaml  resolved, as the job trains it     code.txt    commit, versions, changed files
    words        the command                        code.patch  uncommitted changes
    job.sbatch   the script                         job         the ids of its jobs

Imports no torch.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from neftune_dist.system.versions import git, versions


def next_folder(run_dir: Path) -> Path:
    """The folder of the next snapshot."""
    taken = [int(path.name) for path in run_dir.glob("submit/*") if path.name.isdecimal()]
    return run_dir / "submit" / f"{max(taken, default=0) + 1:04d}"


def jobs(run_dir: Path) -> list[str]:
    """The ids of all jobs that were submitted for the run."""
    files = sorted(run_dir.glob("submit/*/job"))
    return [number for file in files for number in file.read_text(errors="replace").split()]


def code() -> dict[str, str]:
    """The files that say which code it is, by name."""
    lines = [f"{name} {text or 'not known'}\n" for name, text in versions().items()]
    # Files that git does not know are in no patch, and do not make a commit "-dirty".
    text = "".join(lines) + git("status", "--porcelain")
    return {"code.txt": text, "code.patch": git("diff", "HEAD", "--binary")}


def write(folder: Path, files: Mapping[str, str], undo: ExitStack) -> None:
    """Write a new snapshot, whose removal `undo` gets. Raises `OSError`, also where another
    submission has just made it."""
    make_folder(folder.parent, undo)
    folder.mkdir()
    undo.callback(shutil.rmtree, folder, ignore_errors=True)
    for name, content in files.items():
        (folder / name).write_text(content, "utf-8", "surrogateescape")


def make_folder(folder: Path, undo: ExitStack) -> None:
    """Make a folder and those above it; `undo` gets the removal of those that were missing, where
    they are empty by then. Raises `OSError`."""
    for above in [*reversed(folder.parents), folder]:
        if not above.is_dir():
            above.mkdir(exist_ok=True)
            undo.callback(_remove_empty, above)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()

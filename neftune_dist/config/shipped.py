"""The files that come with the package: configurations, and the batch scripts for Slurm.

In a checkout `neftune_dist/shipped/` links to the folders at the root; a wheel holds their files.
"""

from __future__ import annotations

import difflib
import os
import shutil
from pathlib import Path

from neftune_dist.config.errors import UserError
from neftune_dist.config.paths import user_path

SHIPPED = Path(__file__).resolve().parents[1] / "shipped"


def shipped_configs() -> dict[str, Path]:
    """The shipped configurations by name, such as `alpaca-7b`."""
    return {path.stem: path for path in sorted((SHIPPED / "configs").glob("*.yaml"))}


def find_config(given: str | os.PathLike[str]) -> Path:
    """The file of a configuration that is given as a path or as a shipped one's name.

    Raises:
        UserError: there is no such file; the message names the nearest one.
    """
    path, shipped = user_path(os.fspath(given), "CONFIG"), shipped_configs()
    if path.is_file():
        return path
    if os.fspath(given) in shipped:
        return shipped[os.fspath(given)]
    if path.exists():
        return path
    beside = {str(found) for found in path.parent.glob("*.y*ml")}
    near = difflib.get_close_matches(str(path), sorted({*beside, *shipped}), n=1)
    hint = f"did you mean {near[0]}?" if near else f"shipped are {', '.join(shipped)}."
    raise UserError(f"The configuration file {path} cannot be read: there is no such file; {hint}")


def copy_batch_scripts(output: Path | None) -> list[Path]:
    """Copy the batch scripts and `site.sh` into a folder; None: slurm. Raises `UserError` where one
    of them exists."""
    folder = output or Path("slurm")
    files = [path for path in sorted((SHIPPED / "slurm").iterdir()) if path.is_file()]
    for file in files:
        if (folder / file.name).exists():
            raise UserError(
                f"{folder / file.name} exists and is not overwritten: choose another folder with "
                "--output."
            )
    folder.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copy(file, folder / file.name)) for file in files]

"""The files that come with the package: configurations, and the batch scripts for Slurm.

In a checkout `neftune_dist/shipped/` links to the folders at the root; a wheel holds their files.
"""

from __future__ import annotations

import difflib
import filecmp
import os
import shutil
from pathlib import Path

from neftune_dist.config.errors import UserError
from neftune_dist.config.paths import user_path

_RECIPES = ("Dockerfile", "apptainer.def")  # they build from the repository
SHIPPED = Path(__file__).resolve().parents[1] / "shipped"


def shipped_configs() -> dict[str, Path]:
    """The shipped configurations by name, such as `alpaca-7b`."""
    return {path.stem: path for path in sorted((SHIPPED / "configs").glob("*.yaml"))}


def find_config(given: str | os.PathLike[str], folder: Path = Path()) -> Path:
    """The file of a configuration that is given as a path, below `folder`, or as a shipped one's
    name.

    Raises:
        UserError: there is no such file; the message names the nearest one.
    """
    path, shipped = folder / user_path(os.fspath(given), "CONFIG"), shipped_configs()
    if path.is_file():
        return path
    if found := shipped.get(os.fspath(given)):
        own = Path(f"{path}.yaml")
        if own.is_file() and not filecmp.cmp(own, found, shallow=False):
            raise UserError(
                f"{given} is a shipped configuration, and {own} another one: write {own.name} for "
                f"that, or {found} for the shipped one."
            )
        return found
    if path.exists():
        return path
    beside = {str(found) for found in path.parent.glob("*.y*ml")}
    near = [
        found
        for name in (str(path), f"{path}.yaml")
        for found in difflib.get_close_matches(name, sorted({*beside, *shipped}), n=1)
    ]
    hint = f"did you mean {near[0]}?" if near else f"shipped are {', '.join(shipped)}."
    if "=" in os.fspath(given):
        hint = "give CONFIG before the settings."
    raise UserError(f"The configuration file {path} cannot be read: there is no such file; {hint}")


def copy_batch_scripts(output: Path | None) -> list[Path]:
    """Copy the batch scripts and `site.sh`, and make the folder of their output.

    Args:
        output: the folder, which must be called slurm; None: that of the current one.

    Raises:
        UserError: one of them exists, or the folder has another name.
    """
    folder = output or Path("slurm")
    if folder.absolute().name != "slurm":
        raise UserError(
            f"--output={output} must be a folder called slurm, such as {folder / 'slurm'}: the "
            "scripts read slurm/site.sh below the folder they are submitted from."
        )
    files = [p for p in sorted((SHIPPED / "slurm").iterdir()) if p.is_file()]
    files = [path for path in files if path.name not in _RECIPES]
    for file in files:
        if (folder / file.name).exists():
            raise UserError(
                f"{folder / file.name} exists and is not overwritten: choose another folder with "
                "--output."
            )
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)  # Slurm makes none
    (logs / ".gitignore").write_text("*\n")
    return [Path(shutil.copy(file, folder / file.name)) for file in files]

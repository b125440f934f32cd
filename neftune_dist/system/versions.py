"""Which code runs: versions of this package and of those that affect a run's results."""

from __future__ import annotations

import platform
import subprocess
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from neftune_dist import __version__

_PACKAGES = ("torch", "transformers", "deepspeed", "datasets")
_CHECKOUT = Path(__file__).parents[2]


@cache
def versions() -> dict[str, str]:
    """The version and commit of this package ("" where it is no checkout), of Python, and of the
    packages that affect a run's results, without those that are not installed."""
    commit = git("describe", "--always", "--dirty", "--abbrev=12").strip()
    own = {"neftune_dist": __version__, "commit": commit, "python": platform.python_version()}
    return own | package_versions()


def package_versions() -> dict[str, str]:
    """The versions of the packages that affect a run's results."""
    found = {"neftune_dist": __version__}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def git(*words: str) -> str:
    """The output of git in this package's checkout; "" where there is none, or no git."""
    if not (_CHECKOUT / ".git").exists():
        return ""
    command = ["git", "--no-optional-locks", "-C", str(_CHECKOUT), *words]
    with suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True, errors="surrogateescape")
        return done.stdout
    return ""

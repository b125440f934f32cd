"""Packages that are installed and cannot be imported."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from neftune_dist.config import UserError
from neftune_dist.system.text import first_line

_OWN = Path(__file__).parents[1]  # the folder of this package


@contextmanager
def imports_reported() -> Iterator[None]:
    """Report another project's package that cannot be imported as a user's mistake: it is damaged,
    or does not fit the version of another one. An import within this package is no such mistake.

    Raises:
        UserError: an import failed; it shows the line.
    """
    try:
        yield
    except ImportError as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if _OWN in Path(frame.filename).parents]
        if not own or (error.name or "").startswith(_OWN.name):
            raise
        raise UserError(
            f"`{own[-1].line}` fails: {first_line(error)}: install that package again, in a "
            "version that fits the others, or leave out the setting that needs it."
        ) from error

"""Paths as users write them, in settings and on the command line."""

from __future__ import annotations

import os
from pathlib import Path

from neftune_dist.config.errors import UserError, brief

# Of Linux: a name between two slashes (every file system in use), and a path with its last byte 0.
_NAME_BYTES, _PATH_BYTES = 255, 4095


def user_path(text: str, key: str) -> Path:
    """The path that a setting or an argument names, a leading `~` expanded.

    It need not exist.

    Args:
        key: the setting's or argument's name, for the message.

    Raises:
        UserError: no file can have that name: an unknown user, a name that is too long.
    """
    shown = f"{key}={brief(text)}"
    if not text:
        raise UserError(f"{key} is empty: give a path.")
    if "\0" in text:
        raise UserError(f"{key}={brief(ascii(text))} is no path: it holds a character of code 0.")
    try:
        path = Path(text).expanduser()
        encoded = os.fsencode(path)
    except RuntimeError:
        raise UserError(f"{shown} names no known user: write the whole path.") from None
    except UnicodeEncodeError:
        raise UserError(f"{key}={brief(ascii(text))} is no path: it is not plain text.") from None
    longest = max(len(name) for name in encoded.split(b"/"))
    if longest > _NAME_BYTES or len(encoded) > _PATH_BYTES:
        what = f"a name of {longest}" if longest > _NAME_BYTES else f"{len(encoded)}"
        raise UserError(
            f"{shown} is too long: it has {what} bytes, and a file system takes {_NAME_BYTES} for "
            f"a name and {_PATH_BYTES} for a path."
        )
    return path

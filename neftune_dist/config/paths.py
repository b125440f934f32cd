"""Paths as users write them, in settings and on the command line."""

from __future__ import annotations

import os
import re
from pathlib import Path

from neftune_dist.config.errors import UserError, brief

# Limits of Linux on a name between two slashes, and on a path without its final zero byte.
_NAME_BYTES, _PATH_BYTES = 255, 4095
_VARIABLE = re.compile(r"(?:^|/)(\$([A-Za-z_]\w*))(?=/|$)")


def user_path(text: str, key: str) -> Path:
    """The path that a setting or an argument names, with a leading `~` expanded.

    The path need not exist. `key` names the setting or argument in messages.

    Raises:
        UserError: no file can have that path (an unknown user, a name that is too long), or it
            holds a variable of the shell, and does not exist.
    """
    shown = f"{key}={brief(text)}"
    if not text:
        raise UserError(f"{key} is empty: give a path.")
    if "\0" in text:
        raise UserError(f"{key}={brief(ascii(text))} is not a path: it contains a null character.")
    if (variable := _VARIABLE.search(text)) and not os.path.exists(text):
        raise UserError(
            f"{shown}: {variable[1]} is replaced by a shell alone; in a configuration write "
            f"${{oc.env:{variable[2]}}}."
        )
    try:
        path = Path(text).expanduser()
        encoded = os.fsencode(path)
    except RuntimeError:
        raise UserError(f"{shown} names no known user: write the whole path.") from None
    except UnicodeEncodeError:
        raise UserError(
            f"{key}={brief(ascii(text))} is not a path: it contains bytes that are not text."
        ) from None
    longest = max(len(name) for name in encoded.split(b"/"))
    if longest > _NAME_BYTES or len(encoded) > _PATH_BYTES:
        found = f"a name of {longest}" if longest > _NAME_BYTES else f"{len(encoded)}"
        raise UserError(
            f"{shown} is too long: it has {found} bytes, and the limits are {_NAME_BYTES} for a "
            f"name and {_PATH_BYTES} for a path."
        )
    return path


def read_text(text: str, key: str) -> str:
    """The text of the file that a setting names, without a byte order mark.

    Raises:
        UserError: it cannot be read, or is a pipe, which could wait for ever.
    """
    path = user_path(text, key)
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is not a file")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        not_text = isinstance(error, ValueError)
        reason = "it is not UTF-8" if not_text else getattr(error, "strerror", None) or error
        raise UserError(f"{key}={text} cannot be read: {reason}.") from error

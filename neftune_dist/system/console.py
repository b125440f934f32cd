"""Standard output and error that never end a run: nobody may be reading them any more.

A closed terminal, `launch ... | head`, a log on a full disk: what cannot be written there is lost,
and the process goes on. What was lost of standard output can be asked for at the end.
"""

from __future__ import annotations

import io
import os
import select
import sys


class _Lossy(io.FileIO):
    """A descriptor to which every write succeeds. error: the first that did not."""

    error: OSError | None = None

    def write(self, data: object) -> int:
        try:
            while (written := super().write(data)) is None:  # type: ignore[arg-type]
                select.select([], [self], [])  # somebody has made it non-blocking
        except OSError as error:
            self.error = self.error or error
            return memoryview(data).nbytes  # type: ignore[arg-type]
        return written


def protect() -> None:
    """Have writes to standard output and error always succeed, unless a caller has replaced
    them."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: else the next file that is opened would become it
            os.open(os.devnull, os.O_RDWR)
    if sys.stdin is None:  # as Python makes it where it was closed
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue
        raw = _Lossy(descriptor, "wb", closefd=False)
        by_line = name == "stderr" or raw.isatty()
        encoding = stream.encoding if stream else "utf-8"
        wrapped = io.TextIOWrapper(
            io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=by_line
        )
        setattr(sys, name, wrapped)


def lost() -> OSError | None:
    """Why some of standard output was lost; None where all of it was written."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.error if isinstance(raw, _Lossy) else None

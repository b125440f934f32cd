"""The command line: `neftune-dist VERB`. Its errors are one sentence; its exit codes are those of
`distributed.outcome`."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from neftune_dist import verbs  # noqa: F401 (fills VERBS)
from neftune_dist.arguments import VERBS, parse
from neftune_dist.config import UserError
from neftune_dist.distributed import outcome
from neftune_dist.system import children, console, garbage
from neftune_dist.system.imports import imports_reported

_RANK_0_FIRST_SECONDS = 5.0
# Verbs whose purpose is their output: they have failed if it cannot be written.
_PRINTING = ("config", "completion", "plan", "prepare", "watch", "checkpoints", "doctor")
_ELSEWHERE = "change who may read or write it, or choose another place"
# transformers imports torchao wherever it is installed, which then warns of kernels for other GPUs.
_NOISY = ("torchao", "torch.utils._pytree")
# Advice on errors of the operating system; other errors are bugs of this program.
_ADVICE = {
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "make room within the quota",
    errno.EFBIG: "raise the limit of a file's size",
    errno.EACCES: _ELSEWHERE,
    errno.EPERM: _ELSEWHERE,
    errno.EROFS: _ELSEWHERE,
    errno.ENOENT: "it does not exist, or was removed meanwhile",
    errno.ENOTDIR: "part of the path is a file",
    errno.EISDIR: "a file is needed",
    errno.EEXIST: "choose another name",
    errno.ENOTEMPTY: "another process writes into it",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its links lead back to themselves",
    errno.EXDEV: "both places must be on one disk",
    errno.ETXTBSY: "a running program uses it",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "the machine has reached its limit of open files",
    errno.ENOLCK: "its file system has no locks: choose another place",
    errno.EIO: "the disk, or the network to it, has failed",
    errno.ESTALE: "its file server has restarted, or it was removed there",
}


def run() -> NoReturn:
    """Run the command line as the whole process: `main`, with a quick start and end."""
    end = garbage.QuickEnd()
    garbage.collect_rarely()
    try:
        main()
    except SystemExit as ended:
        end.code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise


def main(words: Sequence[str] | None = None) -> NoReturn:
    """Parse the command line, run its verb, exit."""
    console.protect()
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a rank of torchrun's, which may be killed
        children.end_with_parent(os.getppid())
    verb = ""
    try:
        arguments = parse(words)
        verb = arguments.pop("verb")
        run, _ = VERBS[verb]
        with imports_reported():
            code = run(**arguments)
    except (UserError, outcome.Final, RecursionError) as error:
        if isinstance(error, RecursionError):
            if "a JSON" not in str(error):
                raise
            error = UserError("A JSON file nests thousands of brackets: it is damaged.")
        code = outcome.EXIT_MISTAKE if isinstance(error, UserError) else outcome.EXIT_FAILED
        _print_error(error, shared=not isinstance(error, UserError) or error.shared)
    except KeyboardInterrupt:  # before a verb listens to it, such as while it imports torch
        code = 128 + signal.SIGINT
        _print_error("stopped by Ctrl-C.", shared=True)
    except OSError as error:
        if error.errno not in _ADVICE:
            raise
        code = outcome.EXIT_FAILED if outcome.VARIABLE in os.environ else outcome.EXIT_MISTAKE
        _print_error(_refusal(error), shared=False)
    sys.exit(_exit_code(code, verb))


def _refusal(error: OSError) -> str:
    """One sentence for an error of the operating system."""
    reason, advice = error.strerror or str(error), _ADVICE[error.errno or 0]
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if name is not None]
    return f"{' to '.join(map(str, names)) or 'A file'}: {reason}: {advice}."


def _exit_code(code: int, verb: str) -> int:
    """The exit code, which may change if standard output could not be written whole."""
    error = console.lost()
    if error is None or error.errno == errno.EPIPE:  # its reader had seen enough
        return code
    print(f"neftune-dist: standard output: {error.strerror}; not all is there.", file=sys.stderr)
    return code or (outcome.EXIT_MISTAKE if verb in _PRINTING else outcome.EXIT_DONE)


def _print_error(error: Exception | str, shared: bool) -> None:
    """Print one sentence to standard error, on one rank only if it is shared by all."""
    rank = os.environ.get("RANK") or "0"
    if rank != "0":
        # The launcher ends all ranks as soon as one has ended. Let that one be rank 0, which says
        # the same; if it lives on, the mistake is this rank's alone and is said here.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_RANK_0_FIRST_SECONDS)
        if shared:
            return
    prefix = "neftune-dist" if rank == "0" else f"neftune-dist (rank {rank})"
    print(f"{prefix}: {error}", file=sys.stderr, flush=True)

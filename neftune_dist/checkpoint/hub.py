"""Exports on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub

from neftune_dist.checkpoint.export import MARK
from neftune_dist.config import UserError
from neftune_dist.system.text import first_line

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def reserve(repository: str) -> None:
    """Make the repository, private, unless it is there, and ask whether it may be written: what the
    hub refuses is known before the export is made.

    Args:
        repository: as org/name.

    Raises:
        UserError: a wrong name, no network, a missing token or one without the right to write.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise UserError(f"--push-to-hub={repository} is no hub id such as org/name.")
    with _refused(repository):
        huggingface_hub.create_repo(repository, private=True, exist_ok=True)
        # A repository that exists passes by a token without rights, too.
        huggingface_hub.auth_check(repository, write=True)


def push(folder: Path, repository: str, log: Callable[[str], None] = print) -> None:
    """Upload an export, in one commit. Raises `UserError` where the hub refuses it."""
    with _refused(repository):
        made = huggingface_hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Export by neftune_dist",
            ignore_patterns=[MARK],
        )
    log(f"pushed {folder} to {made}")


@contextmanager
def _refused(repository: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub's clients raise a dozen unrelated types
        raise UserError(
            f"--push-to-hub={repository}: the hub refuses: {first_line(error)}. It takes a token "
            "with the right to write (hf auth login, or HF_TOKEN)."
        ) from error

"""The files that `train` leaves beside checkpoints: whether they have changed since.

They are `config.yaml` and those in `model/`; their checksums lie in `files.json`. A tokenizer or a
configuration that somebody has edited, or a disk has damaged, would silently be another model; so
`export`, `evaluate` and `chat` ask here first. The same `train` command writes them again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neftune_dist.checkpoint.flat import WrittenFile
from neftune_dist.checkpoint.merged import MODEL_FOLDER
from neftune_dist.config import (
    Config,
    ModelConfig,
    UserError,
    checksummed,
    load_config,
    read_json,
)
from neftune_dist.model import load
from neftune_dist.system import storage

_CONFIG, _SEAL = "config.yaml", "files.json"
_AGAIN = "the same train command writes it again"


def seal(run_dir: Path) -> None:
    """Write down the checksums of what is there. Rank 0 alone. Raises `OSError`."""
    paths = [run_dir / _CONFIG, *sorted((run_dir / MODEL_FOLDER).iterdir())]
    files = {str(p.relative_to(run_dir)): vars(WrittenFile.of(p)) for p in paths if p.is_file()}
    storage.write(run_dir / _SEAL, json.dumps(checksummed({"files": files}), indent=1) + "\n")


def check_sealed(run_dir: Path) -> None:
    """Raise `UserError` naming a file that is not what `train` wrote. Runs of earlier versions have
    no checksums, which is no error."""
    if not (run_dir / _SEAL).exists():
        return
    files = read_json(run_dir / _SEAL, {"files": {str: WrittenFile}}, fix=_AGAIN)["files"]
    for name, file in files.items():
        path = run_dir / name
        try:
            is_same = WrittenFile.of(path) == file
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}; {_AGAIN}.") from error
        if not is_same:
            words = " (key=value words change a setting)" if name == _CONFIG else ""
            raise UserError(f"{path} has changed since train wrote it: {_AGAIN}{words}.")


def run_config(run_dir: Path, words: Sequence[str] = ()) -> Config:
    """The configuration that a run was trained with, then `key=value` words. Raises `UserError`."""
    check_sealed(run_dir)
    return load_config(run_dir / _CONFIG, words)


def check_architecture(run_dir: Path, state: Mapping[str, Any]) -> None:
    """Raise `UserError` where `model/config.json` does not describe what a checkpoint holds.

    Args:
        state: the checkpoint's `trainer_state()`.
    """
    folder = run_dir / MODEL_FOLDER
    settings = ModelConfig(
        trust_remote_code=state["config"]["model"].get("trust_remote_code", False)
    )
    now = load.architecture(load.load_model_config(folder, settings))
    then = state["identity"]["architecture"]
    # Another transformers may know of fields that the other did not.
    other = [key for key in sorted(then.keys() & now.keys()) if then[key] != now[key]]
    if other:
        raise UserError(
            f"{folder / 'config.json'} describes another model than the checkpoint's, by its "
            f"{', '.join(other)}: {_AGAIN}."
        )

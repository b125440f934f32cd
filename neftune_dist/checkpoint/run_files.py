"""A run directory's files beside its checkpoints: its mark and lock, and the base's small files.

`neftune_run.json` marks the directory as one that this project writes into, and `.lock` is held by
the run that does. `config.yaml` is the configuration; `model/` holds what the base model has beside
its weights, so that a run whose weights were all trained no longer needs its base model. Their
checksums lie in `files.json`: an edited or damaged tokenizer or configuration would silently be
another model, so `export`, `evaluate` and `chat` check them first. The same `train` command writes
them again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from neftune_dist.checkpoint.flat import WrittenFile
from neftune_dist.checkpoint.resume import differing_fields
from neftune_dist.config import (
    Config,
    ModelConfig,
    UserError,
    load_config,
    read_json,
    with_checksum,
)
from neftune_dist.distributed.world import World
from neftune_dist.model import load, locate
from neftune_dist.model.families import WRAPPERS
from neftune_dist.model.multimodal import text_settings
from neftune_dist.system import storage
from neftune_dist.system.checkpoint_names import MODEL_FOLDER, RUN_CONFIG, run_claim
from neftune_dist.system.model_files import generation_settings

CHAT_TEMPLATE = "chat_template.jinja"
_SEAL = "files.json"
_AGAIN = "the same train command writes it again"
_AT_ONCE_SECONDS = 1.0
# An attempt that is dying still has memory to free and files to close: it holds its run directory
# for as long as this.
_CLAIM_SECONDS = 30.0


def claim(run_dir: Path, world: World) -> ExitStack:
    """Make the run directory, and hold it until the process ends or the stack is closed.

    Raises:
        UserError: it is another run's, holds files of somebody else, or cannot be written.
    """
    held = ExitStack()
    with world.agree():
        if world.is_first:
            *_, setting = claimed = run_claim(run_dir)
            storage.claim(*claimed)
            lock = run_dir / ".lock"
            busy = f"{setting} is in use by another run: wait for its end, or set another run_dir."
            try:
                held.enter_context(storage.hold(lock, busy, _AT_ONCE_SECONDS))
            except storage.Busy:
                world.log(f"{setting} is in use; waiting up to {_CLAIM_SECONDS:.0f} s")
                held.enter_context(storage.hold(lock, busy, _CLAIM_SECONDS))
    return held


def write_run_files(
    run_dir: Path,
    config: Config,
    model_folder: Path,
    tokenizer: Any,
    model_config: Any,
    chat_template: str | None,
    end_tokens: Sequence[int] = (),
) -> None:
    """Write `config.yaml` and `model/`, and seal them. Rank 0 alone.

    Args:
        model_folder: the base model's directory.
        model_config: of the model as it is trained.
        chat_template: that the run trains with; None: it cannot be written as one.
        end_tokens: that the run's answers end with.

    Raises:
        UserError: they cannot be written; or see `files_within`.
    """
    with storage.writing(f"run_dir={run_dir}"):
        storage.write(run_dir / RUN_CONFIG, config.to_yaml())
        keep_small_files(model_folder, run_dir)
        keep_ties(model_config, run_dir)
        if config.model.add_tokens:
            keep_vocabulary(tokenizer, model_config.vocab_size, run_dir)
        own = config.data.template == "chat" and config.data.system_prompt is None
        # Templates in a folder are not copied: one file chooses between them as they are chosen.
        if not own or (model_folder / "additional_chat_templates").is_dir():
            keep_template(chat_template, run_dir)
        if not own or config.model.add_tokens:  # mistral-common prefers it to what was trained with
            (run_dir / MODEL_FOLDER / "tekken.json").unlink(missing_ok=True)
        keep_end_tokens(end_tokens, getattr(model_config, "eos_token_id", None), run_dir)
        seal(run_dir)


def keep_small_files(model_folder: Path, run_dir: Path) -> None:
    """Copy the files that a model needs beside its weights. Raises `UserError` as `files_within`
    does."""
    files = {file for pattern in locate.SMALL_FILES for file in files_within(model_folder, pattern)}
    target = run_dir / MODEL_FOLDER
    if target.is_symlink():  # to the base model, perhaps, whose files would be changed
        target.unlink()
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(files):
        if file.name.endswith(".index.json"):
            continue
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror or error}.") from error
        storage.write(target / file.name, content)


def files_within(folder: Path, pattern: str = "*") -> list[Path]:
    """Return the files of a model directory that may be copied with the model.

    Raises:
        UserError: one is a link to a file elsewhere, which could be any file the user can read.
            Links into the blobs of the hub's cache are allowed.
    """
    root = folder.resolve()
    blobs = root.parents[1] / "blobs" if root.parent.name == "snapshots" else root
    found = [file for file in sorted(folder.glob(pattern)) if file.is_file()]
    for file in found:
        if not {root, blobs} & {*file.resolve().parents}:
            raise UserError(
                f"{file} is a link to {file.resolve()}, outside the model directory: put the file "
                "itself there."
            )
    return found


def keep_vocabulary(tokenizer: Any, num_rows: int, run_dir: Path) -> None:
    """Replace the model's tokenizer by one with new tokens, and record the embedding's rows."""
    target = run_dir / MODEL_FOLDER
    tokenizer.save_pretrained(target)
    path = target / "config.json"
    config = read_json(path)
    text_settings(config)["vocab_size"] = num_rows
    path.write_text(json.dumps(config, indent=2) + "\n")


def keep_ties(model_config: Any, run_dir: Path) -> None:
    """Record in a wrapper's config.json whether its embedding is tied, where the base's weights
    have decided: the run's files have none."""
    path = run_dir / MODEL_FOLDER / "config.json"
    config = read_json(path)
    if config.get("model_type") in WRAPPERS:
        for part in (config, text_settings(config)):
            part["tie_word_embeddings"] = model_config.tie_word_embeddings
        path.write_text(json.dumps(config, indent=2) + "\n")


def keep_template(source: str | None, run_dir: Path) -> None:
    """Replace the model's chat template by the one that a run trains with; None: remove it."""
    target = run_dir / MODEL_FOLDER
    own = target / "tokenizer_config.json"
    if own.exists():
        settings = read_json(own)
        settings.pop("chat_template", None)
        own.write_text(json.dumps(settings, indent=2) + "\n")
    (target / "chat_template.json").unlink(missing_ok=True)  # of a wrapper's processor
    if source is None:
        (target / CHAT_TEMPLATE).unlink(missing_ok=True)
    else:
        (target / CHAT_TEMPLATE).write_text(source, encoding="utf-8")


def keep_end_tokens(end_tokens: Sequence[int], own: int | list[int] | None, run_dir: Path) -> None:
    """Add the tokens at which generation stops to the model's `generation_config.json`: a base
    model's does not name the one with which a chat template ends an answer.

    Args:
        own: of the model's configuration, which counts where there is no such file.
    """
    path = run_dir / MODEL_FOLDER / "generation_config.json"
    settings = generation_settings(path.parent, own)
    if added := [token for token in end_tokens if token not in settings["eos_token_id"]]:
        settings["eos_token_id"] += added
        path.write_text(json.dumps(settings, indent=2) + "\n")


def seal(run_dir: Path) -> None:
    """Write the checksums of the files that are there. Rank 0 alone. Raises `OSError`."""
    paths = [run_dir / RUN_CONFIG, *sorted((run_dir / MODEL_FOLDER).iterdir())]
    files = {str(p.relative_to(run_dir)): vars(WrittenFile.of(p)) for p in paths if p.is_file()}
    storage.write(run_dir / _SEAL, json.dumps(with_checksum({"files": files}), indent=1) + "\n")


def check_sealed(run_dir: Path) -> None:
    """Raise `UserError` naming a file that has changed since `train` wrote it.

    Runs of earlier versions have no checksums and pass.
    """
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
            words = " (key=value words change a setting)" if name == RUN_CONFIG else ""
            raise UserError(f"{path} has changed since train wrote it: {_AGAIN}{words}.")


def run_config(run_dir: Path, words: Sequence[str] = ()) -> Config:
    """Return the configuration of a run, changed by `key=value` words. Raises `UserError`."""
    check_sealed(run_dir)
    return load_config(run_dir / RUN_CONFIG, words)


def check_architecture(run_dir: Path, state: Mapping[str, Any]) -> None:
    """Raise `UserError` where `model/config.json` does not describe what a checkpoint holds.

    Args:
        state: the checkpoint's `trainer_state()`.
    """
    folder = run_dir / MODEL_FOLDER
    settings = ModelConfig(
        trust_remote_code=state["config"]["model"].get("trust_remote_code", False)
    )
    now = load.architecture(load.trained_model_config(folder, settings))
    if other := differing_fields(state["identity"]["architecture"], now):
        raise UserError(
            f"{folder / 'config.json'} describes another model than the checkpoint's, by its "
            f"{', '.join(other)}: {_AGAIN}."
        )

"""Where the files of a model are: a directory, the hub's cache, or the hub. Imports no torch."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import huggingface_hub

from neftune_dist.config import ModelConfig, UserError, user_path
from neftune_dist.system.text import first_line

# All of a model directory but its weights: configuration, tokenizer, code, licence.
SMALL_FILES = [
    *("*.json", "tokenizer*", "*.model", "*.txt", "*.jinja", "*.py"),
    *("*.codes", "*.spm", "*.tiktoken", "*.tokenizer", "LICEN[CS]E*", "NOTICE*", "USE_POLICY*"),
]


def find_local(config: ModelConfig) -> Path | None:
    """Return the model's directory where `model.name_or_path` names one, None for a hub id.

    Raises:
        UserError: the path is no model directory, or a revision is given for it.
    """
    name = config.name_or_path
    path = user_path(name, "model.name_or_path")
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            raise UserError(
                f"model.name_or_path={name} holds a PEFT adapter (adapter_config.json): merge it "
                "into its base, and give the merged model's directory."
            )
        if not (path / "config.json").is_file():
            raise UserError(f"model.name_or_path={name} is a directory without a config.json.")
        if config.revision is not None:
            raise UserError(
                f"model.revision={config.revision} has no effect with the directory {name}: leave "
                "it out."
            )
        return path
    if path.exists() or is_path(name):
        raise UserError(f"model.name_or_path={name} is no model directory.")
    return None


def is_path(name: str) -> bool:
    """Whether a name can only be a path: no hub id has that form."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def find(config: ModelConfig, weights: bool = True) -> Path:
    """Return the model's directory; a hub id is downloaded into the hub's cache.

    Args:
        weights: download the weights, too.
    """
    name, folder = config.name_or_path, find_local(config)
    if folder:
        return folder
    try:
        wanted = [*SMALL_FILES, "model*.safetensors"] if weights else SMALL_FILES
        download = partial(huggingface_hub.snapshot_download, name, revision=config.revision)
        folder = Path(download(allow_patterns=wanted))
        if weights and not list(folder.glob("model*.safetensors")):
            download(allow_patterns=["pytorch_model*.bin"])
    except Exception as error:  # the hub's client raises a dozen unrelated types
        raise UserError(
            f"model.name_or_path={name} is no local directory, and the model of that name cannot "
            f"be downloaded from the hub: {first_line(error)}"
        ) from error
    return folder

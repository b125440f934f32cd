"""Files of a model directory, without torch: weights, and how it generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neftune_dist.config import UserError, read_json


def weight_files(folder: Path, name: str = "model.safetensors") -> list[Path]:
    """The file `name`, or those that its index lists; none where neither is there.

    Raises:
        UserError: the index cannot be read as one, or names a file elsewhere; or a file is missing
            or may not be read.
    """
    names, index = [name], folder / f"{name}.index.json"
    if not (folder / name).is_file():
        if not index.is_file():
            return []
        fix = "it is no index of weight files, so copy it again"
        weight_map = read_json(index, {"weight_map": {str: str}}, fix=fix)["weight_map"]
        names = sorted(set(weight_map.values()))
    for file in names:
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise UserError(
                f"{index} names {file}, outside its folder: put the weights beside the index."
            )
        try:  # safetensors calls every such error "No such file"
            (folder / file).open("rb").close()
        except FileNotFoundError as error:
            raise UserError(f"The weights are incomplete: {folder / file} is missing.") from error
        except OSError as error:
            raise UserError(
                f"The weights in {folder / file} cannot be read: {error.strerror}."
            ) from error
    return [folder / file for file in names]


def generation_settings(folder: Path, own: int | list[int] | None) -> dict[str, Any]:
    """The settings of a model's `generation_config.json`, its `eos_token_id` as a list.

    Args:
        own: `eos_token_id` of the model's configuration, which counts where there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    path, settings = folder / "generation_config.json", {"eos_token_id": own}
    if path.exists():
        settings = read_json(path, {"eos_token_id?": int | list | None})
    found = settings.get("eos_token_id")
    if isinstance(found, list) and path.exists():
        read_json(path, {"eos_token_id": [int | None]})  # names the one that is no token
    tokens = found if isinstance(found, list) else [found]
    return {**settings, "eos_token_id": [token for token in tokens if token is not None]}

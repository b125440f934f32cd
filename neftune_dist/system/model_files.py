"""The files of a model directory that hold its weights, without torch."""

from __future__ import annotations

from pathlib import Path

from neftune_dist.config import read_json


def weight_files(folder: Path, name: str = "model.safetensors") -> list[Path]:
    """The file `name`, or those that its index lists; none where neither is there.

    Raises:
        UserError: the index cannot be read as one.
    """
    single, index = folder / name, folder / f"{name}.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    fix = "it is no index of weight files, so copy it again"
    weight_map = read_json(index, {"weight_map": {str: str}}, fix=fix)["weight_map"]
    return [folder / file for file in sorted(set(weight_map.values()))]

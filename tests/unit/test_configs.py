"""Every shipped configuration loads, and is a difference from the defaults."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from neftune_dist.config import Config, differences, load_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_loads_and_says_nothing_twice(path: Path) -> None:
    config = load_config(path, ["model.name_or_path=somewhere"])
    given = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(given, dict)
    changed = differences(Config().to_dict(), config.to_dict())
    for section, values in given.items():
        for key in values if isinstance(values, dict) else []:
            name = f"{section}.{key}"
            # Settings that the paper names, or a reader looks for, are spelled out all the same.
            spelled_out = ("noise.alpha", "data.source", "data.max_length", "optim.", "train.")
            assert name in changed or name.startswith(spelled_out), f"{name} is the default"

"""Every shipped configuration loads, and is a difference from the defaults."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from neftune_dist.config import Config, UserError, differences, load_config
from neftune_dist.config.shipped import SHIPPED
from neftune_dist.data.sampler import make_sampler

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_setting_differs_from_what_the_file_extends(path: Path) -> None:
    config = load_config(path, ["model.name_or_path=somewhere"])
    given = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(given, dict)
    before = Config()
    if "extends" in given:
        before = load_config(path.parent / given["extends"], ["model.name_or_path=elsewhere"])
    changed = differences(before.to_dict(), config.to_dict())
    for section, values in given.items():
        for key in values if isinstance(values, dict) else []:
            name = f"{section}.{key}"
            # Settings that the paper names, or a reader looks for, are spelled out all the same.
            spelled_out = ("noise.alpha", "data.source", "data.max_length", "optim.", "train.")
            assert name in changed or name.startswith(spelled_out), f"{name} is the default"


@pytest.mark.parametrize(
    ("name", "rows"), [("alpaca-7b", 52_002), ("evol-7b", 70_000), ("platypus-7b", 24_926)]
)
def test_warmup_is_3_percent_of_the_steps(name: str, rows: int) -> None:
    """3 % of the steps, as their code has it."""
    config = load_config(CONFIGS[0].parent / f"{name}.yaml")
    made = make_sampler(config.train, rows - config.data.num_held_out, "x")
    assert config.optim.warmup_steps == int(0.03 * made.num_steps)


def test_file_extends_another(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("model: {name_or_path: m}\nnoise: {alpha: 15, seed: 3}\n")
    (tmp_path / "more.yaml").write_text("extends: base.yaml\nnoise: {alpha: 10}\n")
    (tmp_path / "below").mkdir()
    (tmp_path / "below/most.yaml").write_text("extends: ../more.yaml\ntrain: {seed: 1}\n")
    config = load_config(tmp_path / "below/most.yaml", ["noise.seed=4"])
    assert (config.noise.alpha, config.noise.seed, config.train.seed) == (10, 4, 1)


def test_file_extends_a_shipped_one_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: alpaca-7b\n")
    assert load_config(tmp_path / "mine.yaml") == load_config("alpaca-7b")


def test_a_shipped_name_beside_a_file_of_that_name_is_refused(tmp_path: Path) -> None:
    """As `init alpaca-7b` writes it: the settings in it would not be read."""
    (tmp_path / "mine.yaml").write_text("extends: alpaca-7b\n")
    own = tmp_path / "alpaca-7b.yaml"
    own.write_bytes((SHIPPED / "configs/alpaca-7b.yaml").read_bytes())
    load_config(tmp_path / "mine.yaml")  # either is the same
    own.write_text("noise: {alpha: 7}\n")
    with pytest.raises(UserError, match=r"a shipped configuration, and .*: write alpaca-7b.yaml"):
        load_config(tmp_path / "mine.yaml")


def test_a_pipe_is_no_configuration(tmp_path: Path) -> None:
    """Launchers read it several times, and a pipe is empty the second time."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is a pipe: give a file"):
        load_config(tmp_path / "pipe", ["model.name_or_path=m"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: none.yaml", "none.yaml cannot be read: there is no such file"),
        ("extends: [a.yaml]", "extends=['a.yaml'] is not a file name"),
        ("extends: other.yaml", "extends=self.yaml leads back to the file itself"),
        ("noise: {extends: other.yaml}", "unknown key noise.extends"),
    ],
)
def test_wrong_extends_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "self.yaml").write_text(text)
    (tmp_path / "other.yaml").write_text("extends: self.yaml")
    with pytest.raises(UserError) as raised:
        load_config(tmp_path / "self.yaml")
    assert message in str(raised.value)

"""Float8 training, its rounding emulated: learns like bf16, and resumes exactly."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import tiny_model

pytest.importorskip("torchao")
RECIPES = ["tensorwise", "rowwise"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float8")
    path = tiny_model.make_config(folder, train={"max_steps": 8})
    path.write_text(path.read_text().replace('"fp32"', '"bf16"'))
    return path


@pytest.fixture(scope="module")
def losses(config: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run_dir = tmp_path_factory.mktemp("bf16")
    return [record["loss"] for record in tiny_model.train(config, run_dir / "run", ranks=2)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_loss_follows_that_of_bf16(
    recipe: str, config: Path, losses: list[float], tmp_path: Path
) -> None:
    records = tiny_model.train(config, tmp_path / "run", f"model.float8={recipe}", ranks=2)
    found = [record["loss"] for record in records]
    assert found != losses
    assert found == pytest.approx(losses, rel=0.01)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_resumed_run_is_the_uninterrupted_one(recipe: str, config: Path, tmp_path: Path) -> None:
    words = [f"model.float8={recipe}", "checkpoint.every_steps=4", "checkpoint.keep=0"]
    whole = tiny_model.train(config, tmp_path / "whole", *words, ranks=2)
    half = tmp_path / "whole" / "checkpoints" / "step_00000004"
    resumed = tiny_model.train(
        config, tmp_path / "resumed", *words, f"checkpoint.resume={half}", ranks=2
    )
    assert tiny_model.untimed(resumed) == tiny_model.untimed(whole[4:])
    one, other = (
        tiny_model.checkpoint_tensors(tmp_path / run / "checkpoints" / "step_00000008")
        for run in ("whole", "resumed")
    )
    assert all(one[key].equal(other[key]) for key in one)

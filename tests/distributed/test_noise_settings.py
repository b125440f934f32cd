"""The noise's settings through whole runs: what is recorded is what the law says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.support import tiny_model

STEPS = 8


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("noise")
    return tiny_model.make_config(folder, train={"max_steps": STEPS})


@pytest.mark.parametrize(
    ("distribution", "norm"), [("gaussian", 5 / math.sqrt(3)), ("symmetric", 5.0)]
)
def test_distributions_are_the_same_in_every_layout(
    distribution: str, norm: float, config: Path, tmp_path: Path
) -> None:
    words = [f"noise.distribution={distribution}"]
    one = tiny_model.train(config, tmp_path / "one", *words)
    for name, ranks, more in (
        ("fsdp2", 2, ["train.micro_batch_tokens=96"]),
        ("zero-3", 2, ["engine.name=deepspeed"]),
        ("padded", 1, ["data.packing=false"]),
    ):
        other = tiny_model.train(config, tmp_path / name, *words, *more, ranks=ranks)
        for a, b in zip(one, other, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), name
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5), name
    for record in one:
        assert record["noise_law"] == pytest.approx(norm)
        assert record["noise_norm"] == pytest.approx(norm, rel=0.02)


def test_symmetric_noise_cancels_to_first_order(config: Path, tmp_path: Path) -> None:
    """The mean loss of a document under opposite noise is its clean loss but for curvature; under
    one of the two it is not. (SymNoise's reason to be.)"""
    words = ["train.max_steps=1", "noise.alpha=0.01"]
    clean = tiny_model.train(config, tmp_path / "clean", "train.max_steps=1", "noise.alpha=0")
    losses = {
        kind: tiny_model.train(config, tmp_path / kind, *words, f"noise.distribution={kind}")[0][
            "loss"
        ]
        for kind in ("uniform", "symmetric")
    }
    assert clean[0]["noise_norm"] == clean[0]["noise_law"] == 0
    error = {kind: abs(loss / clean[0]["loss"] - 1) for kind, loss in losses.items()}
    assert error["symmetric"] < error["uniform"] / 10


def test_alpha_is_warmed_up_and_decays(config: Path, tmp_path: Path) -> None:
    words = ["noise.schedule=linear", "noise.warmup_steps=2", "noise.final_fraction=0.5"]
    records = tiny_model.train(config, tmp_path / "run", *words, ranks=2)
    alphas = [2.5, 5.0, *(5 * (0.5 + 0.5 * (1 - i / (STEPS - 2))) for i in range(STEPS - 2))]
    for record, alpha in zip(records, alphas, strict=True):
        assert record["noise_law"] == pytest.approx(alpha / math.sqrt(3))
        assert record["noise_norm"] == pytest.approx(record["noise_law"], rel=0.02)


def test_padded_lengths_show_in_the_norm(config: Path, tmp_path: Path) -> None:
    """As others scale it: a packed document gets too little, by the root of its share of the row;
    and the layout decides what is trained."""
    words = ["noise.length=padded", "noise.stream=rank", "train.max_steps=2"]
    packed = tiny_model.train(config, tmp_path / "packed", *words)
    padded = tiny_model.train(config, tmp_path / "padded", *words, "data.packing=false")
    said = tiny_model.run_forked("train", config, f"run_dir={tmp_path / 'said'}", *words).stdout
    assert "not the paper's noise" in said
    assert packed[0]["noise_norm"] < 0.6 * packed[0]["noise_law"]
    assert packed[0]["noise_norm"] < padded[0]["noise_norm"] < 0.98 * padded[0]["noise_law"]

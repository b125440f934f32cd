"""The engine of one device trains what sharding engines train, and continues what they began."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support import tiny_model

SINGLE = "engine.name=single"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.make_config(
        tmp_path_factory.mktemp("single"),
        train={"max_steps": 6},
        checkpoint={"every_steps": 3, "keep": 0},
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("float32", []),
        ("bfloat16, many micro-batches", ["model.dtype=bf16", "train.micro_batch_tokens=96"]),
        ("full checkpointing", ["model.dtype=bf16", "model.activation_checkpointing=full"]),
        ("bf16 moments", ["optim.states=bf16"]),
        ("8-bit moments", ["optim.states=8bit", "model.dtype=bf16"]),
    ],
)
def test_single_trains_the_same_as_fsdp2(
    name: str, words: list[str], config: Path, tmp_path: Path
) -> None:
    """To the bit: the same sums in the same order and the same roundings."""
    ours = tiny_model.train(config, tmp_path / "single", SINGLE, *words)
    theirs = tiny_model.train(config, tmp_path / "fsdp2", "engine.name=fsdp2", *words)
    assert tiny_model.untimed(ours) == tiny_model.untimed(theirs)
    one, other = (
        tiny_model.checkpoint_tensors(tmp_path / run / "checkpoints" / "step_00000006")
        for run in ("single", "fsdp2")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_float8_follows_fsdp2(recipe: str, config: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    words = ["model.dtype=bf16", f"model.float8={recipe}"]
    losses = [
        [
            r["loss"]
            for r in tiny_model.train(config, tmp_path / name, f"engine.name={name}", *words)
        ]
        for name in ("single", "fsdp2")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_single_resumes_bitwise_and_from_two_ranks(config: Path, tmp_path: Path) -> None:
    whole = tiny_model.train(config, tmp_path / "whole", SINGLE)
    half = tmp_path / "whole" / "checkpoints" / "step_00000003"
    resumed = tiny_model.train(config, tmp_path / "resumed", SINGLE, f"checkpoint.resume={half}")
    assert tiny_model.untimed(resumed) == tiny_model.untimed(whole[3:])
    two_ranks = tiny_model.train(config, tmp_path / "two", "engine.name=deepspeed", ranks=2)
    half = tmp_path / "two" / "checkpoints" / "step_00000003"
    continued = tiny_model.train(
        config, tmp_path / "continued", SINGLE, f"checkpoint.resume={half}"
    )
    for one, other in zip(continued, two_ranks[3:], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("words", "ranks", "sentence"),
    [
        ([], 2, "engine.name=single is for one process, this run has 2"),
        (["engine.offload=cpu"], 1, "engine.offload=cpu has no effect with engine.name=single"),
        (["engine.zero_stage=3"], 1, "engine.zero_stage=3 has no effect with engine.name=single"),
    ],
)
def test_single_refuses_ranks_offload_and_zero(
    words: list[str], ranks: int, sentence: str, config: Path, tmp_path: Path
) -> None:
    run_dir = f"run_dir={tmp_path / 'run'}"
    done = tiny_model.run_forked("train", config, run_dir, SINGLE, *words, ranks=ranks)
    assert done.returncode == 2
    assert sentence in done.stderr

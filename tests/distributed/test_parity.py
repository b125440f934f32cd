"""Layout is not semantics: one plain loop, and every engine, world size and packing, agree.

The reference is a loop of its own, in this process: documents one by one, unpadded and unpacked, on
a plain transformers model with plain AdamW, under the noise put on by `NEFTune(...).attach`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import reference_loop, tiny_model
from tests.support.reference_loop import TOLERANCE

STEPS = 10


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.make_config(tmp_path_factory.mktemp("parity"), train={"max_steps": STEPS})


def assert_same(actual: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        for key in ("loss", "grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=TOLERANCE), (one["step"], key)


@pytest.fixture(scope="module")
def expected(config: Path) -> list[dict[str, Any]]:
    records = reference_loop.records(config)
    # The run must move, or equality would say nothing.
    assert records[-1]["loss"] < 0.9 * records[0]["loss"]
    return records


LAYOUTS = {
    "replicated x1": (1, ["engine.name=replicated"]),
    "replicated x3, many micro-batches": (
        3,
        ["engine.name=replicated", "train.micro_batch_tokens=96"],
    ),
    "replicated, sequence 2": (
        2,
        ["engine.name=replicated", "engine.sequence_parallel=2"],
    ),
    "fsdp2 x1": (1, []),
    "fsdp2 x2": (2, []),
    "fsdp2 x3": (3, ["engine.sync_every=micro_batch"]),
    "fsdp2 x2, many micro-batches": (2, ["train.micro_batch_tokens=96"]),
    "fsdp2 x2, an exchange each": (
        2,
        ["engine.sync_every=micro_batch", "train.micro_batch_tokens=96"],
    ),
    "hsdp 2 replicas x 2 shards": (4, ["engine.num_replicas=2"]),
    "hsdp, an exchange each": (
        4,
        ["engine.num_replicas=2", "engine.sync_every=micro_batch", "train.micro_batch_tokens=96"],
    ),
    "zero-1 x2": (2, ["engine.name=deepspeed", "engine.zero_stage=1"]),
    "zero-2 x2": (2, ["engine.name=deepspeed", "engine.zero_stage=2"]),
    "zero-3 x2": (2, ["engine.name=deepspeed", "engine.zero_stage=3"]),
    "many micro-batches": (1, ["train.micro_batch_tokens=96"]),
    "zero-3, many micro-batches": (
        2,
        ["engine.name=deepspeed", "train.micro_batch_tokens=96"],
    ),
    "zero-1, many micro-batches": (
        2,
        ["engine.name=deepspeed", "engine.zero_stage=1", "train.micro_batch_tokens=96"],
    ),
    "one micro-batch": (1, ["train.micro_batch_tokens=100000"]),
    "padded": (2, ["data.packing=false"]),
    "padded, eager": (1, ["data.packing=false", "model.attention=eager"]),
    "activation checkpointing": (2, ["model.activation_checkpointing=full"]),
    "zero-3, activation checkpointing": (
        2,
        ["engine.name=deepspeed", "model.activation_checkpointing=full"],
    ),
    "plain loss": (2, ["model.loss=plain"]),
    "zero-3, plain loss": (2, ["engine.name=deepspeed", "model.loss=plain"]),
    "selective activation checkpointing, weights kept": (
        2,
        ["model.activation_checkpointing=selective", "engine.reshard_after_forward=false"],
    ),
    "zero-3, selective activation checkpointing": (
        2,
        ["engine.name=deepspeed", "model.activation_checkpointing=selective"],
    ),
    "compiled, with every option": (
        2,
        [
            "model.compile=true",
            "model.activation_checkpointing=selective",
            "model.loss=chunked",
            "engine.offload=cpu",
            "train.micro_batch_tokens=96",
        ],
    ),
    "sequence 2 x data 2": (4, ["engine.sequence_parallel=2", "train.micro_batch_tokens=96"]),
    "sequence 2 x data 1, zero-3, every option": (
        2,
        [
            "engine.name=deepspeed",
            "engine.sequence_parallel=2",
            "model.activation_checkpointing=full",
        ],
    ),
    # Two heads of keys for four ranks.
    "sequence 4": (4, ["engine.sequence_parallel=4"]),
    # Four heads for three ranks: all have all heads, and a third of the queries.
    "sequence 3": (3, ["engine.sequence_parallel=3"]),
}


def held_out_losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["held_out_loss"] for line in (run_dir / "evaluations.jsonl").open()]


@pytest.fixture(scope="module")
def expected_held_out(config: Path) -> list[float]:
    """Before training and after it, of one process in float32."""
    run_dir = config.parent / "held_out"
    tiny_model.train(config, run_dir, "engine.name=replicated")
    return held_out_losses(run_dir)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_trains_and_evaluates_the_same(
    name: str,
    config: Path,
    expected: list[dict[str, Any]],
    expected_held_out: list[float],
    tmp_path: Path,
) -> None:
    ranks, words = LAYOUTS[name]
    records = tiny_model.train(config, tmp_path / "run", *words, ranks=ranks)
    assert_same(records, expected)
    for record in records:
        assert record["world_size"] == ranks
        assert record["noise_norm"] == pytest.approx(5 / 3**0.5, rel=0.01)
    assert held_out_losses(tmp_path / "run") == pytest.approx(expected_held_out, rel=TOLERANCE)


@dataclass(frozen=True)
class Traced:
    """torch.compile traces the forward and the backward, and makes no code, which takes longest;
    it logs what it treats as dynamic."""

    def __call__(self) -> None:
        torch._logging.set_logs(dynamic=logging.INFO)
        torch.compile = partial(torch.compile, backend="aot_eager")  # type: ignore[assignment]


def test_compiled_slices_under_zero_3_train_the_same(config: Path, tmp_path: Path) -> None:
    """Nothing is held out, so that one graph is compiled instead of two. The code is that of the
    compiled layout above."""
    held_out, run_dir = "data.num_held_out=0", tmp_path / "run"
    words = [f"run_dir={run_dir}", held_out, "engine.name=deepspeed", "engine.sequence_parallel=2"]
    words += ["model.compile=true", "model.activation_checkpointing=selective"]
    done = tiny_model.run_forked("train", config, *words, ranks=2, before=Traced())
    assert done.returncode == 0, done.stderr
    records = tiny_model.steps(run_dir)
    assert_same(records, reference_loop.records(config, held_out))
    assert records[-1]["num_compiled_graphs"] == 1


def test_compiled_fsdp2_blocks_treat_only_inputs_as_dynamic(config: Path, tmp_path: Path) -> None:
    """Were the width of a head dynamic, too, it would be in the indices of every kernel: in bf16 a
    step took a quarter longer (2026-11-27, a Xeon)."""
    words = [f"run_dir={tmp_path}", "model.compile=true", "train.max_steps=2"]
    done = tiny_model.run_forked("train", config, *words, before=Traced())
    assert done.returncode == 0, done.stderr
    variables = re.findall(r"create_symbol \w+ = \S+ for (\S+)", done.stderr)
    assert len(variables) > 4
    assert [name for name in variables if not re.match(r"L\['(args|kwargs)'\]", name)] == []


def test_slices_of_a_document_share_its_noise(config: Path, tmp_path: Path) -> None:
    """Of the rank stream, too: two ranks that share all sequences draw what one alone draws, and
    see the same held-out loss."""
    words = ["noise.stream=rank", "train.max_steps=3"]
    # As many tokens in a micro-batch: 2 x 128.
    both = tiny_model.train(
        config,
        tmp_path / "both",
        *words,
        "engine.sequence_parallel=2",
        "train.micro_batch_tokens=128",
        ranks=2,
    )
    alone = tiny_model.train(config, tmp_path / "alone", *words)
    assert_same(both, alone)
    for one, other in zip(both, alone, strict=True):
        assert one["noise_norm"] == pytest.approx(other["noise_norm"], rel=1e-6)
        assert one["num_tokens"] == other["num_tokens"]
    both_held_out, alone_held_out = (held_out_losses(tmp_path / run) for run in ("both", "alone"))
    assert both_held_out == pytest.approx(alone_held_out, rel=TOLERANCE)


def test_sequence_parallel_needs_divisible_ranks(config: Path, tmp_path: Path) -> None:
    words = [f"run_dir={tmp_path}", "engine.sequence_parallel=3", "train.micro_batch_tokens=96"]
    done = tiny_model.run_forked("train", config, *words, ranks=2)
    assert done.returncode == 2
    assert "engine.sequence_parallel=3 does not divide the 2 processes" in done.stderr


def test_gradient_below_max_norm_is_not_scaled(config: Path, tmp_path: Path) -> None:
    """No clipping, and no stretching, where the norm is below `max_grad_norm`, or it is 0."""
    words = ["train.max_steps=3", "optim.learning_rate=1e-2", "optim.epsilon=1e-2"]
    expected = reference_loop.records(config, *words, "optim.max_grad_norm=1e6")

    def train(most: float) -> list[dict[str, Any]]:
        run_dir = tmp_path / str(most)
        return tiny_model.train(config, run_dir, *words, f"optim.max_grad_norm={most}", ranks=2)

    clipped = train(0.01)
    for most in (1e6, 0):
        found = train(most)
        assert_same(found, expected)
        # Adam's epsilon makes the size of a gradient count.
        assert abs(clipped[-1]["loss"] / found[-1]["loss"] - 1) > 100 * TOLERANCE


@pytest.mark.parametrize("engine", ["fsdp2", "deepspeed"])
def test_rank_without_documents_trains_the_same(engine: str, config: Path, tmp_path: Path) -> None:
    """Two documents a step on three ranks: one rank has nothing to learn from in every step."""
    words = ["train.global_batch_size=2", "train.max_steps=6"]
    expected = reference_loop.records(config, *words)
    assert_same(
        tiny_model.train(config, tmp_path / "run", f"engine.name={engine}", *words, ranks=3),
        expected,
    )


@dataclass(frozen=True)
class BuildFolder:
    """Where torch would put the operators that it compiles."""

    folder: Path

    def __call__(self) -> None:
        os.environ["TORCH_EXTENSIONS_DIR"] = str(self.folder)


def test_deepspeed_compiles_nothing(config: Path, tmp_path: Path) -> None:
    """So that no run waits for the lock which another left there when it was killed."""
    lock = tmp_path / "built" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    done = tiny_model.run_forked(
        "train",
        config,
        f"run_dir={tmp_path / 'run'}",
        "engine.name=deepspeed",
        "train.max_steps=1",
        ranks=2,
        before=BuildFolder(tmp_path / "built"),
    )
    assert done.returncode == 0, done.stderr
    assert [path for path in (tmp_path / "built").rglob("*") if path.is_file()] == [lock]


def test_untied_head_trains_the_same(tmp_path: Path) -> None:
    config = tiny_model.make_config(tmp_path, train={"max_steps": 4})
    shutil.rmtree(tmp_path / "model")
    tiny_model.make_model(tmp_path / "model", tied=False)
    expected = reference_loop.records(config)
    for engine, ranks in (("fsdp2", 2), ("deepspeed", 2), ("replicated", 2)):
        records = tiny_model.train(config, tmp_path / engine, f"engine.name={engine}", ranks=ranks)
        assert_same(records, expected)


def test_bf16_agrees_between_engines(config: Path, tmp_path: Path) -> None:
    """All round in the same places, so the first losses are equal: in 3 steps, at 4 levels of the
    processor's instructions, to the bit. By then gradients summed in bfloat16, or rotary
    frequencies in it, are 9e-5 off. Later a weight whose master differs in the last bit of float32
    falls to the other side of a rounding to bfloat16 (which resolves 4e-3), sooner or later by the
    processor: up to 1.5e-4 was seen."""
    runs = [
        tiny_model.train(config, tmp_path / str(i), "model.dtype=bf16", *words, ranks=2)
        for i, words in enumerate(
            [
                ["engine.name=fsdp2"],
                ["engine.name=deepspeed", "engine.zero_stage=1"],
                ["engine.name=deepspeed", "engine.zero_stage=3"],
            ]
        )
    ]
    for other in runs[1:]:
        for one, two in zip(runs[0], other, strict=True):
            bound = 1e-6 if one["step"] <= 3 else 1e-3
            assert one["loss"] == pytest.approx(two["loss"], rel=bound), one["step"]


def test_the_rank_stream_differs_between_ranks_but_not_between_runs(
    config: Path, tmp_path: Path
) -> None:
    words = ["noise.stream=rank", "train.max_steps=3"]
    once = tiny_model.train(config, tmp_path / "a", *words, ranks=2)
    again = tiny_model.train(config, tmp_path / "b", *words, ranks=2)
    alone = tiny_model.train(config, tmp_path / "c", *words, ranks=1)
    assert tiny_model.untimed(once) == tiny_model.untimed(again)
    assert once[0]["loss"] != alone[0]["loss"]

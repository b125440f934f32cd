"""Sample answers while training: those of `evaluate`, and the training is that without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support import tiny_model
from tests.support.tiny_model import checkpoint_tensors, run_forked, steps, untimed

PROMPTS = ["Count from 3 upwards.", "Say something that takes a few more words than that.", "Hi"]
_WORDS = ["train.max_steps=4", "evaluate.max_new_tokens=10", "optim.schedule=constant"]
ENGINES = {
    "fsdp2": (2, ["engine.name=fsdp2", "noise.stream=rank"]),
    "zero3": (2, ["engine.name=deepspeed"]),
    "padded": (1, ["engine.name=replicated", "data.packing=false", "model.attention=eager"]),
    "recomputed": (2, ["model.activation_checkpointing=full", "adapter.method=lora"]),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So large a rate that answers change from step to step."""
    return tiny_model.make_config(
        tmp_path_factory.mktemp("samples"), optim={"learning_rate": 0.02, "warmup_steps": 0}
    )


@pytest.fixture(scope="module")
def prompts(config: Path) -> Path:
    path = config.parent / "prompts.txt"
    path.write_text("\n\n".join(PROMPTS) + "\n")
    return path


def asking(prompts: Path) -> list[str]:
    return [f"evaluate.sample_prompts={prompts}", "evaluate.every_steps=2"]


def train(config: Path, run_dir: Path, *words: str, ranks: int = 1) -> str:
    done = run_forked("train", config, f"run_dir={run_dir}", *_WORDS, *words, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


def samples(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("engine", ENGINES)
def test_training_is_the_same_to_the_bit_and_answers_are_those_of_evaluate(
    engine: str, config: Path, prompts: Path, tmp_path: Path
) -> None:
    ranks, words = ENGINES[engine]
    asked, plain = tmp_path / "asked", tmp_path / "plain"
    train(config, plain, *words, "evaluate.every_steps=2", ranks=ranks)
    train(config, asked, *words, *asking(prompts), ranks=ranks)
    assert untimed(steps(asked)) == untimed(steps(plain))
    one, other = (
        checkpoint_tensors(run / "checkpoints" / "step_00000004") for run in (asked, plain)
    )
    assert one.keys() == other.keys() and all(bool((one[n] == other[n]).all()) for n in one)
    assert (asked / "evaluations.jsonl").read_text() == (plain / "evaluations.jsonl").read_text()

    rows = samples(asked)
    assert [(row["step"], row["index"]) for row in rows] == [
        (step, index) for step in (0, 2, 4) for index in range(3)
    ]
    assert [row["instruction"] for row in rows[:3]] == PROMPTS
    assert len({row["output"] for row in rows}) > 3  # else the case shows nothing
    questions = tmp_path / "questions.json"
    questions.write_text(json.dumps([{"instruction": prompt} for prompt in PROMPTS]))
    done = run_forked("evaluate", asked, f"evaluate.instructions={questions}")
    assert done.returncode == 0, done.stdout + done.stderr
    answers = json.loads((asked / "evaluations" / "step_00000004" / "answers.json").read_text())
    assert [row["output"] for row in rows[-3:]] == [row["output"] for row in answers]


def test_tensorboard_and_watch_show_the_answers(
    config: Path, prompts: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    said = train(config, run_dir, *asking(prompts), "data.num_held_out=0")
    assert "step 4: 3 sample answers, in samples.jsonl" in said
    last = samples(run_dir)[-1]
    events = EventAccumulator(str(run_dir / "tensorboard" / "run")).Reload()
    found = events.Tensors("samples/3/text_summary")
    assert [event.step for event in found] == [0, 2, 4]
    text = found[-1].tensor_proto.string_val[0].decode()
    assert PROMPTS[-1] in text and last["output"].splitlines()[0] in text
    done = run_forked("watch", run_dir)
    shown = " ".join(f"{PROMPTS[-1]} -> {last['output']}".split())
    assert f"sample of step 4: {shown}" in done.stdout


def test_resumed_run_has_the_answers_of_an_uninterrupted_one(
    config: Path, prompts: Path, tmp_path: Path
) -> None:
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    words = [*asking(prompts), "data.num_held_out=0"]
    train(config, cut, *words, "train.max_steps=2")
    train(config, cut, *words)
    train(config, whole, *words)
    assert samples(cut) == samples(whole)


@pytest.mark.parametrize(
    ("content", "words", "said"),
    [
        ("", ["evaluate.every_steps=1"], "holds no prompt"),
        (" \n\n", ["evaluate.every_steps=1"], "holds no prompt"),
        ("\xff", ["evaluate.every_steps=1"], "not UTF-8"),
        (None, ["evaluate.every_steps=1"], "cannot be read"),
        ("Hi\n", [], "without evaluate.every_steps"),
        ("Hi\n" + "word " * 200, ["evaluate.every_steps=1"], "prompt 2 has"),
    ],
    ids=["empty", "blank", "binary", "missing", "never", "long"],
)
def test_unusable_prompts_exit_2_before_anything_begins(
    content: str | None, words: list[str], said: str, tmp_path: Path
) -> None:
    config = tiny_model.make_config(tmp_path)
    path = tmp_path / "model" / "config.json"
    own = json.loads(path.read_text())
    # Frequencies that change with the longest document set the model a limit.
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    path.write_text(json.dumps({**own, "max_position_embeddings": 128, "rope_parameters": rope}))
    prompts, run_dir = tmp_path / "prompts.txt", tmp_path / "run"
    if content is not None:
        prompts.write_bytes(content.encode("latin-1"))
    asked = f"evaluate.sample_prompts={prompts}"
    done = run_forked("train", config, f"run_dir={run_dir}", asked, *words)
    assert done.returncode == 2
    assert "evaluate.sample_prompts=" in done.stderr and said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (run_dir / "config.yaml").exists()

"""Laws 5 and 6: killed at any moment, a run continues as if it had never stopped.

Every drill ends with the same comparison: the records of all steps (timings apart), and every
weight and moment of the last checkpoint, bit for bit those of a run that nobody touched.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from neftune_dist.checkpoint import store
from tests.distributed import drill
from tests.support import tiny_model
from tests.support.tiny_model import Forked

STEPS = 12
ENGINES = {
    "fsdp2": ["engine.name=fsdp2"],
    "zero-1": ["engine.name=deepspeed", "engine.zero_stage=1"],
    "zero-3": ["engine.name=deepspeed", "engine.zero_stage=3"],
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.make_config(
        tmp_path_factory.mktemp("resume"),
        train={"max_steps": STEPS},
        checkpoint={"every_steps": 3},
        evaluate={"every_steps": 4},
        noise={"stream": "rank"},
    )


@pytest.fixture(scope="module")
def untouched(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run directory of an engine's uninterrupted run on two ranks, made once."""
    made: dict[str, Path] = {}

    def of(engine: str) -> Path:
        if engine not in made:
            made[engine] = tmp_path_factory.mktemp(engine) / "run"
            tiny_model.train(config, made[engine], *ENGINES[engine], ranks=2)
        return made[engine]

    return of


@pytest.fixture(scope="module")
def alone(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of an uninterrupted run on one rank."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    tiny_model.train(config, run_dir)
    return run_dir


def start(config: Path, run_dir: Path, *words: str, ranks: int = 2) -> Forked:
    return Forked("train", config, f"run_dir={run_dir}", *words, ranks=ranks)


def kill_all(run: Forked) -> None:
    run.kill()


def kill_one_rank(run: Forked) -> None:
    run.ranks[-1].kill()
    assert run.wait().returncode != 0


def assert_as_untouched(run_dir: Path, untouched_dir: Path) -> None:
    assert tiny_model.untimed(tiny_model.steps(run_dir)) == tiny_model.untimed(
        tiny_model.steps(untouched_dir)
    )
    evaluations = [
        (run / "evaluations.jsonl").read_text().splitlines() for run in (run_dir, untouched_dir)
    ]
    assert evaluations[0] == evaluations[1]
    final = [store.find_all(run)[0] for run in (run_dir, untouched_dir)]
    assert final[0].step == final[1].step == STEPS
    ours, theirs = (tiny_model.checkpoint_tensors(checkpoint.folder) for checkpoint in final)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key


# All ranks of FSDP2 at once: the two tests that follow.
@pytest.mark.parametrize(
    ("engine", "kill"),
    [
        ("fsdp2", kill_one_rank),
        ("zero-1", kill_all),
        ("zero-3", kill_one_rank),
    ],
)
def test_run_killed_between_saves_resumes_bitwise(
    engine: str,
    kill: Callable[[Forked], None],
    config: Path,
    untouched: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    run = start(config, run_dir, *ENGINES[engine])
    run.until(lambda: len(tiny_model.steps(run_dir)) >= 5)
    kill(run)
    tiny_model.train(config, run_dir, *ENGINES[engine], ranks=2)
    assert_as_untouched(run_dir, untouched(engine))


def test_run_killed_while_saving_resumes_bitwise(
    config: Path, untouched: Callable[[str], Path], tmp_path: Path
) -> None:
    """Saves after every step, and three kills within moments of a save's beginning."""
    run_dir, chance = tmp_path / "run", random.Random(0)
    words = [*ENGINES["fsdp2"], "checkpoint.every_steps=1"]
    partial = run_dir / "checkpoints"
    for target in (2, 5, 8):
        run = start(config, run_dir, *words)
        run.until(lambda: bool(list(partial.glob(f"step_{target:08d}*"))))  # noqa: B023
        time.sleep(chance.uniform(0, 0.03))
        kill_all(run)
        assert store.damaged_folders(run_dir) == []
        assert store.find_all(run_dir)[0].step >= target - 1
    tiny_model.train(config, run_dir, *words, ranks=2)
    assert_as_untouched(run_dir, untouched("fsdp2"))
    assert not list(partial.glob("*.partial"))


def test_run_killed_before_the_first_save_starts_over(
    config: Path, untouched: Callable[[str], Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run = start(config, run_dir, *ENGINES["fsdp2"])
    run.until(lambda: len(tiny_model.steps(run_dir)) >= 1)
    kill_all(run)
    tiny_model.train(config, run_dir, *ENGINES["fsdp2"], ranks=2)
    assert_as_untouched(run_dir, untouched("fsdp2"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_run_stopped_by_a_signal_resumes_bitwise(
    number: signal.Signals, config: Path, alone: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run = start(config, run_dir, "checkpoint.every_steps=0", ranks=1)
    run.until(lambda: len(tiny_model.steps(run_dir)) >= 2)
    run.send_signal(number)
    assert run.wait().returncode == 75
    stopped_at = len(tiny_model.steps(run_dir))
    assert store.find_all(run_dir)[0].step == stopped_at < STEPS
    tiny_model.train(config, run_dir)
    assert_as_untouched(run_dir, alone)


@pytest.mark.parametrize(
    ("first", "then", "ranks"), [("zero-3", "fsdp2", 3), ("fsdp2", "zero-1", 1)]
)
def test_continues_under_another_engine_and_world(
    first: str, then: str, ranks: int, config: Path, tmp_path: Path
) -> None:
    """With the sample stream: the same documents, the same noise, the loss equal to rounding."""
    words = ["noise.stream=sample"]
    whole = tiny_model.train(config, tmp_path / "whole", *ENGINES[first], *words, ranks=2)
    run_dir = tmp_path / "run"
    run = start(config, run_dir, *ENGINES[first], *words)
    run.until(lambda: (run_dir / "checkpoints" / "step_00000006").exists())
    kill_all(run)
    records = tiny_model.train(config, run_dir, *ENGINES[then], *words, ranks=ranks)
    assert len(records) == STEPS
    for one, other in zip(records, whole, strict=True):
        assert one["num_tokens"] == other["num_tokens"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert records[-1]["world_size"] == ranks


def test_finished_run_changes_nothing(config: Path, untouched: Callable[[str], Path]) -> None:
    run_dir = untouched("fsdp2")
    before = (run_dir / "metrics.jsonl").read_bytes()
    done = tiny_model.run_forked("train", config, f"run_dir={run_dir}", *ENGINES["fsdp2"], ranks=2)
    assert done.returncode == 0
    assert "nothing is left to train" in done.stdout
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_finished_run_can_be_extended(config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    tiny_model.train(config, run_dir, "optim.schedule=constant", "train.max_steps=4")
    records = tiny_model.train(config, run_dir, "optim.schedule=constant", "train.max_steps=8")
    whole = tiny_model.train(config, tmp_path / "w", "optim.schedule=constant", "train.max_steps=8")
    assert tiny_model.untimed(records) == tiny_model.untimed(whole)
    # What decides speed alone may change on the way.
    words = ["model.loss=plain", "model.activation_checkpointing=selective", "engine.offload=cpu"]
    records = tiny_model.train(
        config, run_dir, "optim.schedule=constant", "train.max_steps=10", *words
    )
    assert [record["step"] for record in records] == list(range(1, 11))
    # Another run would end before its first step, and have no checkpoint.
    newest, other = run_dir / "checkpoints/step_00000010", tmp_path / "other"
    words = [f"run_dir={other}", f"checkpoint.resume={newest}", "optim.schedule=constant"]
    done = tiny_model.run_forked("train", config, *words, "train.max_steps=10")
    assert done.returncode == 2
    assert f"{newest} leaves nothing to train: it is of step 10" in done.stderr
    assert not (other / "metrics.jsonl").exists()


def test_dropout_resumes_bitwise(config: Path, tmp_path: Path) -> None:
    """What a model drops is drawn from torch's generator, which no checkpoint holds."""
    folder = tiny_model.make_model(tmp_path / "model")
    hf_config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**hf_config, "attention_dropout": 0.2}))
    words = [f"model.name_or_path={folder}", "optim.schedule=constant", "checkpoint.every_steps=0"]
    whole = tiny_model.train(config, tmp_path / "whole", *words, "train.max_steps=6")
    tiny_model.train(config, tmp_path / "run", *words, "train.max_steps=3")
    records = tiny_model.train(config, tmp_path / "run", *words, "train.max_steps=6")
    assert tiny_model.untimed(records) == tiny_model.untimed(whole)
    plain = tiny_model.train(config, tmp_path / "plain", *words[1:], "train.max_steps=1")
    assert plain[0]["loss"] != whole[0]["loss"]


def damage(folder: Path) -> None:
    shard = next(folder.glob("*.distcp"))
    os.truncate(shard, shard.stat().st_size // 2)


def test_damaged_newest_checkpoint_resumes_from_the_one_before(
    config: Path, alone: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(alone, run_dir)
    newest = store.find_all(run_dir)[0]
    damage(newest.folder)
    done = tiny_model.run_forked("train", config, f"run_dir={run_dir}")
    assert done.returncode == 0
    assert f"{newest.folder} is damaged and is passed over" in done.stdout
    assert tiny_model.untimed(tiny_model.steps(run_dir)) == tiny_model.untimed(
        tiny_model.steps(alone)
    )
    assert store.find_all(run_dir)[0].step == STEPS


def test_only_damaged_checkpoints_exit_2(config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    tiny_model.train(config, run_dir, "checkpoint.every_steps=0")
    damage(store.find_all(run_dir)[0].folder)
    before = sorted(p.name for p in (run_dir / "checkpoints").rglob("*"))
    done = tiny_model.run_forked("train", config, f"run_dir={run_dir}")
    assert done.returncode == 2
    assert "damaged checkpoints only" in done.stderr
    assert sorted(p.name for p in (run_dir / "checkpoints").rglob("*")) == before


def test_full_disk_exits_2_and_keeps_last_checkpoint(config: Path, tmp_path: Path) -> None:
    """The largest file allowed is smaller than a checkpoint: every write of one fails."""
    run_dir = tmp_path / "run"
    tiny_model.train(config, run_dir, "train.max_steps=3", "optim.schedule=constant")
    words = (f"run_dir={run_dir}", "optim.schedule=constant", "logging.tensorboard=false")
    done = tiny_model.run_forked("train", config, *words, before=drill.SmallFiles(200 * 1024))
    assert done.returncode == 2, done.stderr
    assert "could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert [c.step for c in store.find_all(run_dir)] == [3]


@pytest.mark.parametrize(
    ("words", "needle"),
    [
        (["train.global_batch_size=11"], "train.global_batch_size"),
        (["noise.alpha=10"], "noise.alpha"),
        (["data.max_length=64"], "data.max_length (then 96, now 64)"),
        (["optim.learning_rate=2e-3"], "checkpoint.accept_changes=optim.learning_rate"),
        (
            ["noise.alpha=10", "optim.beta1=0.8", "checkpoint.accept_changes=optim.beta1"],
            "checkpoint.accept_changes=noise.alpha,optim.beta1,",
        ),
    ],
)
def test_another_run_is_refused(
    words: list[str], needle: str, config: Path, untouched: Callable[[str], Path]
) -> None:
    run_dir = untouched("fsdp2")
    before = (run_dir / "metrics.jsonl").read_bytes()
    done = tiny_model.run_forked(
        "train", config, f"run_dir={run_dir}", "train.max_steps=20", *words
    )
    assert done.returncode == 2
    assert needle in done.stderr
    assert "Traceback" not in done.stderr
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_another_model_is_refused(
    config: Path, untouched: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_model.make_model(tmp_path / "model")
    hf_config = json.loads((folder / "config.json").read_text())
    hf_config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000.0}
    (folder / "config.json").write_text(json.dumps(hf_config))
    done = tiny_model.run_forked(
        "train",
        config,
        f"run_dir={untouched('fsdp2')}",
        f"model.name_or_path={folder}",
        "train.max_steps=20",
    )
    assert done.returncode == 2
    assert "another model" in done.stderr


def assert_refused_by_what_it_read(
    words: list[str], what: str, config: Path, run_dir: Path
) -> None:
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    newest = store.find_all(run_dir)[0].folder
    done = tiny_model.run_forked(
        "train", config, f"run_dir={run_dir}", "train.max_steps=20", *words
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr == (
        f"neftune-dist: The checkpoint {newest} was made with {what}: set another run_dir, or "
        "restore the configuration that made it.\n"
    )
    assert {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()} == before


def another_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(tiny_model.TEMPLATE.replace("<|", "<<|"))


def another_vocabulary(folder: Path) -> None:
    """Two tokens have changed places; their number is the same."""
    content = json.loads((folder / "tokenizer.json").read_text())
    ids = content["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def test_template_file_is_compared_by_text(config: Path, tmp_path: Path) -> None:
    one, two, run_dir = tmp_path / "one.jinja", tmp_path / "two.jinja", tmp_path / "run"
    for path in (one, two):
        path.write_text(tiny_model.TEMPLATE)
    tiny_model.train(config, run_dir, f"data.template={one}", "train.max_steps=1")
    done = tiny_model.run_forked(
        "train", config, f"run_dir={run_dir}", f"data.template={two}", "train.max_steps=1"
    )
    assert done.returncode == 0, done.stderr
    assert "nothing is left to train" in done.stdout
    one.write_text(tiny_model.TEMPLATE.replace("<|", "<<|"))
    what = f"another text in data.template={one}"
    assert_refused_by_what_it_read([f"data.template={one}"], what, config, run_dir)
    done = tiny_model.run_forked(
        "train", config, f"run_dir={run_dir}", "data.template=llama2", "train.max_steps=20"
    )
    assert done.returncode == 2
    assert f"data.template (then {one}, now llama2)" in done.stderr


@pytest.mark.parametrize("change", [another_template, another_vocabulary])
def test_another_tokenizer_is_refused(
    change: Callable[[Path], None],
    config: Path,
    untouched: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    change(tiny_model.make_model(tmp_path / "model"))
    words = [f"model.name_or_path={tmp_path / 'model'}"]
    assert_refused_by_what_it_read(words, "another tokenizer", config, untouched("fsdp2"))


def test_another_dataset_is_refused(
    config: Path, untouched: Callable[[str], Path], tmp_path: Path
) -> None:
    """As many rows, one of which differs by a letter."""
    rows = tiny_model.make_rows(tmp_path / "rows.jsonl")
    rows.write_text(rows.read_text().replace("Count from 5 upwards", "Count from 5 upward"))
    words = [f"data.source={rows}"]
    assert_refused_by_what_it_read(words, "another dataset", config, untouched("fsdp2"))


def test_moved_data_and_model_resume(
    config: Path, untouched: Callable[[str], Path], tmp_path: Path
) -> None:
    model, rows = (
        tiny_model.make_model(tmp_path / "model"),
        tiny_model.make_rows(tmp_path / "rows.jsonl"),
    )
    shutil.copytree(untouched("fsdp2"), tmp_path / "run")
    words = [f"run_dir={tmp_path / 'run'}", f"model.name_or_path={model}", f"data.source={rows}"]
    done = tiny_model.run_forked("train", config, *words)
    assert done.returncode == 0, done.stderr
    assert "nothing is left to train" in done.stdout

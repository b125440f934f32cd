"""A user's mistake: one sentence, once, from one rank, on all ranks promptly; nothing damaged."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
import threading
import time
import types
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from neftune_dist.distributed import outcome
from tests.support import tiny_model

PROMPT_SECONDS = 120  # a deadline: half a minute was not enough beside much other work


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    path = tiny_model.make_config(folder)
    bad = folder / "bad.jsonl"
    rows = [{"instruction": "a", "input": "", "output": "b"}] * 50 + [{"instruction": "a"}] * 3
    bad.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "empty.jsonl").write_text("")
    broken = tiny_model.make_model(folder / "broken")
    weights = load_file(broken / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    misshapen = tiny_model.make_model(folder / "misshapen")
    weights = load_file(misshapen / "model.safetensors")
    weights["model.norm.weight"] = torch.zeros(63)
    save_file(weights, misshapen / "model.safetensors", metadata={"format": "pt"})
    return path


CASES = {
    "unknown key": (["noise.alhpa=5"], "did you mean noise.alpha?"),
    "contradiction": (["train.micro_batch_tokens=50"], "train.micro_batch_tokens=50"),
    "missing file": (["data.source=/no/such/file.jsonl"], "/no/such/file.jsonl does not exist"),
    "bad rows": (["data.source={}/bad.jsonl"], "the first: row 51: field 'output' is missing"),
    "empty dataset": (["data.source={}/empty.jsonl"], "empty.jsonl is empty"),
    "too few documents": (["train.global_batch_size=100"], "train.global_batch_size=100"),
    "hub out of reach": (["model.name_or_path=nobody/nothing"], "nobody/nothing"),
    "tensor missing": (["model.name_or_path={}/broken"], "lack model.norm.weight"),
    "tensor misshapen": (["model.name_or_path={}/misshapen"], "has shape (63,)"),
    "flex on a CPU": (["model.attention=flex"], "model.attention=flex trains on GPUs alone"),
    "replicas": (["engine.num_replicas=3"], "engine.num_replicas=3"),
    "run_dir": (["run_dir=/proc/nowhere"], "/proc/nowhere"),
}


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_report_it_once(name: str, config: Path, tmp_path: Path) -> None:
    words, needle = CASES[name]
    words = [word.format(config.parent) for word in words]
    began = time.monotonic()
    done = tiny_model.run_forked("train", config, f"run_dir={tmp_path / 'run'}", *words, ranks=2)
    assert time.monotonic() - began < PROMPT_SECONDS
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if line.startswith("neftune-dist")]
    assert len(said) == 1, done.stderr
    assert needle in said[0]
    assert "Traceback" not in done.stderr + done.stdout


def test_tensor_that_is_left_over_is_named_before_the_first_step(
    config: Path, tmp_path: Path
) -> None:
    model = tiny_model.make_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"] = torch.ones(2)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    words = f"run_dir={tmp_path / 'run'}", f"model.name_or_path={model}", "train.max_steps=1"
    done = tiny_model.run_forked("train", config, *words)
    assert done.returncode == 0, done.stderr
    assert "no part of the model, nor of an export: model.layers.2.mlp" in done.stdout


def test_torchrun_reports_it_once(config: Path, tmp_path: Path) -> None:
    words, needle = CASES["missing file"]
    done = tiny_model.run("train", config, f"run_dir={tmp_path / 'run'}", *words, ranks=2)
    assert done.returncode != 0  # torchrun knows no exit code but 1
    said = [line for line in done.stderr.splitlines() if line.startswith("neftune-dist")]
    assert len(said) == 1, done.stderr
    assert needle in said[0]
    # torchrun prints a traceback of its own; none may be this package's.
    assert "neftune_dist/" not in done.stderr


def test_alone_the_exit_code_is_2_and_there_is_no_traceback(config: Path, tmp_path: Path) -> None:
    for name, start in (("bad rows", tiny_model.run), ("tensor missing", tiny_model.run_forked)):
        words, needle = CASES[name]
        words = [word.format(config.parent) for word in words]
        done = start("train", config, f"run_dir={tmp_path / 'run'}", *words)
        assert done.returncode == 2
        assert needle in done.stderr
        assert "Traceback" not in done.stderr


def test_model_without_a_chat_template_needs_a_prompt_template(
    config: Path, tmp_path: Path
) -> None:
    folder = tiny_model.make_model(tmp_path / "model")
    for file in ("chat_template.jinja",):
        (folder / file).unlink()
    words = (config, f"run_dir={tmp_path / 'run'}", f"model.name_or_path={folder}")
    done = tiny_model.run_forked("train", *words)
    assert done.returncode == 2
    assert "no chat template" in done.stderr
    done = tiny_model.run_forked(
        "train", *words, "data.template=alpaca", "data.max_length=160", "train.max_steps=1"
    )
    assert done.returncode == 0, done.stderr


def test_a_second_run_in_the_same_directory_is_refused(config: Path, tmp_path: Path) -> None:
    from filelock import FileLock

    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with FileLock(run_dir / ".lock"):
        done = tiny_model.run_forked("train", config, f"run_dir={run_dir}", before=_hurry)
    assert done.returncode == 2
    assert "in use by another run" in done.stderr


def test_a_run_directory_that_a_dying_run_frees_is_waited_for(config: Path, tmp_path: Path) -> None:
    from filelock import FileLock

    run_dir = tmp_path / "run"
    run_dir.mkdir()
    lock = FileLock(run_dir / ".lock", thread_local=False)
    lock.acquire()
    freed = threading.Timer(6, lock.release)  # of it, about two for the other to come
    freed.start()
    done = tiny_model.run_forked("train", config, f"run_dir={run_dir}", "train.max_steps=1")
    assert done.returncode == 0, done.stderr
    assert "is in use; waiting" in done.stdout


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_run_goes_on_where_the_disk_has_no_locks(
    number: int, config: Path, tmp_path: Path
) -> None:
    """As Lustre without flock and NFS without its lock service. What a machine that died has left
    keeps nobody out."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / ".lock").write_text("12345\nanother-machine\n")
    words = (f"run_dir={run_dir}", "train.max_steps=1")
    done = tiny_model.run_forked("train", config, *words, before=partial(_without_locks, number))
    assert done.returncode == 0, done.stderr
    assert f"warning: {run_dir} is on a disk without locks" in done.stderr


def _without_locks(number: int) -> None:
    from neftune_dist.checkpoint import run_files

    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    run_files._CLAIM_SECONDS = 2.0
    fcntl.flock = flock


def _hurry() -> None:
    from neftune_dist.checkpoint import run_files

    run_files._CLAIM_SECONDS = 2.0


@dataclass(frozen=True)
class BrokenPackage:
    """PEFT is installed, and cannot be imported; a launcher wants to hear of the run's end."""

    folder: Path

    def __call__(self) -> None:
        (self.folder / "peft.py").write_text("from torch import no_such_name")
        sys.path.insert(0, str(self.folder))
        del sys.modules["peft"]
        os.environ[outcome.VARIABLE] = str(self.folder)


def test_package_that_cannot_be_imported_is_a_mistake(config: Path, tmp_path: Path) -> None:
    """Of which a launcher starts nothing again."""
    words = (config, f"run_dir={tmp_path / 'run'}", "adapter.method=lora")
    done = tiny_model.run_forked("train", *words, before=BrokenPackage(tmp_path))
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    ended = json.loads((tmp_path / "rank_0.json").read_text())
    assert ended["kind"] == outcome.MISTAKE
    assert ended["error"].startswith("`import peft` fails: cannot import name 'no_such")


def taken_store() -> None:
    """A client of MLflow whose server is another one."""

    def search_experiments(max_results: int) -> None:
        raise ConnectionError("taken")

    stub = types.ModuleType("mlflow")
    vars(stub)["search_experiments"] = search_experiments
    vars(stub)["set_tracking_uri"] = print
    sys.modules["mlflow"] = stub


def test_tracker_that_does_not_answer_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    words = ["model.name_or_path=absent", "logging.mlflow=true", f"run_dir={tmp_path / 'run'}"]
    done = tiny_model.run_forked("train", "debug", *words, before=taken_store)
    assert done.returncode == 2 and "logging.mlflow=true: the store" in done.stderr
    assert not (tmp_path / "run" / "config.yaml").exists()

"""On all GPUs of this machine: NCCL's runs train what one GPU trains, save and resume, and end when
a rank dies, fails or hangs.

One command, some ten minutes: pytest tests/gpu/test_several_gpus.py
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from neftune_dist.evaluation.results import read_results
from tests.slurm.cluster import ROOT, SCRIPT, process_of_rank
from tests.support import tiny_model

NUM_GPUS = torch.cuda.device_count()
RANKS = 1 << (max(2, NUM_GPUS).bit_length() - 1)  # so that two divides them
GPUS = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(NUM_GPUS))))
# torchrun gives ranks that wait for a dead one on their GPUs half a minute.
END_SECONDS = 120.0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NUM_GPUS < 2, reason="needs two CUDA devices"),
]
ZERO = "engine.name=deepspeed"
LAYOUTS = {
    "fsdp2, an exchange each": ["engine.sync_every=micro_batch", "train.micro_batch_tokens=96"],
    "fsdp2, an exchange a step": ["engine.sync_every=step", "train.micro_batch_tokens=96"],
    "fsdp2, offloaded": ["engine.offload=cpu", "train.micro_batch_tokens=96"],
    "hsdp": ["engine.num_replicas=2", "optim.max_grad_norm=0.5"],
    "replicated": ["engine.name=replicated", "train.micro_batch_tokens=96"],
    "zero-1": [ZERO, "engine.zero_stage=1", "train.micro_batch_tokens=96"],
    "zero-2": [ZERO, "engine.zero_stage=2", "train.micro_batch_tokens=96"],
    "zero-3": [ZERO, "engine.zero_stage=3", "train.micro_batch_tokens=96"],
    "sequences shared": ["engine.sequence_parallel=2", "train.micro_batch_tokens=48"],
    "sequences shared, replicated": ["engine.sequence_parallel=2", "engine.name=replicated"],
    "bf16, compiled, selective": [
        "model.dtype=bf16",
        "model.compile=true",
        "model.activation_checkpointing=selective",
    ],
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.make_config(
        tmp_path_factory.mktemp("several"),
        train={"max_steps": 8},
        checkpoint={"every_steps": 4, "keep": 0, "mode": "async"},
    )


def run(verb: str, *words: object, ranks: int = RANKS) -> str:
    done = tiny_model.run(verb, *words, ranks=ranks, CUDA_VISIBLE_DEVICES=GPUS)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train(config: Path, run_dir: Path, *words: str, ranks: int = RANKS) -> list[dict[str, Any]]:
    run("train", config, f"run_dir={run_dir}", *words, ranks=ranks)
    return tiny_model.steps(run_dir)


@pytest.fixture(scope="module")
def on_one(config: Path) -> Path:
    train(config, config.parent / "one", ranks=1)
    return config.parent / "one"


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]], rel: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=rel), one["step"]
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=10 * rel), one["step"]
        assert one["noise_norm"] == pytest.approx(other["noise_norm"], rel=max(rel, 1e-6) / 10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_gpus_train_what_one_trains(
    layout: str, config: Path, on_one: Path, tmp_path: Path
) -> None:
    words = LAYOUTS[layout]
    if ZERO in words and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    if "optim.max_grad_norm=0.5" in words:  # below the norms: replicas clip by the same factor
        expected = train(config, tmp_path / "one", words[1], ranks=1)
    else:
        expected = tiny_model.steps(on_one)
    found = train(config, tmp_path / "run", *words)
    assert {record["world_size"] for record in found} == {RANKS}
    assert_same(found, expected, 0.02 if "model.dtype=bf16" in words else 1e-4)


def test_checkpoint_of_all_gpus_is_continued_by_all_and_by_one(
    config: Path, on_one: Path, tmp_path: Path
) -> None:
    whole = train(config, tmp_path / "whole")
    half = f"checkpoint.resume={tmp_path / 'whole/checkpoints/step_00000004'}"
    for name, ranks, words in (
        ("all", RANKS, []),
        ("one", 1, ["engine.name=replicated"]),
        ("replicated", RANKS, ["engine.name=replicated"]),
    ):
        assert_same(train(config, tmp_path / name, half, *words, ranks=ranks), whole[4:], 1e-4)


def test_all_gpus_evaluate_as_one(config: Path, on_one: Path, tmp_path: Path) -> None:
    losses = []
    for ranks in (RANKS, 1):
        run("evaluate", on_one, "--output", tmp_path / str(ranks), ranks=ranks)
        losses.append(read_results(tmp_path / str(ranks))["summary"]["losses"]["held_out_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_doctor_finds_the_collectives_right(tmp_path: Path) -> None:
    done = tiny_model.run("doctor", "--run-dir", tmp_path, ranks=RANKS, CUDA_VISIBLE_DEVICES=GPUS)
    assert f"right sums, {RANKS} ranks on" in done.stdout, done.stdout + done.stderr


def launch(config: Path, run_dir: Path, *words: str, **faults: object) -> subprocess.Popen[str]:
    """launcher/torchrun.sh on all GPUs; a run of some seconds, whose ranks fail as `faults` say."""
    path = os.pathsep.join([str(SCRIPT.parent / "faults"), str(ROOT)])
    return subprocess.Popen(
        [str(ROOT / "launcher/torchrun.sh"), str(config), f"run_dir={run_dir}", *words],
        env=tiny_model.environment(
            CUDA_VISIBLE_DEVICES=GPUS,
            NPROC=str(RANKS),
            PYTHONPATH=path,
            FAULTS=json.dumps({"step_seconds": 0.5, **faults}),
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + tiny_model.DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def outcomes(run_dir: Path) -> list[tuple[str, str]]:
    """The kind and the error of each attempt."""
    found = [json.loads(p.read_text()) for p in sorted(run_dir.glob("logs/*/outcome.json"))]
    return [(end["kind"], end["error"]) for end in found]


def gpus_of_processes() -> list[int]:
    """On how many GPUs each process has memory; empty where the driver does not say."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-compute-apps=pid,gpu_uuid", "--format=csv,noheader"]
    rows = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    pids = [row.partition(",")[0] for row in {*rows}]
    return [pids.count(pid) for pid in {*pids}]


def test_killed_rank_is_restarted_and_no_rank_has_memory_on_anothers_gpu(
    config: Path, on_one: Path, tmp_path: Path
) -> None:
    process = launch(config, tmp_path / "run")
    until(lambda: (tmp_path / "run/checkpoints/step_00000004").exists())
    assert {*gpus_of_processes()} <= {1}
    os.kill(process_of_rank(1, tmp_path / "run"), signal.SIGKILL)
    text = process.communicate(timeout=END_SECONDS + tiny_model.DEADLINE_SECONDS)[0]
    assert process.returncode == 0, text
    assert outcomes(tmp_path / "run") == [
        ("failed", "rank 1 died: killed by SIGKILL"),
        ("done", ""),
    ]
    assert_same(tiny_model.steps(tmp_path / "run"), tiny_model.steps(on_one), 1e-4)


@pytest.mark.parametrize(
    ("what", "words", "faults", "error"),
    [
        ("fails", [], {"fail_at": 4, "fail_rank": 1}, "ValueError: step 4"),
        ("hangs", ["train.hang_minutes=0.3"], {}, "hang: rank 1 does not answer"),
    ],
)
def test_rank_alone_ends_the_run_and_is_named(
    what: str, words: list[str], faults: dict[str, int], error: str, config: Path, tmp_path: Path
) -> None:
    process = launch(config, tmp_path / "run", *words, "--max-restarts", "0", **faults)
    until(lambda: len(tiny_model.steps(tmp_path / "run")) >= 3)
    if what == "hangs":
        os.kill(process_of_rank(1, tmp_path / "run"), signal.SIGSTOP)
    text = process.communicate(timeout=END_SECONDS)[0]
    assert process.returncode == 1, text
    [(kind, found)] = outcomes(tmp_path / "run")
    assert kind == "failed" and error in found

"""On a real Slurm of four nodes: two engines, a time limit, signals in every phase, submit.py.

Deaths and absences are in drill.py; their outcome stands in slurm/README.md.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from neftune_dist.checkpoint import store
from tests.slurm import cluster
from tests.slurm.cluster import Cluster, Job
from tests.support import tiny_model

pytestmark = pytest.mark.skipif(cluster.missing() is not None, reason=str(cluster.missing()))

WORDS = ("train.max_steps=12", "checkpoint.every_steps=5", "evaluate.every_steps=6")
# Longer than three times what is left of a minute; Slurm's signal comes up to half a minute early.
LONG = ("train.max_steps=100", "checkpoint.every_steps=5", "evaluate.every_steps=50")
LONG_STEP_SECONDS = 1.25
ZERO_3 = ("engine.name=deepspeed", "engine.zero_stage=3")
TWO_BY_TWO = ("--nodes=2", "--gpus-per-node=2")
ONE_BY_TWO = ("--nodes=1", "--gpus-per-node=2")
TRAIN = "slurm/train.sbatch"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    started = Cluster(tmp_path_factory.mktemp("slurm"), 4)
    yield started
    started.do("stop")


@pytest.fixture(scope="module")
def config(slurm: Cluster) -> Path:
    return tiny_model.make_config(slurm.folder)


@pytest.fixture(scope="module")
def limited(slurm: Cluster, config: Path) -> Job:
    """A job of two nodes whose time limit is shorter than its run; others run beside it."""
    return slurm.sbatch(
        *TWO_BY_TWO,
        "--time=1",
        "--signal=B:USR1@10",
        TRAIN,
        config,
        f"run_dir={slurm.folder / 'limited'}",
        *LONG,
        "--max-restarts=20",  # on a busy machine, starting may take all the time there is
        faults={"step_seconds": LONG_STEP_SECONDS},
    )


def same(run_dir: Path, untouched: Path) -> None:
    """Every step once, and all that was trained, bit for bit."""
    assert tiny_model.untimed(tiny_model.steps(run_dir)) == tiny_model.untimed(
        tiny_model.steps(untouched)
    )
    assert (run_dir / "evaluations.jsonl").read_text() == (
        untouched / "evaluations.jsonl"
    ).read_text()
    assert store.damaged_folders(run_dir) == []
    ours, theirs = (
        tiny_model.checkpoint_tensors(store.find_all(each)[0].folder)
        for each in (run_dir, untouched)
    )
    assert ours.keys() == theirs.keys()
    assert all((ours[key] == theirs[key]).all() for key in ours)


@pytest.fixture(scope="module")
def one_node(slurm: Cluster, config: Path) -> Path:
    """The same run, four ranks on this machine."""
    tiny_model.train(config, slurm.folder / "one_node", *WORDS, ranks=4)
    return slurm.folder / "one_node"


@pytest.fixture(scope="module")
def two_ranks(slurm: Cluster, config: Path) -> Path:
    tiny_model.train(config, slurm.folder / "two_ranks", *WORDS, ranks=2)
    return slurm.folder / "two_ranks"


def test_two_nodes_train_what_one_does(
    slurm: Cluster, config: Path, limited: Job, one_node: Path
) -> None:
    jobs = {
        name: slurm.sbatch(*TWO_BY_TWO, TRAIN, config, f"run_dir={slurm.folder / name}", *words)
        for name, words in (("fsdp2", WORDS), ("zero3", (*WORDS, *ZERO_3)))
    }
    zero_3 = slurm.folder / "one_node_zero3"
    tiny_model.train(config, zero_3, *WORDS, *ZERO_3, ranks=4)
    for job in jobs.values():
        assert job.wait() == "COMPLETED", job.output.read_text()
    same(slurm.folder / "fsdp2", one_node)
    same(slurm.folder / "zero3", zero_3)


def test_three_nodes_train_what_one_does(slurm: Cluster, config: Path, limited: Job) -> None:
    run_dir, one_node = slurm.folder / "three_nodes", slurm.folder / "three_ranks"
    job = slurm.sbatch("--nodes=3", TRAIN, config, f"run_dir={run_dir}", *WORDS, "--processes=1")
    tiny_model.train(config, one_node, *WORDS, ranks=3)
    assert job.wait() == "COMPLETED", job.output.read_text()
    same(run_dir, one_node)


def test_usr1_in_every_phase(slurm: Cluster, config: Path, limited: Job, two_ranks: Path) -> None:
    """Requeued once each, nothing lost; the signal is that which comes before the time limit."""
    jobs = {}
    for phase in ("load", "tokenise", "evaluate", "save"):
        mark = slurm.folder / f"mark_{phase}"
        faults = {"phase": phase, "mark": str(mark), "phase_seconds": 6}
        run_dir = slurm.folder / f"run_{phase}"
        jobs[phase] = slurm.sbatch(
            *ONE_BY_TWO, TRAIN, config, f"run_dir={run_dir}", *WORDS, faults=faults
        )
    # In whatever order the jobs come to their phases, which last a few seconds.
    waiting, deadline = dict(jobs), time.monotonic() + cluster.DEADLINE_SECONDS
    while waiting:
        assert time.monotonic() < deadline, f"{list(waiting)} did not come"
        for phase, job in list(waiting.items()):
            if (slurm.folder / f"mark_{phase}").exists():
                slurm.call("scancel", "--batch", "--signal=USR1", job.number)
                del waiting[phase]
        time.sleep(0.05)
    for phase, job in jobs.items():
        text = f"{phase}\n{job.output.read_text()}"
        assert job.wait() == "COMPLETED", text
        assert job.restarts == 1, text
        same(slurm.folder / f"run_{phase}", two_ranks)


def test_a_node_that_does_not_come_is_named(slurm: Cluster, config: Path, limited: Job) -> None:
    """A node that does not see the run directory writes into its own: it is not there."""
    folder = slurm.folder / "rendezvous"
    folder.mkdir()
    done = slurm.call(
        "srun",
        "--nodes=1",
        sys.executable,
        "-m",
        "neftune_dist",
        "node",
        "--rendezvous-minutes=0.05",
        str(folder),
        NEFTUNE_DIST_HOSTS="n1,n7",
        NEFTUNE_DIST_ATTEMPT=str(folder),
    )
    assert done.returncode != 0
    assert "n7 did not come within 0.05 minutes" in done.stderr
    told = json.loads((folder / "rank_0.json").read_text())
    assert told["kind"] == "lost" and "n7" in told["error"]


def test_the_launcher_of_jobs(slurm: Cluster, config: Path, limited: Job, one_node: Path) -> None:
    """launcher/submit.py as it stands, on a cluster as it stands."""
    run_dir = slurm.folder / "submitted"
    done = slurm.call(
        sys.executable,
        "launcher/submit.py",
        str(config),
        *("--nodes=2", "--gpus-per-node=2", "--time=0:20:00"),
        f"run_dir={run_dir}",
        *WORDS,
    )
    assert done.returncode == 0, done.stderr
    numbers = (run_dir / "submit" / "0001" / "job").read_text().split()
    job = Job(slurm, numbers[-1], run_dir / "logs" / f"slurm-{numbers[-1]}.out")
    assert job.wait() == "COMPLETED", done.stdout + job.output.read_text()
    same(run_dir, one_node)


def test_a_time_limit_shorter_than_the_run(slurm: Cluster, config: Path, limited: Job) -> None:
    untouched = slurm.folder / "one_node_long"
    tiny_model.train(config, untouched, *LONG, ranks=4)
    assert limited.wait(600) == "COMPLETED", limited.output.read_text()
    assert limited.restarts >= 3, limited.output.read_text()
    same(slurm.folder / "limited", untouched)

"""On a real Slurm of four nodes: two engines, a time limit, signals in every phase, submit.py.

Deaths and absences are in drill.py; their outcome stands in slurm/README.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm import cluster
from tests.slurm.cluster import Cluster, Job, assert_same_run
from tests.support import tiny_model

pytestmark = pytest.mark.skipif(cluster.missing() is not None, reason=str(cluster.missing()))

WORDS = ("train.max_steps=12", "checkpoint.every_steps=5", "evaluate.every_steps=6")
PHASES = ("load", "tokenise", "evaluate", "save")
ZERO_3 = ("engine.name=deepspeed", "engine.zero_stage=3")
TRAIN = "slurm/train.sbatch"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    started = Cluster(tmp_path_factory.mktemp("slurm"), 4)
    yield started
    started.do("stop")


@pytest.fixture(scope="module")
def config(slurm: Cluster) -> Path:
    return tiny_model.make_config(slurm.folder)


# These two wait for most of their time: they start first, and the other jobs run beside them.
@pytest.fixture(scope="module", autouse=True)
def limited(slurm: Cluster, config: Path) -> Job:
    """A job of one rank on each of two nodes that meets its time limit twice.

    An attempt makes four steps of twelve, and then waits for the signal before the limit. More
    restarts in a row: `signalled`.
    """
    return slurm.sbatch(
        "--nodes=2",
        "--time=2",  # with one, starting took all of it on a busy machine
        "--signal=B:USR1@60",  # up to half a minute earlier; then the run has to end
        TRAIN,
        config,
        f"run_dir={slurm.folder / 'limited'}",
        *WORDS,
        "--processes=1",
        "--max-restarts=20",  # on a busy machine, starting may take all the time there is
        faults={"wait_at": [4, 8]},
    )


@pytest.fixture(scope="module", autouse=True)
def signalled(slurm: Cluster, config: Path, limited: Job) -> Job:
    """A job of one rank that is signalled in another phase of every attempt but the last. Several
    ranks are signalled in `limited`."""
    return slurm.sbatch(
        *("--nodes=1", "--gpus-per-node=1"),
        TRAIN,
        config,
        f"run_dir={slurm.folder / 'signalled'}",
        *WORDS,
        faults={"signal_in": PHASES, "phase_seconds": 6},
    )


def test_node_that_does_not_come_is_named(slurm: Cluster) -> None:
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
    outcome = json.loads((folder / "rank_0.json").read_text())
    assert outcome["kind"] == "lost"
    assert "n7 did not come within 0.05 minutes" in outcome["error"]


def test_submitted_job_trains_what_one_node_does(slurm: Cluster, config: Path) -> None:
    """launcher/submit.py as it stands, on a cluster as it stands; ZeRO-3, as FSDP2 trains in
    `limited`. Three nodes meet in tests/unit/test_rendezvous.py."""
    run_dir, one_node = slurm.folder / "submitted", slurm.folder / "one_node"
    words = (*WORDS, *ZERO_3)
    done = slurm.call(
        sys.executable,
        "launcher/submit.py",
        str(config),
        *("--nodes=2", "--gpus-per-node=2", "--time=0:20:00"),
        f"run_dir={run_dir}",
        *words,
    )
    assert done.returncode == 0, done.stderr
    tiny_model.train(config, one_node, *words, ranks=4)
    numbers = (run_dir / "submit" / "0001" / "job").read_text().split()
    job = Job(slurm, numbers[-1], run_dir / "logs" / f"slurm-{numbers[-1]}.out")
    assert job.wait() == "COMPLETED", done.stdout + job.output.read_text()
    assert_same_run(run_dir, one_node)


def test_time_limit_met_twice_loses_nothing(slurm: Cluster, config: Path, limited: Job) -> None:
    tiny_model.train(config, slurm.folder / "two_ranks", *WORDS, ranks=2)
    assert limited.wait(600) == "COMPLETED", limited.output.read_text()
    assert limited.restarts >= 2, limited.output.read_text()
    assert_same_run(slurm.folder / "limited", slurm.folder / "two_ranks")


def test_usr1_in_every_phase_requeues_and_loses_nothing(
    slurm: Cluster, config: Path, signalled: Job
) -> None:
    tiny_model.train(config, slurm.folder / "one_rank", *WORDS)
    assert signalled.wait(600) == "COMPLETED", signalled.output.read_text()
    assert signalled.restarts == len(PHASES), signalled.output.read_text()
    assert_same_run(slurm.folder / "signalled", slurm.folder / "one_rank")

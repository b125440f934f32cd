"""A real Slurm of a few nodes on this machine, through cluster.sh; jobs and what became of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from neftune_dist.checkpoint import store
from tests.support import tiny_model

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("cluster.sh")
DEADLINE_SECONDS = 240
_SETTLED_SECONDS = 3.0


def missing() -> str | None:
    """Why Slurm cannot run here; None where it can."""
    if os.geteuid() != 0:
        return "Slurm's daemons want root"
    for program in ("slurmctld", "slurmd", "munged", "unshare", "ip"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    if subprocess.run(
        ["unshare", "--uts", "--mount", "--pid", "--net", "--fork", "true"]
    ).returncode:
        return "no namespaces here"
    return None


@dataclass(frozen=True)
class Job:
    """A job of the cluster: its number, and where its output goes."""

    cluster: Cluster
    number: str
    output: Path

    def fields(self) -> dict[str, str]:
        """What the controller says of it."""
        shown = self.cluster.call("scontrol", "show", "job", self.number).stdout
        return dict(re.findall(r"(\w+)=(\S+)", shown))

    @property
    def state(self) -> str:
        """Such as RUNNING; UNKNOWN while the controller does not answer."""
        return self.fields().get("JobState", "UNKNOWN")

    @property
    def restarts(self) -> int:
        """How often it was requeued."""
        return int(self.fields().get("Restarts", "0"))

    def wait(self, seconds: float = DEADLINE_SECONDS) -> str:
        """Its final state. A job that does not end is a failure."""
        going = ("PENDING", "RUNNING", "COMPLETING", "UNKNOWN", "REQUEUED", "CONFIGURING")

        def ended() -> bool:
            state = self.state
            if state in going:
                return False
            time.sleep(_SETTLED_SECONDS)  # a job that requeues itself has ended for a moment
            return self.state == state

        self.until(ended, "its end", seconds)
        return self.state

    def until(
        self, condition: Callable[[], bool], what: str, seconds: float = DEADLINE_SECONDS
    ) -> None:
        """Wait for `condition`. What does not come is a failure."""
        deadline = time.monotonic() + seconds
        while not condition():
            text = self.output.read_text() if self.output.exists() else ""
            assert time.monotonic() < deadline, f"{what} did not come\n{self.fields()}\n{text}"
            time.sleep(0.2)


class Cluster:
    """`num_nodes` nodes n1, n2, ..., each with a network of its own and two make-believe GPUs."""

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.environment = {
            **os.environ,
            "MINI_SLURM_DIR": str(folder / "slurm"),
            "MINI_SLURM_NODES": str(num_nodes),
            "MINI_SLURM_NET": "netns",
            "MINI_SLURM_PORT": "17300",
            "PATH": os.pathsep.join(
                [
                    str(folder / "slurm" / "bin"),
                    str(Path(sys.executable).parent),
                    os.environ["PATH"],
                ]
            ),
            "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent / "faults"), str(ROOT)]),
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        self._stop_after_this_process()
        self.do("start")

    def _stop_after_this_process(self) -> None:
        """Of tests that were killed the daemons would live on, and requeue their jobs for ever."""
        subprocess.Popen(
            [
                *("bash", "-c"),
                'tail --pid="$1" -f /dev/null; [ ! -d "$MINI_SLURM_DIR/run" ] || bash "$0" stop',
                *(str(SCRIPT), str(os.getpid())),
            ],
            env=self.environment,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def do(self, *words: str) -> str:
        """A verb of cluster.sh, which must succeed."""
        done = self.call("bash", str(SCRIPT), *words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def call(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Any program, with this cluster's commands on its path."""
        return subprocess.run(
            words,
            env={**self.environment, **variables},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=DEADLINE_SECONDS,
        )

    def sbatch(self, *words: object, faults: dict[str, object] | None = None) -> Job:
        """Submit a batch script of slurm/, with sbatch's options before it."""
        output = self.folder / f"job_{time.monotonic_ns()}.out"
        variables = {"FAULTS": json.dumps(faults)} if faults else {}
        done = self.call(
            "sbatch", "--parsable", f"--output={output}", *map(str, words), **variables
        )
        assert done.returncode == 0, done.stderr
        return Job(self, done.stdout.strip(), output)


def process_of_rank(rank: int, run_dir: Path) -> int:
    """The process number of a rank of the run in `run_dir`. Raises `LookupError`."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        is_rank = b"\0train\0" in command and f"RANK={rank}".encode() in variables
        if is_rank and f"run_dir={run_dir}\0".encode() in command:
            return int(folder.name)
    raise LookupError(f"no rank {rank} of {run_dir}")


def assert_same_run(run_dir: Path, untouched: Path) -> None:
    """Every step once, and all that was trained, bit for bit."""
    assert tiny_model.untimed(tiny_model.steps(run_dir)) == tiny_model.untimed(
        tiny_model.steps(untouched)
    )
    assert (run_dir / "evaluations.jsonl").read_text() == (
        untouched / "evaluations.jsonl"
    ).read_text()
    assert store.damaged_folders(run_dir) == []
    ours, theirs = (
        tiny_model.checkpoint_tensors(store.find_all(run)[0].folder) for run in (run_dir, untouched)
    )
    assert ours.keys() == theirs.keys()
    assert all((ours[key] == theirs[key]).all() for key in ours)

"""Faults on a real Slurm of three nodes, one after the other: what became of the job and the run.

    python -m tests.slurm.drill [FAULT ...]

Each run has two nodes with two ranks each, and makes 30 steps with a checkpoint every 5. Printed
is a line a fault of the table in slurm/README.md. A hang, a damaged checkpoint or a run that did
not end as the untouched one is an error.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from neftune_dist.checkpoint import store
from neftune_dist.distributed import outcome
from tests.slurm.cluster import Cluster, Job, assert_same_run, process_of_rank
from tests.support import tiny_model

WORDS = ("train.max_steps=30", "checkpoint.every_steps=5")
SLOW = {"step_seconds": 0.4}
PORT = 25555


class Drill:
    """A cluster, an untouched run to compare with, and the faults."""

    def __init__(self, folder: Path) -> None:
        self.slurm = Cluster(folder, 3)
        self.config = tiny_model.make_config(folder)
        self.folder = folder
        self.untouched = folder / "untouched"
        tiny_model.train(self.config, self.untouched, *WORDS, ranks=4)

    def submit(self, run_dir: Path, *words: str, slow: bool = True, **variables: str) -> Job:
        options = ("--nodes=2", "--gpus-per-node=2", "--time=15")
        if variables:
            options += ("--export=ALL," + ",".join(f"{k}={v}" for k, v in variables.items()),)
        words = ("slurm/train.sbatch", str(self.config), f"run_dir={run_dir}", *WORDS, *words)
        return self.slurm.sbatch(*options, *words, faults=SLOW if slow else None)

    def at_step_8(self, run_dir: Path, *words: str) -> Job:
        job = self.submit(run_dir, *words)
        job.until(lambda: len(tiny_model.steps(run_dir)) >= 8, "step 8")
        return job

    def hosts(self, job: Job) -> list[str]:
        listed = self.slurm.call("scontrol", "show", "hostnames", job.fields()["NodeList"])
        return listed.stdout.split()

    # Each returns the job, the fault done; its docstring is the table's first column.

    def worker(self, run_dir: Path) -> Job:
        """SIGKILL of a rank"""
        job = self.at_step_8(run_dir)
        os.kill(process_of_rank(3, run_dir), signal.SIGKILL)
        return job

    def node(self, run_dir: Path) -> Job:
        """a node loses power"""
        return self._kill_node(run_dir, 1)

    def batch_node(self, run_dir: Path) -> Job:
        """the node of the batch script loses power"""
        return self._kill_node(run_dir, 0)

    def _kill_node(self, run_dir: Path, index: int) -> Job:
        job = self.at_step_8(run_dir)
        host = self.hosts(job)[index]
        for verb in ("kill-node", "wait-down", "start-node"):
            self.slurm.do(verb, host)
        return job

    def node_back(self, run_dir: Path) -> Job:
        """a node loses power and is back before Slurm misses it"""
        job = self.at_step_8(run_dir, "--rendezvous-minutes=0.2")
        host = self.hosts(job)[1]
        self.slurm.do("kill-node", host)
        self.slurm.do("start-node", host)
        return job

    def cut(self, run_dir: Path) -> Job:
        """a node's network is cut for 22 s, longer than Slurm waits"""
        return self._cut(run_dir, 22)

    def short_cut(self, run_dir: Path) -> Job:
        """a node's network is cut for 5 s"""
        return self._cut(run_dir, 5)

    def _cut(self, run_dir: Path, seconds: float) -> Job:
        job = self.at_step_8(run_dir)
        host = self.hosts(job)[1]
        self.slurm.do("cut", host)
        time.sleep(seconds)
        self.slurm.do("heal", host)
        return job

    def controller(self, run_dir: Path) -> Job:
        """the controller is away for 5 s"""
        job = self.at_step_8(run_dir)
        self.slurm.do("stop-ctl")
        time.sleep(5)
        self.slurm.do("start-ctl")
        return job

    def controller_at_requeue(self, run_dir: Path) -> Job:
        """USR1, and the controller is away for 25 s when the job wants to be requeued"""
        job = self.at_step_8(run_dir)
        self.slurm.call("scancel", "--batch", "--signal=USR1", job.number)
        self.slurm.do("stop-ctl")
        time.sleep(25)
        self.slurm.do("start-ctl")
        return job

    def two_jobs(self, run_dir: Path) -> Job:
        """two jobs on the same nodes at once"""
        other = run_dir.with_name("other")
        options = ("--nodes=2", "--nodelist=n1,n2", "--gpus-per-node=1", "slurm/train.sbatch")
        # Two ranks a node each, on one make-believe GPU.
        jobs = [
            self.slurm.sbatch(
                *options, self.config, f"run_dir={folder}", *WORDS, "--processes=2", faults=SLOW
            )
            for folder in (run_dir, other)
        ]
        assert jobs[1].wait() == "COMPLETED", jobs[1].output.read_text()
        assert_same_run(other, self.untouched)
        return jobs[0]

    def port(self, run_dir: Path) -> Job:
        """the port that MASTER_PORT wishes for is taken"""
        program = (
            f"import socket, time; s = socket.socket(); s.bind(('', {PORT})); s.listen(); "
            "print('bound', flush=True); time.sleep(300)"
        )
        holder = subprocess.Popen(
            ["bash", "tests/slurm/cluster.sh", "nsenter", "n1", sys.executable, "-c", program],
            env=self.slurm.environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "bound\n"
            job = self.submit(run_dir, slow=False, MASTER_PORT=str(PORT))
            assert job.wait() == "FAILED"
            text = job.output.read_text()
            assert f"MASTER_PORT={PORT} is taken on n1" in text and "Traceback" not in text
        finally:
            holder.kill()
            subprocess.run(["pkill", "-f", f"s.bind(('', {PORT}))"])
        return self.submit(run_dir, slow=False)

    def late_node(self, run_dir: Path) -> Job:
        """a node comes 20 s late"""
        folder = self.folder / "late"
        folder.mkdir()
        # One node's task sleeps before it starts.
        late = folder / "late.sh"
        late.write_text('#!/bin/sh\n[ "$SLURM_PROCID" = 0 ] || sleep 20\nexec "$@"\n')
        late.chmod(0o755)
        return self.submit(run_dir, slow=False, NEFTUNE_DIST_CONTAINER=str(late))

    def stopped(self, run_dir: Path) -> Job:
        """scancel --batch --signal=TERM, and submitted again"""
        job = self.at_step_8(run_dir)
        self.slurm.call("scancel", "--batch", "--signal=TERM", job.number)
        assert job.wait() == "FAILED" and job.fields()["ExitCode"] == "75:0", job.fields()
        return self.submit(run_dir, slow=False)

    def preempted(self, run_dir: Path) -> Job:
        """pre-empted by a job of an urgent partition, 60 s of grace"""
        job = self.at_step_8(run_dir)
        urgent = ("--partition=urgent", "--nodes=3", "--exclusive", "--wrap", "sleep 15")
        assert self.slurm.call("sbatch", "--output=/dev/null", *urgent).returncode == 0
        return job

    def cancelled(self, run_dir: Path) -> Job:
        """scancel, and submitted again"""
        job = self.at_step_8(run_dir)
        self.slurm.call("scancel", job.number)
        assert job.wait() == "CANCELLED", job.fields()
        assert store.find_all(run_dir)[0].step >= 8, "nothing was saved in the time to kill"
        return self.submit(run_dir, slow=False)

    def run(self, name: str, fault: Callable[[Path], Job]) -> str:
        """The fault's line of the table."""
        run_dir, began = self.folder / name, time.monotonic()
        job = fault(run_dir)
        state = job.wait(400)
        assert state == "COMPLETED", f"{state}\n{job.output.read_text()}"
        assert_same_run(run_dir, self.untouched)
        kinds = [attempt.kind for attempt in outcome.outcomes(run_dir)]
        seconds = time.monotonic() - began
        what = fault.__doc__ or name
        return f"| {what} | {', '.join(kinds)} | {job.restarts} | {seconds:.0f} s | {state} |"


FAULTS = tuple(
    name
    for name in vars(Drill)
    if not name.startswith("_") and name not in ("submit", "at_step_8", "hosts", "run")
)


def main() -> None:
    """Run the named faults, or all."""
    with tempfile.TemporaryDirectory() as folder:
        drill = Drill(Path(folder))
        try:
            for name in sys.argv[1:] or FAULTS:
                print(drill.run(name, getattr(drill, name)), flush=True)
        finally:
            drill.slurm.do("stop")


if __name__ == "__main__":
    main()

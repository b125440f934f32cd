"""The doctor as it is started: alone, under torchrun, as a Slurm step; on machines that are ill."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from neftune_dist.cluster.doctor.findings import OK, WARNING, WRONG
from tests.support import tiny_model

PROMPT_SECONDS = 60
LOCAL = ["versions", "requirements", "imports", "GPUs", "host memory", "shared memory", "cores"]
LOCAL += ["run directory"]
# In place of seconds of imports and of `pip check`, which test_alone waits for.
QUICK = {"_IMPORTED": ("json",), "_PIP_CHECK": ("-c", "")}
BETWEEN = ["shared run dir", "clock"]


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    status: str
    check: str
    host: str
    seen: str
    fix: str


def table(text: str) -> list[Row]:
    """Its rows. Every line must be one, or belong to one."""
    lines = text.splitlines()
    assert lines[0].startswith("status")
    assert re.fullmatch(r"all good|\d+ wrong, \d+ warnings?", lines[-1])
    starts = [lines[0].index(title) for title in ("check", "host", "seen")]
    rows: list[Row] = []
    for line in lines[1:-1]:
        cells = [line[a:b].strip() for a, b in zip([0, *starts], [*starts, None], strict=True)]
        if cells[0]:
            assert cells[0] in (OK, WARNING, WRONG)
            rows.append(Row(*cells, ""))
        else:
            assert cells[3].startswith("-> ")
            last = rows.pop()
            rows.append(Row(last.status, last.check, last.host, last.seen, cells[3][3:]))
    wrong = sum(row.status == WRONG for row in rows)
    assert lines[-1].startswith(f"{wrong} wrong") or lines[-1] == "all good"
    return rows


def of(rows: list[Row], check: str) -> list[Row]:
    return [row for row in rows if row.check == check]


def wrong(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.status == WRONG]


@dataclass
class Host:
    """Called in each rank first: it is alone on a machine of its own, whose checks are quick.

    Attributes:
        ill: what to do on which rank.
        limits: module-level names of a module of neftune_dist.cluster.doctor, and their new values.
    """

    ill: dict[int, Callable[[], None]] = field(default_factory=dict)
    limits: dict[str, dict[str, Any]] = field(default_factory=dict)
    apart: bool = True

    def __call__(self) -> None:
        import importlib

        from neftune_dist.cluster.doctor import software

        rank = int(os.environ.get("RANK", "0"))
        if self.apart:
            os.environ["SLURMD_NODENAME"] = f"n{rank + 1}"
        for name, value in QUICK.items():
            setattr(software, name, value)
        # The tests of the disk are others; here it need not be written twice.
        for name, values in {"machine": {"_PROBE_MIB": 1}, **self.limits}.items():
            module = importlib.import_module(f"neftune_dist.cluster.doctor.{name}")
            for key, value in values.items():
                assert hasattr(module, key)
                setattr(module, key, value)
        if rank in self.ill:
            self.ill[rank]()


def run(before: Host, run_dir: Path, ranks: int = 2) -> tuple[int, list[Row], str]:
    done = tiny_model.run_forked("doctor", "--run-dir", run_dir, ranks=ranks, before=before)
    assert "Traceback" not in done.stdout + done.stderr
    return done.returncode, table(done.stdout), done.stderr


def test_alone(tmp_path: Path) -> None:
    done = tiny_model.run("doctor", "--run-dir", tmp_path / "not" / "there")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = table(done.stdout)
    assert [row.check for row in rows] == [*LOCAL, "collectives"]
    assert {row.host for row in rows} == {socket.gethostname().partition(".")[0]}
    assert wrong(rows) == []
    assert list(tmp_path.iterdir()) == []


def test_without_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so: cannot open')")
    done = tiny_model.run("doctor", "--run-dir", tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    rows = table(done.stdout)
    assert "libtorch.so: cannot open" in of(rows, "imports")[0].seen
    assert of(rows, "run directory")[0].status != WRONG
    assert of(rows, "ranks")[0].fix == "install torch"


def under_torchrun(tmp_path: Path, run_dir: Path) -> subprocess.CompletedProcess[str]:
    """On two ranks."""
    (tmp_path / "site").mkdir()
    code = f"from neftune_dist.cluster.doctor import software; vars(software).update({QUICK})"
    (tmp_path / "site" / "sitecustomize.py").write_text(code)
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    return tiny_model.run("doctor", "--run-dir", run_dir, ranks=2, PYTHONPATH=path)


def test_machine_is_checked_once_under_torchrun(tmp_path: Path) -> None:
    done = under_torchrun(tmp_path, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = table(done.stdout)
    assert [row.check for row in rows] == [*LOCAL, "collectives"]
    assert "2 ranks on cpu: all_reduce" in rows[-1].seen
    assert "Warning" not in done.stderr


def test_all_ranks_exit_2_under_torchrun(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = under_torchrun(tmp_path, tmp_path / "file" / "runs")
    assert done.returncode != 0
    assert [row.check for row in wrong(table(done.stdout))] == ["run directory"]
    assert "neftune_dist/cluster/doctor" not in done.stderr  # torchrun reports no traceback
    assert "exitcode  : 2" in done.stderr


def test_equal_hosts_share_their_rows(tmp_path: Path) -> None:
    code, rows, _ = run(Host(), tmp_path / "runs", ranks=3)
    assert code == 0, rows
    assert {row.check for row in rows} == {*LOCAL, *BETWEEN, "collectives"}
    for check in ("versions", "requirements", "shared run dir", "collectives"):
        assert of(rows, check)[0].host == "all 3 hosts"
    assert list(tmp_path.iterdir()) == []


def test_ranks_of_one_machine_are_one_host(tmp_path: Path) -> None:
    code, rows, _ = run(Host(apart=False), tmp_path)
    assert code == 0 and not {row.check for row in rows} & set(BETWEEN)


def another_torch() -> None:
    from neftune_dist.cluster.doctor import software

    versions = software.versions
    software.versions = lambda: versions() | {"torch": "2.99.0", "python": "3.99.9"}


def test_differing_versions_are_named(tmp_path: Path) -> None:
    code, rows, _ = run(Host({1: another_torch}), tmp_path)
    assert code == 2
    (torch,), (python,) = of(rows, "torch differs"), of(rows, "python differs")
    assert torch.status == WRONG and torch.seen.endswith("2.99.0 on n2")
    assert python.status == WARNING
    assert {row.host for row in of(rows, "versions")} == {"n1", "n2"}


@dataclass
class ElsewhereRunDir:
    """This rank's run directory has the name of the others', and is another one."""

    folder: str

    def __call__(self) -> None:
        from neftune_dist.cluster.doctor import joint, machine

        for module in (joint, machine):
            module.existing = lambda _: Path(self.folder)  # type: ignore[attr-defined]


def test_run_directory_that_is_not_shared_is_wrong(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    ill = {rank: ElsewhereRunDir(str(tmp_path / "ab"[rank == 1])) for rank in range(3)}
    limits = {"joint": {"_SEEN_SECONDS": 0.5}}
    code, rows, _ = run(Host(ill, limits), tmp_path / "runs", ranks=3)
    assert code == 2
    (shared,) = wrong(rows)
    assert (shared.check, shared.host) == ("shared run dir", "n2")
    assert shared.seen == (
        f"run_dir={tmp_path / 'runs'} is not shared: "
        "n2 cannot see files of n1; n1 cannot see files of n2"
    )
    assert "shared file system" in shared.fix
    assert not list((tmp_path / "a").iterdir()) and not list((tmp_path / "b").iterdir())


def clock_ahead() -> None:
    now = time.time
    time.time = lambda: now() + 7.5


def test_clock_ahead_is_a_warning(tmp_path: Path) -> None:
    code, rows, _ = run(Host({1: clock_ahead}), tmp_path, ranks=3)
    assert code == 0
    (clock,) = of(rows, "clock")
    assert (clock.status, clock.host) == (WARNING, "n2")
    assert clock.seen == "7.5 seconds ahead of n1" and "NTP" in clock.fix


def corrupted_sum() -> None:
    import torch.distributed as dist

    reduce = dist.reduce_scatter_tensor

    def corrupted(output: Any, given: Any) -> None:
        reduce(output, given)
        output[7] += 1

    dist.reduce_scatter_tensor = corrupted


def test_corrupted_sum_is_wrong(tmp_path: Path) -> None:
    code, rows, _ = run(Host({1: corrupted_sum}), tmp_path)
    assert code == 2
    (row,) = wrong(rows)
    assert (row.check, row.host) == ("collectives", "n2")
    assert row.seen == "rank 1 (n2): wrong result of reduce_scatter"


def fails() -> None:
    import torch.distributed as dist

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("NCCL error: unhandled system error\nmore")

    dist.all_gather_into_tensor = broken


def hangs() -> None:
    import torch.distributed as dist

    dist.all_gather_into_tensor = lambda *_: time.sleep(600)


@pytest.mark.parametrize(
    ("ill", "seen"),
    [
        (fails, "rank 1 (n2): RuntimeError: NCCL error: unhandled system error"),
        (hangs, "got no answer within 6 seconds"),
    ],
)
def test_rank_that_fails_or_hangs_in_a_collective_is_named(
    ill: Callable[[], None], seen: str, tmp_path: Path
) -> None:
    limits = {"joint": {"_COLLECTIVES_SECONDS": 6.0, "_GRACE_SECONDS": 1.0}}
    began = time.monotonic()
    code, rows, _ = run(Host({1: ill}, limits), tmp_path)
    assert time.monotonic() - began < PROMPT_SECONDS
    assert code == 2
    assert any(seen in row.seen for row in wrong(rows))
    # The other findings are shown all the same.
    assert {*LOCAL, *BETWEEN} <= {row.check for row in rows}


def hanging_check() -> None:
    from neftune_dist.cluster.doctor import machine

    machine.existing = lambda _: time.sleep(600)  # type: ignore[attr-defined]


def test_hanging_disk_is_named(tmp_path: Path) -> None:
    limits = {"run": {"_CHECKS_SECONDS": 12.0}, "findings": {"_SHORTEST_SECONDS": 1.0}}
    code, rows, _ = run(Host({1: hanging_check}, limits), tmp_path)
    assert code == 2
    assert [(row.check, row.host) for row in wrong(rows)] == [("run directory", "n2")]
    assert of(rows, "collectives")[0].status == OK


# Ranks that do not come


@dataclass
class Place:
    """Called in a rank that is started by itself: where it is told to be."""

    variables: dict[str, str]
    host: Host

    def __call__(self) -> None:
        os.environ.update(self.variables)
        self.host()


def start(
    run_dir: Path,
    limits: dict[str, dict[str, Any]] | None = None,
    ill: Callable[[], None] | None = None,
    **variables: str,
) -> tiny_model.Forked:
    """A rank by itself, with quicker time-outs."""
    rank = int(variables.get("RANK", "0"))
    host = Host({rank: ill} if ill else {}, limits or {}, apart=False)
    words = ("doctor", "--run-dir", run_dir)
    return tiny_model.Forked(*words, before=Place(variables, host), seconds=PROMPT_SECONDS)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def step(rank: int, number: int, job: str) -> dict[str, str]:
    """What Slurm tells task `rank` of a step on hosts that are all this machine."""
    hosts = ",".join(f"127.0.0.{i + 1}" for i in range(number))
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": "0",
        "SLURM_NTASKS": str(number),
        "SLURM_STEP_NUM_TASKS": str(number),
        "SLURM_STEP_NODELIST": hosts,
        "SLURM_JOB_ID": job,
        "SLURM_STEP_ID": "0",
        "SLURMD_NODENAME": f"127.0.0.{rank + 1}",
    }


def test_absent_node_of_a_slurm_step_is_named(tmp_path: Path) -> None:
    job = str(os.getpid())
    limits = {"run": {"_MEET_SECONDS": 8.0}}
    ranks = [start(tmp_path, limits, **step(rank, 3, job)) for rank in (0, 1)]
    first, other = (rank.wait() for rank in ranks)
    assert (first.returncode, other.returncode) == (2, 2), first.stdout + first.stderr
    rows = table(first.stdout)
    (missing,) = wrong(rows)
    assert (missing.check, missing.host) == ("ranks", "127.0.0.3")
    assert missing.seen == "rank 2 (127.0.0.3) did not come within 8 seconds"
    assert {*LOCAL, "shared run dir", "clock"} <= {row.check for row in rows}
    assert of(rows, "collectives") == []  # they would need all
    assert of(rows, "versions")[0].host == "127.0.0.1, 127.0.0.2"


def test_slurm_step_with_all_its_nodes_passes(tmp_path: Path) -> None:
    job = str(os.getpid() + 1)
    ranks = [start(tmp_path, **step(rank, 2, job)) for rank in (0, 1)]
    first, other = (rank.wait() for rank in ranks)
    assert (first.returncode, other.returncode) == (0, 0), first.stdout + first.stderr
    assert of(table(first.stdout), "collectives")[0].host == "all 2 hosts"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_ranks_without_an_address_exit_2(rank: str, tmp_path: Path) -> None:
    place = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}
    done = start(tmp_path, {"run": {"_LEAVE_SECONDS": 0}}, **place).wait()
    assert done.returncode == 2 and "Traceback" not in done.stderr
    speaks, silent = done.stdout, done.stderr
    if rank == "1":
        speaks, silent = silent, speaks
    (row,) = wrong(table(speaks))
    assert row.seen.startswith(f"rank {rank}: The environment says RANK={rank}")
    assert "without MASTER_ADDR, MASTER_PORT" in row.seen
    assert silent == ""
    # The machine was checked by its first rank.
    assert bool(of(table(speaks), "run directory")) == (rank == "0")


def test_absent_rank_0_is_named(tmp_path: Path) -> None:
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    limits = {"run": {"_MEET_SECONDS": 1.0, "_LEAVE_SECONDS": 0}}
    done = start(tmp_path, limits, **place, MASTER_PORT=free_port()).wait()
    assert done.returncode == 2 and done.stdout == ""
    rows = table(done.stderr)
    assert "where rank 0 is to listen, was not reached" in wrong(rows)[0].seen
    assert of(rows, "run directory")[0].status != WRONG


def dies() -> None:
    os._exit(9)


def dies_in_a_collective() -> None:
    import torch.distributed as dist

    dist.all_gather_into_tensor = lambda *_: dies()


def dies_in_its_checks() -> None:
    from neftune_dist.cluster.doctor import run

    run.examine = lambda *_: dies()  # type: ignore[assignment]


def test_rank_that_dies_in_a_collective_is_named(tmp_path: Path) -> None:
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    limits = {"joint": {"_COLLECTIVES_SECONDS": 15.0, "_GRACE_SECONDS": 2.0}}
    limits["run"] = {"_LEAVE_SECONDS": 1.0}
    ranks = [
        start(tmp_path, limits, **place, RANK="0"),
        start(tmp_path, ill=dies_in_a_collective, **place, RANK="1", LOCAL_RANK="1"),
    ]
    first, other = (rank.wait() for rank in ranks)
    assert (first.returncode, other.returncode) == (2, 9)
    rows = table(first.stdout)
    assert any("rank 1 " in row.seen and "went away" in row.seen for row in wrong(rows)), rows
    assert of(rows, "run directory")[0].status != WRONG


def hangs_in_its_checks() -> None:
    from neftune_dist.cluster.doctor import run

    run._check = lambda *_: time.sleep(600)  # type: ignore[assignment]


def test_hanging_doctor_ends(tmp_path: Path) -> None:
    done = start(tmp_path, {"run": {"_LONGEST_SECONDS": 1.0}}, hangs_in_its_checks).wait()
    assert done.returncode == 2 and wrong(table(done.stdout))[0].check == "ranks"


def test_rank_0_that_dies_is_reported_by_the_others(tmp_path: Path) -> None:
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    limits = {"run": {"_LEAVE_SECONDS": 0}}
    ranks = [
        start(tmp_path, ill=dies_in_its_checks, **place, RANK="0", LOCAL_RANK="0"),
        start(tmp_path, limits, **place, RANK="1", LOCAL_RANK="1"),
    ]
    first, other = (rank.wait() for rank in ranks)
    assert (first.returncode, other.returncode) == (9, 2)
    assert "rank 1: " in other.stderr and "1 wrong" in other.stderr

"""The doctor's checks one by one: each sees what is there, and each can fail."""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from neftune_dist.cluster.doctor import (
    findings,
    joint,
    machine,
    run,
    software,
)
from neftune_dist.cluster.doctor.findings import (
    CHECKS,
    OK,
    WARNING,
    WRONG,
    Check,
    Finding,
    Site,
    examine,
    table,
    together,
)
from neftune_dist.cluster.doctor.ranks import Ranks, host_name, meet, slurm_step
from neftune_dist.distributed import environment
from neftune_dist.distributed.environment import Place, find_place
from neftune_dist.distributed.mailbox import Mailbox
from neftune_dist.system import cgroups

GIB = 2**30


@pytest.fixture(autouse=True)
def alone_and_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM", "MASTER_", "NCCL_", "GLOO_")):
            monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "CXX", "CC", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def only(found: Iterable[Finding]) -> Finding:
    (finding,) = found
    return finding


def found(name: str, run_dir: Path = Path("."), **fields: Any) -> list[Finding]:
    """The findings of the check of this name in the doctor's table."""
    (one,) = (check for check in CHECKS if check.name == name)
    return examine([one], Site(run_dir, **fields), "n1", 60.0)


def statuses(name: str, **fields: Any) -> list[str]:
    return [finding.status for finding in found(name, **fields)]


# The table


def test_table_is_aligned_and_gives_advice() -> None:
    rows = [
        Finding(OK, "clock", "right", "never shown"),
        Finding(WRONG, "a long name", "broken", "fix it", ("n1",)),
        Finding(WARNING, "b", "odd", "", ("n2",)),
    ]
    assert list(table(rows, ["n1", "n2"])) == [
        "status   check        host         seen, and -> how to fix it",
        "ok       clock        all 2 hosts  right",
        "wrong    a long name  n1           broken",
        "                                   -> fix it",
        "warning  b            n2           odd",
        "1 wrong, 1 warning",
    ]
    assert list(table(rows[:1], ["n1"]))[-1] == "all good"


def test_equal_findings_of_all_hosts_are_one_row_and_come_first() -> None:
    hosts = ["n1", "n2", "n3"]
    found = [
        *(Finding(WRONG if h == "n2" else OK, "disk", "x", "m", (h,)) for h in hosts),
        *(Finding(OK, "torch", "2.13.0", hosts=(h,)) for h in hosts),
    ]
    assert [(r.status, r.check, r.hosts) for r in together(found, hosts)] == [
        (OK, "torch", ("n1", "n2", "n3")),
        (OK, "disk", ("n1", "n3")),
        (WRONG, "disk", ("n2",)),
    ]


def test_differing_quantities_become_a_range_and_versions_do_not() -> None:
    def rows(check: str, status: str, *texts: str) -> list[Finding]:
        return [
            Finding(status, check, text, hosts=(f"n{i}",)) for i, text in enumerate(texts, start=1)
        ]

    hosts = ["n1", "n2"]
    fine = rows("disk", OK, "/a/7 b: 9.5 GiB free, 80 MiB/s", "/a/7 b: 10.5 GiB free, 80 MiB/s")
    assert only(together(fine, hosts)).seen == "/a/7 b: 9.5 to 10.5 GiB free, 80 MiB/s"
    assert len(together(rows("disk", WARNING, "1 GiB free", "2 GiB free"), hosts)) == 2
    assert len(together(rows("versions", OK, "torch 2.13.0, x", "torch 2.12.0, x"), hosts)) == 2


def test_names_of_many_hosts_are_shortened() -> None:
    assert findings.named([f"n{i}" for i in range(9)]) == "n0, n1, n2, n3 and 5 more"
    assert findings.named(["n0", "n1"], 2) == "all 2 hosts"


def test_failing_or_hanging_check_is_a_row_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(site: Site) -> Iterator[tuple[str, str]]:
        yield OK, "never seen"
        raise RuntimeError("no driver\nand a long story")

    released = threading.Event()

    def hanging(site: Site) -> Iterator[tuple[str, str]]:
        released.wait(60)
        yield from ()

    def without_package(site: Site) -> Iterator[tuple[str, str]]:
        raise ImportError("which the check of imports reports")

    monkeypatch.setattr(findings, "_SHORTEST_SECONDS", 0.2)
    looks = {"a": broken, "b": hanging, "c": without_package, "d": lambda _: [(OK, "fine")]}
    checks = [Check(name, "the check's advice", look) for name, look in looks.items()]
    began = time.monotonic()
    rows = examine(checks, Site(Path()), "n1", 0.2)
    released.set()
    assert time.monotonic() - began < 10
    assert [(f.status, f.check, f.hosts) for f in rows] == [
        (WRONG, "a", ("n1",)),
        (WRONG, "b", ("n1",)),
        (OK, "d", ("n1",)),
    ]
    assert (rows[0].seen, rows[0].fix) == ("RuntimeError: no driver", "the check's advice")
    assert "no answer within" in rows[1].seen and "waits for" in rows[1].fix


def test_errors_of_torch_are_cut_to_their_first_line() -> None:
    error = RuntimeError("Connection refused\nException raised from here at socket.cpp:1\n#0 x")
    assert findings.error_text(error) == "RuntimeError: Connection refused"
    assert findings.error_text(ValueError()) == "ValueError"


def test_every_check_has_a_name_of_its_own_and_advice() -> None:
    names = [check.name for check in CHECKS]
    assert len(names) == len(set(names))
    assert [check.name for check in CHECKS if not check.fix] == ["versions"]


# Software


def test_versions_are_one_row_and_kept_for_the_comparison(tmp_path: Path) -> None:
    kept: dict[str, str] = {}
    finding = only(found("versions", versions=kept))
    assert {"neftune_dist", "python", "torch", "transformers", "deepspeed"} <= set(kept)
    assert finding.status == OK and f"torch {torch.__version__}" in finding.seen


def test_differing_versions_are_named_with_their_hosts() -> None:
    of_hosts = {
        "n1": {"torch": "2.13.0", "driver": "570", "NCCL": "2.27.3"},
        "n2": {"torch": "2.12.0", "driver": "580"},
        "n3": {"torch": "2.13.0", "driver": "570", "NCCL": "2.27.3"},
    }
    rows = {row.check: row for row in software.compare_versions(of_hosts)}
    assert {name: row.status for name, row in rows.items()} == {
        "torch differs": WRONG,
        "driver differs": WARNING,
        "NCCL differs": WRONG,
    }
    assert rows["torch differs"].seen == "2.13.0 on n1, n3; 2.12.0 on n2"
    assert rows["NCCL differs"].seen == "2.27.3 on n1, n3; none on n2"
    assert not list(software.compare_versions({"n1": {"torch": "1"}, "n2": {"torch": "1"}}))


def install(
    folder: Path, name: str, version: str, *needed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Put the record of a package where Python and pip find it first."""
    record = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    record.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {text}" for text in needed]
    (record / "METADATA").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(folder)


def test_requirements_of_a_run_are_wrong_and_those_on_it_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(name: str, version: str, *needed: str) -> None:
        install(tmp_path, name, version, *needed, monkeypatch=monkeypatch)

    needed = ("torch>=2", "fits", 'extra-one; extra == "x"', 'old; python_version < "3"')
    put("neftune-dist", "1", *needed)
    put("torch", "2.13.0+cpu", "absent-one")
    put("fits", "1", "fits-two<2")
    put("fits-two", "2.1")
    put("torchvision", "0.20", "torch==2.5.0")
    put("other", "3", "fits-two>=9")  # which is nothing to us
    rows = {row.seen: row.status for row in found("requirements")}
    assert rows == {
        "torch 2.13.0+cpu requires absent-one, which is not installed": WRONG,
        "fits 1 has requirement fits-two<2, but you have fits-two 2.1": WRONG,
        "torchvision 0.20 has requirement torch==2.5.0, but you have torch 2.13.0+cpu": WARNING,
    }


def test_missing_pip_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = SimpleNamespace(stdout="", stderr="python: No module named pip", returncode=1)
    monkeypatch.setattr(software.subprocess, "run", lambda *_, **__: answer)
    finding = only(found("requirements"))
    assert finding.status == OK and "no pip" in finding.seen


def test_requirements_are_met_here() -> None:
    assert [row.seen for row in found("requirements") if row.status == WRONG] == []


def test_package_that_cannot_be_imported_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "good.py").write_text("print('noise')")
    (tmp_path / "flash.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    (tmp_path / "crashes.py").write_text("import os; os._exit(3)")
    (tmp_path / "hangs.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(software, "_IMPORTED_IF_THERE", ("flash", "missing"))
    monkeypatch.setattr(software, "_IMPORTED", ("good",))
    finding = only(found("imports"))
    assert finding.status == WRONG and "uninstall" in finding.fix
    assert finding.seen == "flash cannot be imported: ImportError: undefined symbol: _ZN3c10"

    monkeypatch.setattr(software, "_IMPORTED_IF_THERE", ())
    monkeypatch.setattr(software, "_IMPORTED", ("good", "crashes", "flash"))
    seen = {row.seen for row in found("imports")}
    assert len(seen) == 2 and "crashes cannot be imported: exit code 3" in seen
    monkeypatch.setattr(software, "_IMPORTED", ("good",))
    assert statuses("imports") == [OK]
    monkeypatch.setattr(software, "_IMPORTED", ("good", "hangs"))
    monkeypatch.setattr(software, "_IMPORT_SECONDS", 1.0)
    assert only(found("imports")).seen.startswith("hangs cannot be imported: it took more")


# Known conflicts


def test_two_nccl_packages_or_another_library_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = {"nvidia-nccl-cu13": "2.27.7", "nvidia-nccl-cu12-stubs": "1"}
    monkeypatch.setattr(
        software,
        "distributions",
        lambda: [SimpleNamespace(metadata={"Name": n}, version=v) for n, v in packages.items()],
    )
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 7))
    assert found("NCCL") == []
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 19, 3, "x"))
    finding = only(found("NCCL"))
    assert finding.status == WARNING
    assert finding.seen == "NCCL 2.19.3 is loaded instead of nvidia-nccl-cu13 2.27.7"
    packages["nvidia-nccl-cu12"] = "2.27.3"
    finding = only(found("NCCL"))
    assert finding.status == WRONG and "overwrite each other" in finding.seen


def test_missing_compilers_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seen() -> list[tuple[str, str]]:
        return [(row.status, row.seen) for row in found("compiler")]

    monkeypatch.setenv("PATH", str(tmp_path))
    assert seen() == [(WARNING, "g++ is not found")]
    program(tmp_path / "mine", "")
    monkeypatch.setenv("CXX", "mine -O2")
    assert seen() == [(WARNING, "CXX=mine -O2 is not found")]
    monkeypatch.setenv("CXX", "mine")
    assert seen() == []

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert seen() == [(WRONG, "gcc or clang is not found")]
    monkeypatch.setenv("CC", "mine")
    monkeypatch.setattr(software.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    assert seen() == [(WRONG, f"no {tmp_path}/Python.h")]
    (tmp_path / "Python.h").write_text("")
    assert seen() == []


def test_variables_that_slow_a_run_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "0")
    assert found("environment") == []
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    finding = only(found("environment"))
    assert (finding.status, finding.seen) == (WARNING, "NCCL_P2P_DISABLE=1")


# GPUs


def program(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def fake_gpus(monkeypatch: pytest.MonkeyPatch, *devices: Any, peers: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_properties", devices.__getitem__)
    monkeypatch.setattr(
        torch.cuda, "can_device_access_peer", lambda a, b: peers or (a, b) == (0, 1)
    )


def device(uuid: str, name: str = "NVIDIA H100", gib: int = 80, major: int = 9) -> Any:
    return SimpleNamespace(name=name, total_memory=gib * GIB, major=major, minor=0, uuid=uuid)


def fake_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: str = "") -> None:
    (tmp_path / "gpus").write_text(rows)
    program(tmp_path / "bin" / "nvidia-smi", f"cat {tmp_path}/gpus")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")


def test_gpus_of_a_kind_are_one_row_with_memory_and_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, device("a"), device("b"), device("c", "Old", 16, 7))
    assert [(f.status, f.check, f.seen) for f in found("GPUs")] == [
        (OK, "GPUs", "2 x NVIDIA H100, 80 GiB, capability 9.0, bf16"),
        (WARNING, "GPUs", "1 x Old, 16 GiB, capability 7.0, no bf16"),
    ]


def test_gpus_in_use_or_with_memory_errors_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert found("GPU state") == []  # no GPU
    fake_gpus(monkeypatch, device("a"), device("b"), device("c"))
    gpus_of_node = "GPU-hidden, 9000, 9\nGPU-b, 20480, 0\nGPU-a, 4, 7\nGPU-c, 4, [N/A]\n"
    fake_smi(tmp_path, monkeypatch, gpus_of_node)
    in_use, broken = found("GPU state")
    assert in_use.status == WARNING
    assert in_use.seen.startswith("GPU 1: 20.0 GiB are in use by another process")
    assert broken.status == WRONG and broken.seen.startswith("GPU 0: 7 uncorrected")


def test_failing_nvidia_smi_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_gpus(monkeypatch, device("a"))
    message = "Failed to initialize NVML: Driver/library version mismatch"
    program(tmp_path / "bin" / "nvidia-smi", f"echo '{message}'; exit 18")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    finding = only(found("GPU state"))
    assert finding.status == WRONG and message in finding.seen
    assert "driver" not in software.versions()


def test_gpu_that_torch_does_not_see_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_ROOT", tmp_path)
    assert statuses("GPUs") == [OK]
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").write_text("")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert statuses("GPUs") == [WARNING]

    def fails() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", fails)
    finding = only(found("GPUs"))
    assert finding.status == WRONG and "driver on your system is too old" in finding.seen
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert statuses("GPUs") == [OK]


def test_missing_peer_access_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found("GPU links") == []  # no GPU
    fake_gpus(monkeypatch, device("a"), device("b"), device("c"))
    assert statuses("GPU links") == [OK]
    fake_gpus(monkeypatch, device("a"), device("b"), device("c"), peers=False)
    finding = only(found("GPU links"))
    assert finding.status == WARNING
    assert finding.seen == "no peer access in 2 of 3 pairs: 0 and 2, 1 and 2"


# Memory, cores, limits


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Write a file of a machine's /proc, /sys or /dev."""

    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    for module in (cgroups, machine):
        monkeypatch.setattr(module, "_ROOT", tmp_path)
    write("proc/meminfo", f"MemTotal: {64 * 2**20} kB\nMemAvailable: {60 * 2**20} kB\n")
    write("dev/shm/x", "")
    return write


def test_memory_of_the_machine(root: Callable[[str, str], None]) -> None:
    finding = only(found("host memory", num_ranks=8))
    assert (finding.status, finding.seen) == (OK, "60.0 GiB of 64.0 GiB available")
    root("proc/meminfo", f"MemTotal: {64 * 2**20} kB\nMemAvailable: {7 * 2**20} kB\n")
    assert statuses("host memory", num_ranks=8) == [WARNING]


@pytest.mark.parametrize("version", [1, 2])
def test_memory_of_a_job_is_its_control_groups(
    version: int, root: Callable[[str, str], None]
) -> None:
    if version == 2:
        root("proc/self/cgroup", "0::/slurm/job_1/step_0\n")
        base, limit, used, free = "sys/fs/cgroup/slurm/job_1", "max", "current", "inactive_file"
        root("sys/fs/cgroup/slurm/job_1/step_0/memory.max", "max\n")
    else:
        root("proc/self/cgroup", "3:cpuset:/\n4:memory:/slurm/job_1/step_0\n0::/\n")
        base, limit, used = "sys/fs/cgroup/memory/slurm/job_1", "limit_in_bytes", "usage_in_bytes"
        free = "total_inactive_file"
        root("sys/fs/cgroup/memory/memory.limit_in_bytes", str(2**63 - 4096))
    root(f"{base}/memory.{limit}", str(8 * GIB))
    root(f"{base}/memory.{used}", str(7 * GIB))
    finding = only(found("host memory", num_ranks=2))
    assert finding.status == WARNING
    assert finding.seen == "1.0 GiB of 8.0 GiB available, the job's limit (of 64.0 GiB)"
    root(f"{base}/memory.stat", f"anon 1\n{free} {3 * GIB}\n")  # cached files can be dropped
    finding = only(found("host memory", num_ranks=2))
    assert finding.status == OK and finding.seen.startswith("4.0 GiB of 8.0 GiB")


def test_low_shared_memory_is_a_warning_for_several_ranks(
    root: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=64 * 2**20, total=64 * 2**20)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage)
    assert statuses("shared memory", num_ranks=1) == [OK]
    finding = only(found("shared memory", num_ranks=2))
    assert finding.status == WARNING and "0.06 GiB" in finding.seen and "--shm-size" in finding.fix


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"}, None),
        (
            {
                "proc/self/cgroup": "2:cpu,cpuacct:/a\n",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "150000\n",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            1.5,
        ),
    ],
)
def test_cores_are_those_this_process_may_use(
    files: dict[str, str],
    quota: float | None,
    root: Callable[[str, str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for path, text in files.items():
        root(path, text)
    finding = only(found("cores", num_ranks=1))
    assert (finding.status, finding.seen) == (OK, f"{quota or 4:g} of 64 for 1 rank")
    assert statuses("cores", num_ranks=2) == [WARNING if quota else OK]
    # srun without --cpus-per-task, before torchrun starts a process a GPU
    fake_gpus(monkeypatch, *map(device, "abcdefgh"))
    finding = only(found("cores", num_ranks=1))
    assert finding.status == WARNING and "for 8 ranks" in finding.seen


# The run directory


def test_run_directory_below_a_file_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    finding = only(found("run directory", tmp_path / "file" / "runs"))
    assert finding.status == WRONG and "--run-dir" in finding.fix


def test_probe_of_the_disk_is_synced_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda number: sizes.append(os.fstat(number).st_size))
    assert "MiB/s written" in only(found("run directory", tmp_path / "not" / "there")).seen
    assert sizes == [64 * 2**20]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", ["_SLOW_DISK_MIB", "_LOW_DISK_GIB"])
def test_slow_or_full_disk_is_a_warning(
    limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, limit, 10**9)
    finding = only(found("run directory", tmp_path))
    assert finding.status == WARNING and "plan" in finding.fix


# The model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


def test_model_is_a_directory_or_in_the_cache(cache: Path, tmp_path: Path) -> None:
    assert found("model") == []
    finding = only(found("model", model="a/b"))
    assert finding.status == WRONG and "offline mode" in finding.seen
    snapshot = cache / "models--a--b" / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (cache / "models--a--b" / "refs").mkdir()
    (cache / "models--a--b" / "refs" / "main").write_text("1234")
    assert statuses("model", model="a/b") == [OK]
    (tmp_path / "model").mkdir()
    assert statuses("model", model=str(tmp_path / "model")) == [WRONG]
    (tmp_path / "model" / "config.json").write_text("{}")
    assert statuses("model", model=str(tmp_path / "model")) == [OK]


@pytest.mark.parametrize(("answer", "status"), [(200, OK), (404, WRONG), (401, WRONG)])
def test_hub_is_asked_for_a_model_that_is_not_here(
    answer: int, status: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            body = b'{"id": "c/d"}'
            self.send_response(answer)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request, daemon=True)
        thread.start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert statuses("model", model="c/d") == [status]
        thread.join(5)
    assert asked == ["/api/models/c/d"]


def test_hub_that_is_away_is_wrong_for_a_model_that_is_not_here(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        finding = only(found("model", model="c/d"))
    assert finding.status == WRONG and "cache" in finding.fix


# Where ranks meet

STEP = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURMD_NODENAME": "n2",
}


def place(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Place:
    with monkeypatch.context() as patched:
        for name, value in variables.items():
            patched.setenv(name, value)
        for name, value in slurm_step()[0].items():
            patched.setenv(name, value)
        return find_place()


def test_place_under_torchrun_in_a_step_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_check_address", lambda address, port: None)
    monkeypatch.setattr(socket, "gethostname", lambda: "laptop.local")
    assert place(monkeypatch) == Place() and host_name() == "laptop"
    step = place(monkeypatch, **STEP)
    assert (step.rank, step.size, step.local_rank, step.address) == (3, 4, 1, "n1")
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "m"}
    here = place(monkeypatch, **STEP, **torchrun, MASTER_PORT="5")
    assert here == Place(1, 2, 1, 1, "m", 5)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    assert host_name() == "n2" and slurm_step()[1] == ["n1", "n2"]


def test_steps_have_ports_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_check_address", lambda address, port: None)
    ports = {
        place(monkeypatch, **{**STEP, "SLURM_JOB_ID": job, "SLURM_STEP_ID": step}).port
        for job in ("17", "18", "4012345678")
        for step in ("0", "1")
    }
    assert len(ports) == 6 and all(12000 <= port < 20000 for port in ports)


def test_batch_script_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    script = {k: v for k, v in STEP.items() if "STEP" not in k} | {"SLURM_PROCID": "0"}
    assert place(monkeypatch, **script).size == 1
    assert place(monkeypatch, **{**STEP, "SLURM_STEP_NUM_TASKS": "1"}).size == 1


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("n[1-2]", ["n1", "n2"]),
        ("gpu[08-10,3]-ib,login", ["gpu08-ib", "gpu09-ib", "gpu10-ib", "gpu3-ib", "login"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
    ],
)
def test_host_lists_of_slurm(text: str, names: list[str]) -> None:
    assert environment.expand_hosts(text) == names


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_absent_ranks_are_not_waited_for_and_late_ones_are_refused() -> None:
    port = free_port()
    ranks = meet(Place(0, 3, 0, 1, "127.0.0.1", port), 0.5)
    assert list(ranks.host_of) == [0]
    with pytest.raises(TimeoutError, match="gone on without it"):
        meet(Place(2, 3, 0, 1, "127.0.0.1", port), 0.5)


def ranks_on(host_of: dict[int, str], rank: int = 0, size: int = 4) -> Ranks:
    store = torch.distributed.HashStore()
    here = Place(rank, size, 0, 1, "n1", 7)
    return Ranks(here, Mailbox(store, rank, size), [*host_of], host_of)


def test_first_rank_of_each_host_is_its_lowest() -> None:
    ranks = ranks_on({0: "n1", 1: "n1", 2: "n2", 3: "n2"})
    assert list(ranks.firsts.items()) == [("n1", 0), ("n2", 2)] and ranks.is_first
    ranks.present = [0, 1, 3]
    assert ranks.firsts == {"n1": 0, "n2": 3}


# What ranks find out together; the real runs are in tests/distributed/test_doctor.py

HOST_OF = {0: "n1", 1: "n1", 2: "n2", 3: "n3"}


@pytest.mark.parametrize(
    ("seen", "text"),
    [
        ({0: [0, 2, 3], 2: [0], 3: [0]}, ""),
        ({0: [0, 2, 3], 2: [], 3: [0]}, "n2 cannot see files of n1"),
        ({0: [0, 2], 2: [0], 3: [0]}, "n1 cannot see files of n3"),
        ({0: [0], 2: []}, "n2, n3 cannot see files of n1; n1 cannot see files of n2, n3"),
    ],
)
def test_hosts_that_do_not_share_the_run_directory(
    seen: dict[int, list[int]], text: str, tmp_path: Path
) -> None:
    finding = joint._shared(tmp_path, HOST_OF, [0, 2, 3], seen)
    if text:
        assert finding.status == WRONG
        assert finding.seen == f"run_dir={tmp_path} is not shared: {text}"
        assert "shared file system" in finding.fix
    else:
        assert finding.status == OK


def test_files_that_do_not_appear_are_not_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joint, "_SEEN_SECONDS", 0.5)
    (tmp_path / "a").touch()
    threading.Timer(0.2, (tmp_path / "b").touch).start()
    assert joint._seen(tmp_path, {0: "a", 1: "b", 2: "c"}) == [0, 1]


def result(**seconds: float) -> dict[str, Any]:
    return {"device": "cpu", "seconds": {"all_reduce": 0.01, "all_gather": 0.02, **seconds}}


def judged(*results: dict[str, Any] | None) -> list[Finding]:
    of_ranks = {rank: one for rank, one in enumerate(results) if one is not None}
    return list(joint._judge(of_ranks, HOST_OF))


def test_collectives_are_reported_with_the_slowest_ranks_bandwidth() -> None:
    slow = result(all_reduce=0.08388608, all_gather=0.01)
    finding = only(judged(result(), result(), slow, result()))
    assert finding.status == OK
    assert "4 ranks on cpu: all_reduce 0.10, all_gather 0.42 GB/s" in finding.seen


def test_wrong_collective_names_rank_and_host() -> None:
    wrong = {"error": "wrong result of all_reduce"}
    finding = only(judged(result(), result(), wrong, result()))
    assert (finding.status, finding.hosts) == (WRONG, ("n2",))
    assert finding.seen == "rank 2 (n2): wrong result of all_reduce"


def test_failed_late_and_absent_ranks_are_distinguished() -> None:
    error, late = {"error": "RuntimeError: refused"}, {"error": "got no answer within 4 seconds"}
    rows = judged(late, None, error, error)
    assert [(row.seen, row.hosts) for row in rows] == [
        ("rank 1 (n1): went away", ("n1",)),
        ("rank 2, 3 (n2, n3): RuntimeError: refused", ("n2", "n3")),
    ]
    finding = only(judged(late, result(), late, result()))
    assert finding.seen == "rank 0, 2 (n1, n2): got no answer within 4 seconds"
    assert finding.hosts == ("n1", "n2")


def test_findings_can_be_sent() -> None:
    finding = Finding(WRONG, "a", "b", "c", ("n1",))
    again = Finding(**json.loads(json.dumps(asdict(finding))))
    assert only(together([again], ["n1"])) == finding


def test_hosts_that_did_not_come_or_report_are_named() -> None:
    hosts = ("n1", "n2", "n3", "n4")
    missing, silent = run._absent(ranks_on(HOST_OF, size=5), hosts, {"n1": (), "n2": ()})
    assert missing.hosts == ("n4",) and missing.seen.startswith("rank 4 (n4) did not come")
    assert "n1:7" in missing.fix
    assert silent.hosts == ("n3",)

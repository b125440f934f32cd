"""The doctor's checks one by one: each sees what is there, and each can fail."""

from __future__ import annotations

import json
import os
import resource
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from neftune_dist.cluster.doctor import (
    collectives,
    conflicts,
    findings,
    gpus,
    machine,
    nodes,
    run,
    software,
)
from neftune_dist.cluster.doctor import ranks as module_of_ranks
from neftune_dist.cluster.doctor.findings import (
    OK,
    WARNING,
    WRONG,
    Finding,
    examine,
    table,
    together,
)
from neftune_dist.cluster.doctor.ranks import Ranks, expand, host_name, meet, slurm_step
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


def by_check(found: Iterable[Finding]) -> dict[str, Finding]:
    return {each.check: each for each in found}


# The table


def test_the_table_is_aligned_and_says_how_to_mend_what_is_not_ok() -> None:
    rows = [
        Finding(OK, "clock", "right", "never shown"),
        Finding(WRONG, "a long name", "broken", "mend it", ("n1",)),
        Finding(WARNING, "b", "odd", "", ("n2",)),
    ]
    assert list(table(rows, ["n1", "n2"])) == [
        "status   check        host         seen, and -> how to fix it",
        "ok       clock        all 2 hosts  right",
        "wrong    a long name  n1           broken",
        "                                   -> mend it",
        "warning  b            n2           odd",
        "1 wrong, 1 warning",
    ]
    assert list(table(rows[:1], ["n1"]))[-1] == "all good"


def test_what_all_hosts_share_is_one_row_and_comes_first() -> None:
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


def test_quantities_that_differ_are_given_as_a_range_and_versions_are_not() -> None:
    def rows(check: str, status: str, *texts: str) -> list[Finding]:
        return [
            Finding(status, check, text, hosts=(f"n{i}",)) for i, text in enumerate(texts, start=1)
        ]

    hosts = ["n1", "n2"]
    fine = rows("disk", OK, "/a/7 b: 9.5 GiB free, 80 MiB/s", "/a/7 b: 10.5 GiB free, 80 MiB/s")
    assert only(together(fine, hosts)).seen == "/a/7 b: 9.5 to 10.5 GiB free, 80 MiB/s"
    assert len(together(rows("disk", WARNING, "1 GiB free", "2 GiB free"), hosts)) == 2
    assert len(together(rows("versions", OK, "torch 2.13.0, x", "torch 2.12.0, x"), hosts)) == 2


def test_many_hosts_are_not_all_named() -> None:
    assert findings.named([f"n{i}" for i in range(9)]) == "n0, n1, n2, n3 and 5 more"
    assert findings.named(["n0", "n1"], 2) == "all 2 hosts"


def test_a_check_that_fails_or_hangs_is_a_row_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken() -> Iterator[Finding]:
        yield Finding(OK, "never", "seen")
        raise RuntimeError("no driver\nand a long story")

    released = threading.Event()

    def hanging() -> Iterator[Finding]:
        released.wait(60)
        yield from ()

    monkeypatch.setattr(findings, "_SHORTEST_SECONDS", 0.2)
    checks = {"a": broken, "b": hanging, "c": lambda: [Finding(OK, "c", "fine")]}
    began = time.monotonic()
    found = examine(checks, "n1", 0.2)
    released.set()
    assert time.monotonic() - began < 10
    assert [(f.status, f.check, f.hosts) for f in found] == [
        (WRONG, "a", ("n1",)),
        (WRONG, "b", ("n1",)),
        (OK, "c", ("n1",)),
    ]
    assert found[0].seen == "RuntimeError: no driver"
    assert "no answer within" in found[1].seen


def test_an_error_of_torch_is_told_without_its_stack() -> None:
    error = RuntimeError("Connection refused\nException raised from here at socket.cpp:1\n#0 x")
    assert findings.error_text(error) == "RuntimeError: Connection refused"
    assert findings.error_text(ValueError()) == "ValueError"


# Software


def test_versions_are_named_in_one_row() -> None:
    found = software.versions()
    assert {"neftune-dist", "python", "torch", "transformers", "deepspeed"} <= set(found)
    finding = only(software.check_versions(found))
    assert finding.status == OK and f"torch {torch.__version__}" in finding.seen


def test_the_digest_of_the_sources_tells_an_edit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "__init__.py").write_text("a = 1")
    monkeypatch.setattr(software.neftune_dist, "__file__", str(tmp_path / "__init__.py"))
    before = software.versions()["neftune-dist"]
    (tmp_path / "__init__.py").write_text("a = 2")
    assert software.versions()["neftune-dist"] != before


def test_versions_that_differ_between_hosts_are_named() -> None:
    of_hosts = {
        "n1": {"torch": "2.13.0", "driver": "570", "NCCL": "2.27.3"},
        "n2": {"torch": "2.12.0", "driver": "580"},
        "n3": {"torch": "2.13.0", "driver": "570", "NCCL": "2.27.3"},
    }
    found = by_check(software.compare_versions(of_hosts))
    assert {name: each.status for name, each in found.items()} == {
        "torch differs": WRONG,
        "driver differs": WARNING,
        "NCCL differs": WRONG,
    }
    assert found["torch differs"].seen == "2.13.0 on n1, n3; 2.12.0 on n2"
    assert found["NCCL differs"].seen == "2.27.3 on n1, n3; none on n2"
    assert not list(software.compare_versions({"n1": {"torch": "1"}, "n2": {"torch": "1"}}))


class FakePackages:
    """Installed packages by name: version, and what they need."""

    def __init__(self, packages: dict[str, tuple[str, list[str]]], wheel: str = "") -> None:
        self.packages, self.wheel = packages, wheel

    def distribution(self, name: str) -> Any:
        if name.lower() not in self.packages:
            raise PackageNotFoundError(name)
        version, requires = self.packages[name.lower()]
        return SimpleNamespace(
            version=version,
            requires=requires,
            metadata={"Name": name},
            read_text=lambda _: self.wheel,
        )

    def distributions(self) -> list[Any]:
        return [self.distribution(name) for name in self.packages]

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (software, conflicts):
            for name in ("distribution", "distributions"):
                monkeypatch.setattr(module, name, getattr(self, name), raising=False)


def test_packages_that_do_not_fit_each_other_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = {
        "neftune-dist": ("1", ["torch>=2", "a", 'z; extra == "x"', 'e; python_version < "3"']),
        "torch": ("2.13.0+cpu", ["b<2"]),
        "a": ("1", ["c>=1"]),
        "b": ("1.5", []),
        "c": ("1", ["not a requirement !"]),
        "torchvision": ("0.28", ["torch==2.13.0", "absent"]),
        "other": ("3", ["c>=9"]),  # which is nothing to us
    }
    FakePackages(packages).install(monkeypatch)
    finding = only(software.check_requirements())
    assert finding == Finding(OK, "requirements", "2 packages are there and fit each other")
    packages |= {"b": ("2.1", []), "torchvision": ("0.20", ["torch==2.5.0"])}
    del packages["c"]
    found = list(software.check_requirements())
    assert sorted((each.status, each.seen) for each in found) == [
        (WARNING, "torchvision 0.20 needs torch==2.5.0, found 2.13.0+cpu"),
        (WRONG, "a 1 needs c>=1, found none"),
        (WRONG, "torch 2.13.0+cpu needs b<2, found 2.1"),
    ]
    assert "uninstall torchvision" in next(f for f in found if f.status == WARNING).fix


@pytest.mark.parametrize("version", ["1.13.1", None])
def test_an_old_or_missing_torch_is_wrong(
    version: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages: dict[str, tuple[str, list[str]]] = {"neftune-dist": ("1", ["torch>=2.11"])}
    if version:
        packages["torch"] = (version, [])
    FakePackages(packages).install(monkeypatch)
    finding = only(software.check_requirements())
    assert finding.status == WRONG and 'install "torch>=' in finding.fix
    assert finding.seen.endswith(f"needs torch>=2.11, found {version or 'none'}")


def test_what_is_installed_here_satisfies_each_other() -> None:
    assert [f.seen for f in software.check_requirements() if f.status == WRONG] == []


def test_a_package_that_cannot_be_imported_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "good.py").write_text("print('noise')")
    (tmp_path / "flash.py").write_text("raise ImportError('undefined symbol: _ZN3c10\\nmore')")
    (tmp_path / "crashes.py").write_text("import os; os._exit(3)")
    (tmp_path / "hangs.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(software, "_IMPORTED_IF_THERE", {})
    monkeypatch.setattr(software, "_IMPORTED", ("good",))
    assert only(software.check_imports()).status == OK
    monkeypatch.setattr(software, "_SLOW_IMPORT_SECONDS", 0.0)
    assert only(software.check_imports()).status == WARNING

    monkeypatch.setattr(software, "_IMPORTED_IF_THERE", {"pytest": "flash", "missing": "no"})
    monkeypatch.setattr(software, "_IMPORTED", ("good",))
    finding = only(software.check_imports())
    assert finding.status == WRONG and "uninstall pytest" in finding.fix
    assert finding.seen == "flash cannot be imported: ImportError: undefined symbol: _ZN3c10"

    monkeypatch.setattr(software, "_IMPORTED_IF_THERE", {})
    monkeypatch.setattr(software, "_IMPORTED", ("good", "crashes", "flash"))
    assert "crashes cannot be imported: the process ended with code 3" in {
        each.seen for each in software.check_imports()
    }
    monkeypatch.setattr(software, "_IMPORTED", ("good", "hangs"))
    monkeypatch.setattr(software, "_IMPORT_SECONDS", 1.0)
    assert only(software.check_imports()).seen.startswith("hangs cannot be imported: it took more")


# Known conflicts


def conflict(found: Callable[[], str]) -> str:
    """What a conflict's own function sees, which must be one of the table's."""
    assert found in [each.found for each in conflicts.CONFLICTS]
    return found()


def test_no_conflict_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        conflicts, "CONFLICTS", (conflicts.Conflict("x", WRONG, lambda: "", "never"),)
    )
    assert only(conflicts.check_conflicts()).status == OK


def test_a_conflict_that_cannot_be_looked_for_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> str:
        raise OSError("no such library")

    monkeypatch.setattr(conflicts, "CONFLICTS", (conflicts.Conflict("x", WRONG, fails, "mend"),))
    assert only(conflicts.check_conflicts()).seen == "OSError: no such library"


def test_nccl_twice_or_another_one_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = {"nvidia-nccl-cu13": ("2.27.7", []), "nvidia-nccl-cu12-stubs": ("1", [])}
    FakePackages(packages).install(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 7))
    assert not conflict(conflicts._two_nccls) and not conflict(conflicts._shadowed_nccl)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 19, 3, "x"))
    assert conflict(conflicts._shadowed_nccl) == (
        "NCCL 2.19.3 is loaded instead of nvidia-nccl-cu13 2.27.7"
    )
    packages["nvidia-nccl-cu12"] = ("2.27.3", [])
    assert "overwrite each other" in conflict(conflicts._two_nccls)


def test_missing_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert conflict(conflicts._no_cxx) == "no c++ found"
    program(tmp_path / "mine", "")
    monkeypatch.setenv("CXX", "mine -O2")
    assert not conflict(conflicts._no_cxx)

    assert not conflict(conflicts._no_triton_compiler)  # there is no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert conflict(conflicts._no_triton_compiler) == "no gcc or clang found"
    monkeypatch.setenv("CC", "mine -O2")
    monkeypatch.setattr(conflicts.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    assert conflict(conflicts._no_triton_compiler) == f"no {tmp_path}/Python.h"
    (tmp_path / "Python.h").write_text("")
    assert not conflict(conflicts._no_triton_compiler)


@pytest.mark.parametrize(
    ("variable", "value", "is_one"),
    [
        ("NCCL_SOCKET_IFNAME", "eth", False),
        ("NCCL_SOCKET_IFNAME", "ib,eth", True),
        ("NCCL_SOCKET_IFNAME", "=eth", True),
        ("NCCL_SOCKET_IFNAME", "^docker", False),
        ("GLOO_SOCKET_IFNAME", "eth0", False),
        ("GLOO_SOCKET_IFNAME", "eth", True),
    ],
)
def test_an_interface_that_is_not_there(
    variable: str, value: str, is_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conflicts.socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    monkeypatch.setenv(variable, value)
    assert bool(conflict(conflicts._unknown_interface)) == is_one


def test_variables_that_slow_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "0")
    assert not conflict(conflicts._slowing_variables)
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    assert conflict(conflicts._slowing_variables) == "NCCL_P2P_DISABLE=1"


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


def fake_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: str = "", topology: str = ""
) -> None:
    (tmp_path / "gpus").write_text(gpus)
    (tmp_path / "topology").write_text(topology)
    script = f'case "$1" in topo) cat {tmp_path}/topology;; *) cat {tmp_path}/gpus;; esac'
    program(tmp_path / "bin" / "nvidia-smi", script)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")


def test_gpus_of_a_kind_are_one_row_with_memory_and_bf16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpus(monkeypatch, device("a"), device("b"), device("c", "Old", 16, 7))
    fake_smi(tmp_path, monkeypatch, "GPU-a, 4, 0\nGPU-b, 4, [N/A]\nGPU-c, 4, 0\n")
    assert [(f.status, f.check, f.seen) for f in gpus.check_gpus(2)] == [
        (OK, "GPUs", "2 x NVIDIA H100, 80 GiB, capability 9.0, bf16"),
        (WARNING, "GPUs", "1 x Old, 16 GiB, capability 7.0, no bf16"),
    ]


def test_a_gpu_in_use_or_with_memory_errors_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpus(monkeypatch, device("a"), device("b"))
    fake_smi(tmp_path, monkeypatch, "GPU-hidden, 9000, 9\nGPU-b, 20480, 0\nGPU-a, 4, 7\n")
    found = by_check(gpus.check_gpus(2))
    assert (found["GPU 1"].status, found["GPU 1"].seen) == (
        WARNING,
        "20.0 GiB are in use by another process",
    )
    assert found["GPU 0"].status == WRONG and found["GPU 0"].seen.startswith("7 uncorrected")
    assert len(found) == 3


def test_more_ranks_than_gpus_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_gpus(monkeypatch, device("a"))
    fake_smi(tmp_path, monkeypatch)
    assert [f.status for f in gpus.check_gpus(2)] == [OK, WRONG]


def test_a_failing_nvidia_smi_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_gpus(monkeypatch, device("a"))
    message = "Failed to initialize NVML: Driver/library version mismatch"
    program(tmp_path / "bin" / "nvidia-smi", f"echo '{message}'; exit 18")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    finding = by_check(gpus.check_gpus(1))["nvidia-smi"]
    assert finding.status == WRONG and message in finding.seen
    assert "driver" not in software.versions()


def test_a_gpu_that_torch_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "_DEVICE", tmp_path / "nvidia0")
    assert only(gpus.check_gpus(1)).status == OK
    (tmp_path / "nvidia0").write_text("")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert only(gpus.check_gpus(1)).status == WARNING

    def fails() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", fails)
    finding = only(gpus.check_gpus(1))
    assert finding.status == WRONG and "driver on your system is too old" in finding.seen
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert only(gpus.check_gpus(1)).status == OK


TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m
GPU0\t X \tNV18\tSYS\tPIX\t0-31\t0
GPU1\tNV18\t X \tSYS\tSYS\t0-31\t0
GPU2\tSYS\tSYS\t X \tSYS\t32-63\t1
NIC0\tPIX\tSYS\tSYS\t X \t\t

Legend:
  X    = Self
"""


def test_links_between_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpus.link_types(TOPOLOGY) == ["NV18", "SYS", "SYS"]
    assert list(gpus.check_links()) == []  # no GPU
    fake_smi(tmp_path, monkeypatch, topology=TOPOLOGY)
    fake_gpus(monkeypatch, device("a"), device("b"), device("c"))
    finding = only(gpus.check_links())
    assert finding.status == OK
    assert finding.seen.startswith("NVLink (NV18) between 1 pairs, PCIe (SYS) between 2 pairs")
    fake_gpus(monkeypatch, device("a"), device("b"), device("c"), peers=False)
    finding = only(gpus.check_links())
    assert finding.status == WARNING
    assert finding.seen.endswith("no peer access in 2: 0 and 2, 1 and 2")


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
    finding = by_check(machine.check_memory(8))["host memory"]
    assert (finding.status, finding.seen) == (OK, "60.0 GiB of 64.0 GiB available")
    root("proc/meminfo", f"MemTotal: {64 * 2**20} kB\nMemAvailable: {7 * 2**20} kB\n")
    assert by_check(machine.check_memory(8))["host memory"].status == WARNING


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
    finding = by_check(machine.check_memory(2))["host memory"]
    assert finding.status == WARNING
    assert finding.seen == "1.0 GiB of 8.0 GiB available, the job's limit (of 64.0 GiB)"
    root(f"{base}/memory.stat", f"anon 1\n{free} {3 * GIB}\n")  # cached files can be dropped
    finding = by_check(machine.check_memory(2))["host memory"]
    assert finding.status == OK and finding.seen.startswith("4.0 GiB of 8.0 GiB")


def test_little_shared_memory_is_a_warning_for_several_ranks(
    root: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=64 * 2**20, total=64 * 2**20)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage)
    assert by_check(machine.check_memory(1))["shared memory"].status == OK
    finding = by_check(machine.check_memory(2))["shared memory"]
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
    finding = only(machine.check_cores(1, 0))
    assert (finding.status, finding.seen) == (OK, f"{quota or 4:g} of 64 for 1 rank")
    assert only(machine.check_cores(2, 0)).status == (WARNING if quota else OK)
    # srun without --cpus-per-task, before torchrun starts a process a GPU
    finding = only(machine.check_cores(1, 8))
    assert finding.status == WARNING and "for 8 ranks" in finding.seen


def limits(monkeypatch: pytest.MonkeyPatch, files: int, locked: int) -> None:
    values = {resource.RLIMIT_NOFILE: files, resource.RLIMIT_MEMLOCK: locked}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (values[which], values[which]))


def test_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    limits(monkeypatch, 1024, 0)
    assert only(machine.check_limits(8, 1)).status == OK
    assert only(machine.check_limits(512, 1)).status == WARNING
    limits(monkeypatch, resource.RLIM_INFINITY, 0)
    assert only(machine.check_limits(512, 1)).status == OK


def test_locked_memory_matters_where_infiniband_is(
    root: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits(monkeypatch, 65536, 8 * 2**20)
    found = by_check(machine.check_limits(8, 2))
    assert set(found) == {"open files", "InfiniBand"} and found["InfiniBand"].status == OK
    port = "sys/class/infiniband/mlx5_0/ports/1"
    root(f"{port}/state", "1: DOWN\n")
    root(f"{port}/rate", "400 Gb/sec (4X NDR)\n")
    assert by_check(machine.check_limits(8, 2))["InfiniBand"].status == WARNING
    root(f"{port}/state", "4: ACTIVE\n")
    found = by_check(machine.check_limits(8, 2))
    assert found["InfiniBand"].seen == "mlx5_0 port 1 400 Gb/sec"
    assert (found["locked memory"].status, found["locked memory"].seen) == (WARNING, "8 MiB")
    limits(monkeypatch, 65536, resource.RLIM_INFINITY)
    assert by_check(machine.check_limits(8, 2))["locked memory"].status == OK


# The run directory


def test_a_run_directory_below_a_file_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    finding = only(machine.check_run_dir(tmp_path / "file" / "runs"))
    assert finding.status == WRONG and "--run-dir" in finding.fix


def test_the_probe_of_the_disk_is_synced_read_back_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda number: sizes.append(os.fstat(number).st_size))
    seen = only(machine.check_run_dir(tmp_path / "not" / "there")).seen
    assert "MiB/s written" in seen and "MiB/s read" in seen
    assert sizes == [64 * 2**20]
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_loses_data_is_slow_or_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_SLOW_DISK_MIB", 10**9)
    finding = only(machine.check_run_dir(tmp_path))
    assert finding.status == WARNING and "minutes" in finding.fix
    monkeypatch.setattr(machine, "_LOW_DISK_GIB", 10**9)
    finding = only(machine.check_run_dir(tmp_path))
    assert finding.status == WARNING and "plan" in finding.fix

    def loses(number: int, *_: int) -> None:
        os.pwrite(number, b"\0" * 64, 0)

    monkeypatch.setattr(os, "posix_fadvise", loses)
    finding = only(machine.check_run_dir(tmp_path))
    assert finding.status == WRONG and "not what was written" in finding.seen
    assert list(tmp_path.iterdir()) == []


# The hub


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


def test_the_hub_is_not_asked_in_offline_mode(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    finding = by_check(machine.check_hub(None))["hub"]
    assert finding.status == OK and "HF_HUB_OFFLINE" in finding.seen


@pytest.mark.parametrize(("answer", "status"), [(200, OK), (404, OK), (503, WARNING)])
def test_a_hub_that_answers_is_reached(
    answer: int, status: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(answer)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request, daemon=True)
        thread.start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert by_check(machine.check_hub(None))["hub"].status == status
        thread.join(5)


@pytest.mark.parametrize("listening", [True, False])
def test_a_hub_that_is_silent_or_away_is_a_warning(
    listening: bool, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if listening:
            listener.listen()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setattr(machine, "_HUB_SECONDS", 0.5)
        finding = by_check(machine.check_hub(None))["hub"]
    assert finding.status == WARNING and "not reached" in finding.seen


def test_a_name_server_that_is_silent_is_not_waited_for(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    session = SimpleNamespace(head=lambda url, timeout: released.wait(30))
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: session)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(machine, "_HUB_SECONDS", 0.5)
    began = time.monotonic()
    finding = by_check(machine.check_hub(None))["hub"]
    released.set()
    assert time.monotonic() - began < 10
    assert finding.status == WARNING and "no answer" in finding.seen


def test_the_cache_of_the_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "GiB free" in by_check(machine.check_hub(None))["hub cache"].seen
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    finding = by_check(machine.check_hub(None))["hub cache"]
    assert finding.status == WARNING and "HF_HOME" in finding.fix


def test_a_model_is_a_directory_or_cached_or_to_be_had(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def status(model: str) -> str:
        return by_check(machine.check_hub(model))["model"].status

    assert status("a/b") == WRONG  # offline
    snapshot = cache / "models--a--b" / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (cache / "models--a--b" / "refs").mkdir()
    (cache / "models--a--b" / "refs" / "main").write_text("1234")
    assert status("a/b") == OK
    (tmp_path / "model").mkdir()
    assert status(str(tmp_path / "model")) == WRONG
    (tmp_path / "model" / "config.json").write_text("{}")
    assert status(str(tmp_path / "model")) == OK
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    session = SimpleNamespace(head=lambda url, timeout: SimpleNamespace(status_code=200))
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: session)
    assert status("c/d") == OK


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


def test_a_place_under_torchrun_in_a_step_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_batch_script_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert expand(text) == names


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_ranks_that_do_not_come_are_not_waited_for_and_late_ones_are_told() -> None:
    notices: list[str] = []
    port = free_port()
    ranks = meet(Place(0, 3, 0, 1, "127.0.0.1", port), 0.5, notices.append)
    assert list(ranks.host_of) == [0]
    with pytest.raises(TimeoutError, match="gone on without it"):
        meet(Place(2, 3, 0, 1, "127.0.0.1", port), 0.5, notices.append)


def test_ranks_that_are_waited_for_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_of_ranks, "_NOTICE_SECONDS", 0.1)
    notices: list[str] = []
    meet(Place(0, 3, 0, 1, "127.0.0.1", free_port()), 0.5, notices.append)
    assert set(notices) == {"waiting for ranks 1, 2"}


def ranks_on(host_of: dict[int, str], rank: int = 0, size: int = 4) -> Ranks:
    store = torch.distributed.HashStore()
    here = Place(rank, size, 0, 1, "n1", 7)
    return Ranks(here, Mailbox(store, rank, size), host_of, "token")


def test_the_first_rank_of_each_host() -> None:
    ranks = ranks_on({0: "n1", 1: "n1", 2: "n2", 3: "n2"})
    assert list(ranks.firsts.items()) == [("n1", 0), ("n2", 2)]
    assert ranks.of_hosts(["n2"]).firsts == {"n2": 2}


# What ranks find out together; the real runs are in tests/distributed/test_doctor.py

HOST_OF = {0: "n1", 1: "n1", 2: "n2", 3: "n3"}


@pytest.mark.parametrize(
    ("seen", "text"),
    [
        ({0: [0, 2, 3], 2: [0], 3: [0]}, ""),
        ({0: [0, 2, 3], 2: [], 3: [0]}, "n2 does not see what n1 writes"),
        ({0: [0, 2], 2: [0], 3: [0]}, "n1 does not see what n3 writes"),
        ({0: [0], 2: []}, "n2, n3 do not see what n1 writes; n1 does not see what n2, n3 writes"),
    ],
)
def test_hosts_that_do_not_share_the_run_directory(
    seen: dict[int, list[int]], text: str, tmp_path: Path
) -> None:
    finding = only(nodes._shared(tmp_path, ranks_on(HOST_OF), [0, 2, 3], seen))
    if text:
        assert finding.status == WRONG
        assert finding.seen == f"run_dir={tmp_path} is not shared: {text}"
        assert "shared file system" in finding.fix
    else:
        assert finding.status == OK


def test_a_file_with_other_content_is_not_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "_SEEN_SECONDS", 0.3)
    (tmp_path / "a").write_text("right")
    (tmp_path / "b").write_text("wro")
    sought = {
        tmp_path / "a": (0, "right"),
        tmp_path / "b": (1, "wrong"),
        tmp_path / "c": (2, ""),
    }
    assert nodes._seen(sought) == [0]


def result(**differences: Any) -> dict[str, Any]:
    seconds = {"all_reduce": 0.01, "all_gather": 0.02}
    return {"device": "cpu", "wrong": [], "seconds": seconds, "links": {}, **differences}


def judged(**of_ranks: Any) -> list[Finding]:
    return list(
        collectives._judge({int(name[1:]): each for name, each in of_ranks.items()}, HOST_OF)
    )


def test_collectives_and_their_bandwidth() -> None:
    slow = result(seconds={"all_reduce": 0.08388608, "all_gather": 0.01})
    finding = only(judged(r0=result(), r1=result(), r2=slow, r3=result()))
    assert finding.status == OK
    assert "4 ranks on cpu: all_reduce 0.10, all_gather 0.42 GB/s" in finding.seen


def test_a_wrong_collective_names_rank_and_host() -> None:
    wrong = result(wrong=["all_reduce"])
    finding = only(judged(r0=result(), r1=result(), r2=wrong, r3=result()))
    assert (finding.status, finding.hosts) == (WRONG, ("n2",))
    assert finding.seen == "all_reduce is wrong on rank 2 (n2)"


def test_ranks_that_fail_wait_or_go_away_are_told_apart() -> None:
    error = {"error": "RuntimeError: refused"}
    found = judged(r0={"stuck": 3.0}, r2=error, r3=error)
    assert [each.seen for each in found] == [
        "rank 2, 3 (n2, n3): RuntimeError: refused",
        "rank 1 (n1) went away",
    ]
    found = judged(r0={"stuck": 3.0}, r1=result(), r2={"stuck": 4.0}, r3=result())
    assert only(found).seen == "rank 0, 2 (n1, n2) got no answer within 4 seconds"
    assert only(found).hosts == ("n1", "n2")


def test_a_slow_link_is_named() -> None:
    links = {"n1 to n2": 11.0, "n2 to n3": 1.2, "n3 to n1": 10.0}
    finding = only(collectives._judge_links(links))
    assert finding.status == WARNING
    assert finding.seen == "n2 to n3 1.20 GB/s, the median is 10.00"
    assert only(collectives._judge_links({"a": 2.0, "b": 1.5})).status == OK


def test_findings_can_be_sent() -> None:
    finding = Finding(WRONG, "a", "b", "c", ("n1",))
    again = Finding(**json.loads(json.dumps(asdict(finding))))
    assert only(together([again], ["n1"])) == finding


def test_hosts_that_did_not_come_or_not_report_are_named() -> None:
    hosts = ("n1", "n2", "n3", "n4")
    missing, silent = run._absent(ranks_on(HOST_OF, size=5), hosts, {0: (), 2: ()})
    assert missing.hosts == ("n4",) and missing.seen.startswith("rank 4 (n4) did not come")
    assert "n1:7" in missing.fix
    assert silent.hosts == ("n3",)

"""`neftune-dist doctor`: is this machine fit for a run? One line a check, on rank 0.

Under torchrun every rank takes part in the check of the collectives; the other checks are of rank
0's machine. Nothing is raised: what goes wrong is a line of the table. Packages are imported by the
checks that need them, so that a broken one is such a line, too.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

OK, WARNING, WRONG = "ok", "warning", "wrong"

_VERSIONED = ("python", "torch", "deepspeed", "transformers", "datasets", "omegaconf")
_PROBE_MIB = 64
_LOW_DISK_GIB = 12  # one checkpoint of 1e9 parameters: weights and both moments in float32
_LOW_MEMORY_GIB = 1  # a rank before any model; libraries and process group take half of it
_HUB_SECONDS = 5.0
_COLLECTIVES_SECONDS = 120.0  # ranks may start this far apart
_RANK_0_FINISHES_SECONDS = 10.0  # the launcher ends all ranks with the first one


@dataclass(frozen=True)
class Finding:
    """One line: ok, warning or wrong; of which check; what was seen; how to mend it if not ok."""

    status: str
    check: str
    seen: str
    mend: str = ""

    def __str__(self) -> str:
        mend = f"; {self.mend}" if self.mend and self.status != OK else ""
        return f"{self.status:<8} {self.check:<14} {self.seen.splitlines()[0]}{mend}"


def doctor(run_dir: Path) -> int:
    """Check this machine, and that `run_dir` can be written (it is not made): a table on rank 0.

    0 where nothing is wrong, else 2; nothing is raised.
    """
    num_wrong = 0
    if os.environ.get("RANK", "0") == "0":
        checks: dict[str, Callable[[], Iterator[Finding]]] = {
            "versions": check_versions,
            "compiler": check_compiler,
            "gpu": check_gpus,
            "host memory": check_host_memory,
            "run directory": lambda: check_run_dir(run_dir),
            "hub": check_hub,
        }
        for name, check in checks.items():
            try:
                findings = list(check())
            except Exception as error:  # whatever a broken environment raises is what was seen
                findings = [Finding(WRONG, name, f"{type(error).__name__}: {error}")]
            for finding in findings:
                num_wrong += finding.status == WRONG
                print(finding, flush=True)
    return check_collectives(num_wrong)


def check_versions() -> Iterator[Finding]:
    """Python and the packages a run stands on, against neftune-dist's own requirements."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    needed = {r.name: r.specifier for r in map(Requirement, requires("neftune-dist") or ())}
    needed["python"] = SpecifierSet(metadata("neftune-dist")["Requires-Python"])
    for name in _VERSIONED:
        try:
            found = platform.python_version() if name == "python" else version(name)
        except PackageNotFoundError:
            found = ""
        good = found and needed[name].contains(found, prereleases=True)
        seen = f"{found or 'not installed'} ({needed[name]} is needed)"
        yield Finding(OK if good else WRONG, name, seen, f'install "{name}{needed[name]}"')


def check_compiler() -> Iterator[Finding]:
    """A C++ compiler: DeepSpeed compiles a small operation at its first run on CPU."""
    command = (os.environ.get("CXX") or "c++").split()[0]
    path = shutil.which(command)
    mend = "install g++ or set CXX, or stay with engine.name=fsdp2"
    yield Finding(OK if path else WARNING, "compiler", path or f"no {command} found", mend)


def check_gpus() -> Iterator[Finding]:
    """Each GPU: its memory, and whether it computes in bf16."""
    import torch

    devices = range(torch.cuda.device_count())
    if not devices:
        unused = Path("/dev/nvidia0").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
        seen = f"none: CPU{', though this machine has one' if unused else ''}"
        mend = "install a torch build that fits the driver"
        yield Finding(WARNING if unused else OK, "gpu", seen, mend)
    for index in devices:
        device = torch.cuda.get_device_properties(index)
        bf16 = device.major >= 8  # Ampere
        seen = f"{device.name}, {device.total_memory / 2**30:.0f} GiB, {'' if bf16 else 'no '}bf16"
        yield Finding(OK if bf16 else WARNING, f"gpu {index}", seen, "set model.dtype=fp32")


def check_host_memory() -> Iterator[Finding]:
    """Total and available memory of the machine."""
    rows = (row.partition(":") for row in Path("/proc/meminfo").read_text().splitlines())
    gib = {name: int(rest.split()[0]) / 2**20 for name, _, rest in rows}
    needed = _LOW_MEMORY_GIB * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    seen = f"{gib['MemAvailable']:.1f} of {gib['MemTotal']:.1f} GiB available (a job may get less)"
    mend = f"the ranks need about {needed} GiB before any model is loaded"
    yield Finding(OK if gib["MemAvailable"] >= needed else WARNING, "host memory", seen, mend)


def check_run_dir(run_dir: Path) -> Iterator[Finding]:
    """Writable? Free disk, and the speed of one fsynced file, which is removed."""
    path = run_dir.expanduser().absolute()
    folder = next(each for each in (path, *path.parents) if each.exists())
    block = os.urandom(_PROBE_MIB * 2**20)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
            began = time.perf_counter()
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = _PROBE_MIB / (time.perf_counter() - began)
    except OSError as error:
        seen = f"{folder} cannot be written: {error.strerror or error}"
        yield Finding(WRONG, "run directory", seen, "choose another with --run-dir")
        return
    free = shutil.disk_usage(folder).free / 2**30
    seen = f"{folder}: {free:.1f} GiB free, {speed:.0f} MiB/s written"
    status = OK if free >= _LOW_DISK_GIB else WARNING
    yield Finding(status, "run directory", seen, "`neftune-dist plan` says what checkpoints take")


def check_hub() -> Iterator[Finding]:
    """Whether the hub answers, unless HF_HUB_OFFLINE forbids asking."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        yield Finding(OK, "hub", "not tried: HF_HUB_OFFLINE is set, local files only")
        return
    problem = [f"no answer within {_HUB_SECONDS:.0f} s"]

    def ask() -> None:
        try:
            status = get_session().head(constants.ENDPOINT, timeout=_HUB_SECONDS).status_code
            problem[0] = f"HTTP status {status}" if status >= 500 else ""
        except Exception as error:  # the client raises a dozen unrelated types
            problem[0] = f"{type(error).__name__}: {error}"

    # A thread, because looking up the host's name heeds no time limit.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_HUB_SECONDS)
    seen = f"{constants.ENDPOINT} {f'not reached: {problem[0]}' if problem[0] else 'reached'}"
    yield Finding(WARNING if problem[0] else OK, "hub", seen, "use local files, HF_HUB_OFFLINE=1")


def check_collectives(num_wrong: int) -> int:
    """Sum a number over all ranks, and each rank's `num_wrong` with it: the exit code."""
    rank = os.environ.get("RANK", "0")

    def wrong(seen: str) -> int:
        mend = "check the GPUs a machine, MASTER_ADDR, and the network between machines"
        finding = Finding(WRONG, "collectives", f"rank {rank}: {seen}", mend)
        print(finding, file=sys.stdout if rank == "0" else sys.stderr, flush=True)
        return 2

    # A rank that never comes is waited for in native code, which only leaving the process ends.
    watchdog = threading.Timer(_COLLECTIVES_SECONDS, lambda: os._exit(wrong("no answer")))
    watchdog.start()
    try:
        from neftune_dist.distributed import World

        world = World()
        parts = world.gather([world.rank + 1.0, float(num_wrong)])
        world.close()
    except Exception as error:  # the process group raises a dozen unrelated types
        time.sleep(0 if rank == "0" else _RANK_0_FINISHES_SECONDS)
        return wrong(f"{type(error).__name__}: {error}")
    finally:
        watchdog.cancel()
    total, right = sum(part[0] for part in parts), world.size * (world.size + 1) / 2
    if total != right:
        return wrong(f"the sum is {total:g} instead of {right:g}")
    world.log(str(Finding(OK, "collectives", f"{world.size} on {world.device.type}, right sum")))
    return 2 if sum(part[1] for part in parts) else 0

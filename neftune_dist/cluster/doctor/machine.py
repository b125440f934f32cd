"""One machine but for its GPUs: memory, cores, limits, network cards, run directory, the hub."""

from __future__ import annotations

import math
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from neftune_dist.cluster.doctor.findings import OK, WARNING, WRONG, Finding, error_text, within
from neftune_dist.config import user_path
from neftune_dist.system import cgroups
from neftune_dist.system.text import size_text

_ROOT = Path("/")
_PROBE_MIB = 64
_LOW_DISK_GIB = 12  # one checkpoint of 1e9 parameters: weights and both moments in float32
_SLOW_DISK_MIB = 50  # a second; such a checkpoint takes four minutes
_LOW_MEMORY_GIB = 1  # a rank before any model; libraries and process group take half of it
_LOW_SHARED_GIB = 1  # what NCCL's documentation asks of a container; Docker gives 1/16 of it
_OPEN_FILES = 1024  # of one process, and as many as _OPEN_FILES_PER_RANK of a large world
_OPEN_FILES_PER_RANK = 32
_HUB_SECONDS = 5.0


def check_memory(num_ranks: int) -> Iterator[Finding]:
    """Memory that this process's control group and the machine can still give, and /dev/shm.

    Args:
        num_ranks: on this machine.
    """
    available, limit, total = (each / 2**30 for each in cgroups.memory_bytes())
    needed = _LOW_MEMORY_GIB * num_ranks
    whose = "" if limit == total else f", the job's limit (of {total:.1f} GiB)"
    seen = f"{available:.1f} GiB of {limit:.1f} GiB available{whose}"
    fix = f"{num_ranks} ranks take {needed} GiB before any model: ask for more, as with --mem"
    yield Finding(OK if available >= needed else WARNING, "host memory", seen, fix)
    try:
        usage = shutil.disk_usage(_ROOT / "dev/shm")
    except OSError as error:
        yield Finding(WRONG, "shared memory", error_text(error), "mount /dev/shm")
        return
    low = num_ranks > 1 and usage.free < _LOW_SHARED_GIB * 2**30
    seen = f"{usage.free / 2**30:.2f} GiB of {usage.total / 2**30:.2f} GiB free in /dev/shm"
    fix = "NCCL connects ranks through it: start the container with --shm-size=1g or --ipc=host"
    yield Finding(WARNING if low else OK, "shared memory", seen, fix)


def check_cores(num_ranks: int, num_gpus: int) -> Iterator[Finding]:
    """Cores that this process may use: its affinity and its control group's quota.

    Args:
        num_ranks: on this machine. num_gpus: a run starts one rank on each.
    """
    cores = cgroups.num_cores()
    ranks = max(num_ranks, num_gpus)
    # A rank that drives a GPU has its own thread, the loader's, and NCCL's.
    low = cores < ranks * (2 if num_gpus else 1)
    all_cores = os.cpu_count() or 1
    seen = f"{cores:g} of {all_cores} for {ranks} rank{'s' if ranks > 1 else ''}"
    fix = "ask for more: srun --cpus-per-task=N (or --cpu-bind=none), docker run --cpus=N"
    yield Finding(WARNING if low else OK, "cores", seen, fix)


def check_limits(num_all_ranks: int, num_hosts: int) -> Iterator[Finding]:
    """Open files; with several hosts, network cards and the memory that they may lock."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    files = 2**31 if files == resource.RLIM_INFINITY else files
    needed = max(_OPEN_FILES, _OPEN_FILES_PER_RANK * num_all_ranks)
    seen = f"{files if files < 2**31 else 'unlimited'} a process"
    fix = f"a world of {num_all_ranks} may need {needed}: ulimit -n {needed}, before the launch"
    yield Finding(OK if files >= needed else WARNING, "open files", seen, fix)
    if num_hosts == 1:
        return
    ports = sorted((_ROOT / "sys/class/infiniband").glob("*/ports/*"))
    states = {f"{port.parts[-3]} port {port.name}": _state(port) for port in ports}
    if not states:
        yield Finding(OK, "InfiniBand", "none: hosts speak over sockets")
        return
    active = {name: rate for name, (state, rate) in states.items() if state == "ACTIVE"}
    seen = ", ".join(f"{name} {rate}" for name, rate in active.items()) or "no port is active"
    fix = "see ibstat; without a port NCCL falls back to sockets"
    yield Finding(OK if active else WARNING, "InfiniBand", seen, fix)
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    limited = locked != resource.RLIM_INFINITY
    seen = f"{locked / 2**20:.0f} MiB" if limited else "unlimited"
    fix = (
        "InfiniBand locks its buffers: ulimit -l unlimited; in a container --ulimit memlock=-1; "
        "for Slurm LimitMEMLOCK=infinity of slurmd's service"
    )
    yield Finding(WARNING if limited and active else OK, "locked memory", seen, fix)


def _state(port: Path) -> tuple[str, str]:
    """State and rate of a port, which the kernel writes as "4: ACTIVE", "400 Gb/sec (4X NDR)"."""
    texts = [(port / name).read_text().strip() for name in ("state", "rate")]
    return texts[0].rpartition(" ")[2], texts[1].partition(" (")[0]


def existing(run_dir: Path) -> Path:
    """The run directory, or the folder above it that exists."""
    path = run_dir.absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def check_run_dir(run_dir: Path) -> Iterator[Finding]:
    """Free disk, and the speed and content of one fsynced file, which is removed."""
    folder = existing(run_dir)
    block = os.urandom(_PROBE_MIB * 2**20)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
            began = time.perf_counter()
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written = _PROBE_MIB / (time.perf_counter() - began)
            # What the page cache still holds would be no test of the disk.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            file.seek(0)
            same = file.read() == block
            read = _PROBE_MIB / (time.perf_counter() - began)
    except OSError as error:
        seen = f"{folder} cannot be written: {error.strerror or error}"
        yield Finding(WRONG, "run directory", seen, "choose another with --run-dir")
        return
    if not same:
        seen = f"{folder}: what was read is not what was written"
        yield Finding(WRONG, "run directory", seen, "use another disk; this one loses data")
        return
    free = shutil.disk_usage(folder).free / 2**30
    seen = f"{folder}: {free:.1f} GiB free, {written:.0f} MiB/s written, {read:.0f} MiB/s read"
    low, slow = free < _LOW_DISK_GIB, written < _SLOW_DISK_MIB
    fix = "`neftune-dist plan` says what checkpoints take"
    if slow and not low:
        minutes = math.ceil(_LOW_DISK_GIB * 1024 / written / 60)
        fix = f"saving 1e9 parameters takes {minutes} minutes: choose a faster one with --run-dir"
    yield Finding(WARNING if low or slow else OK, "run directory", seen, fix)


def check_hub(model: str | None) -> Iterator[Finding]:
    """Check the hub (unless HF_HUB_OFFLINE is set), its cache, and `model`.

    Args:
        model: a directory or a hub id.
    """
    from huggingface_hub import constants, get_session, try_to_load_from_cache

    problem = ""
    if constants.HF_HUB_OFFLINE:
        yield Finding(OK, "hub", "not tried: HF_HUB_OFFLINE is set, local files only")
        problem = "HF_HUB_OFFLINE is set"
    else:
        try:
            answer = within(
                _HUB_SECONDS,
                lambda: get_session().head(constants.ENDPOINT, timeout=_HUB_SECONDS).status_code,
            )
            problem = f"HTTP status {answer}" if answer >= 500 else ""
        except Exception as error:  # the client raises a dozen unrelated types
            problem = error_text(error)
        seen = f"{constants.ENDPOINT} {f'not reached: {problem}' if problem else 'reached'}"
        fix = "use local files, HF_HUB_OFFLINE=1; fill the cache on a machine that reaches it"
        yield Finding(WARNING if problem else OK, "hub", seen, fix)
    cache = Path(constants.HF_HUB_CACHE)
    yield _cache(cache)
    if model is None:
        return
    fix = "download it into the cache on a machine that reaches the hub, or name a directory"
    place = user_path(model, "--model")
    if place.is_dir():
        there = (place / "config.json").is_file()
        seen = f"{model} is a directory {'with' if there else 'without'} a config.json"
        yield Finding(OK if there else WRONG, "model", seen, "name a model's directory")
    elif isinstance(try_to_load_from_cache(model, "config.json"), str):
        yield Finding(OK, "model", f"{model} is in the hub's cache")
    elif problem:
        yield Finding(WRONG, "model", f"{model} is neither a directory nor in the cache", fix)
    else:
        yield Finding(OK, "model", f"{model} is not in the cache; a run will ask the hub for it")


def _cache(cache: Path) -> Finding:
    """Whether downloads can be put into the hub's cache."""
    folder = existing(cache)
    if os.access(folder, os.W_OK):
        free = size_text(shutil.disk_usage(folder).free)
        return Finding(OK, "hub cache", f"{cache}: {free} free")
    fix = "set HF_HOME to a folder that can be written"
    return Finding(WARNING, "hub cache", f"{folder} cannot be written", fix)

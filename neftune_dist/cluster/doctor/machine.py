"""One machine: GPUs, memory, cores, limits, network cards, run directory, model.

Torch shows the GPUs that a run will see; nvidia-smi, where it is installed, the rest.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

from neftune_dist.cluster.doctor.findings import OK, WARNING, WRONG, Site, check, error_text
from neftune_dist.cluster.doctor.software import nvidia_smi
from neftune_dist.config import ModelConfig
from neftune_dist.system import cgroups
from neftune_dist.system.storage import existing

_ROOT = Path("/")
_GPU_QUERY = "--query-gpu=uuid,memory.used,ecc.errors.uncorrected.volatile.total"
_IDLE_GPU_MIB = 1024  # an idle one holds some hundred: the driver's, and this process's context
_PROBE_MIB = 64
_LOW_DISK_GIB = 12  # one checkpoint of 1e9 parameters: weights and both moments in float32
_SLOW_DISK_MIB = 50  # a second; such a checkpoint takes four minutes
_LOW_MEMORY_GIB = 1  # a rank before any model; libraries and process group take half of it
_LOW_SHARED_GIB = 1  # what NCCL's documentation asks of a container; Docker gives 1/16 of it
_HUB_SECONDS = 5.0


def count_gpus() -> int:
    """GPUs that torch can use here; 0 where it cannot be imported."""
    try:
        import torch

        return torch.cuda.device_count()
    except Exception:  # whatever is wrong, the checks of the software say it
        return 0


@check("GPUs", "see nvidia-smi and CUDA_VISIBLE_DEVICES; without bf16 set model.dtype=fp32")
def check_gpus(site: Site) -> Iterator[tuple[str, str]]:
    """Show each kind. On a machine with GPUs this initialises CUDA but allocates nothing."""
    import torch

    devices = [torch.cuda.get_device_properties(i) for i in range(count_gpus())]
    kinds = Counter((d.name, round(d.total_memory / 2**30), d.major, d.minor) for d in devices)
    for (name, gib, major, minor), number in kinds.items():
        bf16 = major >= 8  # Ampere
        seen = f"{number} x {name}, {gib} GiB, capability {major}.{minor}"
        yield OK if bf16 else WARNING, f"{seen}, {'' if bf16 else 'no '}bf16"
    if devices:
        return
    if not (_ROOT / "dev/nvidia0").exists() or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        yield OK, "none: CPU"
        return
    reason = "none is visible to this process"
    try:
        torch.cuda.init()
    except Exception as error:  # of the driver, or of a build without CUDA
        reason = error_text(error)
    seen = f"this machine has one, but torch {torch.__version__} cannot use it: {reason}"
    yield WRONG if torch.version.cuda else WARNING, seen


@check("GPU state", "end the process, or ask for whole nodes; after errors drain and reset it")
def check_states(site: Site) -> Iterator[tuple[str, str]]:
    """Find GPUs that others use or that have lost data. A driver that does not answer raises."""
    rows = nvidia_smi(_GPU_QUERY, "--format=csv,noheader,nounits").splitlines()
    if not count_gpus():
        return
    import torch

    indices = {f"GPU-{torch.cuda.get_device_properties(i).uuid}": i for i in range(count_gpus())}
    for uuid, used, errors in (row.split(", ") for row in rows if row.split(", ")[0] in indices):
        if used.isdigit() and int(used) > _IDLE_GPU_MIB:
            seen = f"{int(used) / 1024:.1f} GiB are in use by another process (nvidia-smi names it)"
            yield WARNING, f"GPU {indices[uuid]}: {seen}"
        if errors.isdigit() and int(errors):
            seen = f"{errors} uncorrected memory errors since the driver was loaded"
            yield WRONG, f"GPU {indices[uuid]}: {seen}"


@check("GPU links", "turn ACS and IOMMU off in the BIOS; in a container expose the GPUs together")
def check_links(site: Site) -> Iterator[tuple[str, str]]:
    """Find pairs of GPUs between which NCCL has to go through host memory."""
    import torch

    pairs = list(combinations(range(count_gpus()), 2))
    apart = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    if apart:
        some = ", ".join(f"{i} and {j}" for i, j in apart[:4]) + (", ..." if apart[4:] else "")
        yield WARNING, f"no peer access in {len(apart)} of {len(pairs)} pairs: {some}"
    elif pairs:
        yield OK, f"peer access in all {len(pairs)} pairs"


@check("host memory", "ask for more, as with --mem: a rank takes 1 GiB before any model")
def check_memory(site: Site) -> Iterator[tuple[str, str]]:
    """Show the free memory of this process's control group and of the machine."""
    available, limit, total = (size / 2**30 for size in cgroups.memory_bytes())
    low = available < _LOW_MEMORY_GIB * max(site.num_ranks, count_gpus())
    whose = "" if limit == total else f", the job's limit (of {total:.1f} GiB)"
    yield WARNING if low else OK, f"{available:.1f} GiB of {limit:.1f} GiB available{whose}"


@check("shared memory", "NCCL needs /dev/shm: start the container with --shm-size=1g or --ipc=host")
def check_shared_memory(site: Site) -> Iterator[tuple[str, str]]:
    """Show the room through which NCCL connects the ranks of a host."""
    usage = shutil.disk_usage(_ROOT / "dev/shm")
    low = site.num_ranks > 1 and usage.free < _LOW_SHARED_GIB * 2**30
    seen = f"{usage.free / 2**30:.2f} GiB of {usage.total / 2**30:.2f} GiB free in /dev/shm"
    yield WARNING if low else OK, seen


@check("cores", "ask for more: srun --cpus-per-task=N (or --cpu-bind=none), docker run --cpus=N")
def check_cores(site: Site) -> Iterator[tuple[str, str]]:
    """Show the cores of this process's affinity and its control group's quota."""
    cores, num_gpus = cgroups.num_cores(), count_gpus()
    ranks = max(site.num_ranks, num_gpus)  # a run starts one on each GPU
    # A rank that drives a GPU has its own thread, the loader's, and NCCL's.
    low = cores < ranks * (2 if num_gpus else 1)
    seen = f"{cores:g} of {os.cpu_count() or 1} for {ranks} rank{'s' if ranks > 1 else ''}"
    yield WARNING if low else OK, seen


@check("run directory", "choose another with --run-dir; `neftune-dist plan` estimates the need")
def check_run_dir(site: Site) -> Iterator[tuple[str, str]]:
    """Show free disk, and the speed of one fsynced file, which is removed."""
    folder = existing(site.run_dir)
    block = os.urandom(_PROBE_MIB * 2**20)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
            began = time.perf_counter()
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written = _PROBE_MIB / (time.perf_counter() - began)
    except OSError as error:
        yield WRONG, f"{folder} cannot be written: {error.strerror or error}"
        return
    free = shutil.disk_usage(folder).free / 2**30
    seen = f"{folder}: {free:.1f} GiB free, {written:.0f} MiB/s written"
    yield WARNING if free < _LOW_DISK_GIB or written < _SLOW_DISK_MIB else OK, seen


@check("model", "name a model's directory, or fill the hub's cache on a machine that reaches it")
def check_model(site: Site) -> Iterator[tuple[str, str]]:
    """Find the model on this machine or on the hub; refusals of the hub are raised."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    from neftune_dist.model import locate

    if site.model is None:
        return
    if locate.find_local(ModelConfig(name_or_path=site.model)):
        yield OK, f"{site.model} is a directory"
    elif isinstance(try_to_load_from_cache(site.model, "config.json"), str):
        yield OK, f"{site.model} is in the hub's cache"
    else:
        HfApi().model_info(site.model, timeout=_HUB_SECONDS)
        yield OK, f"{site.model} is on the hub, from which a run will download it"

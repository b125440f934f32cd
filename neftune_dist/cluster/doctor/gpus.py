"""The GPUs of one machine: kinds, other users, memory errors and links.

Torch shows the GPUs that a run will see; nvidia-smi, where it is installed, the rest.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

from neftune_dist.cluster.doctor.findings import OK, WARNING, WRONG, Site, check, error_text
from neftune_dist.cluster.doctor.software import nvidia_smi

# An idle GPU holds some hundred MiB: the driver's own, and this process's context.
_IDLE_MIB = 1024
_DEVICE = Path("/dev/nvidia0")
_QUERY = "--query-gpu=uuid,memory.used,ecc.errors.uncorrected.volatile.total"


def count() -> int:
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

    devices = [torch.cuda.get_device_properties(i) for i in range(count())]
    kinds = Counter((d.name, round(d.total_memory / 2**30), d.major, d.minor) for d in devices)
    for (name, gib, major, minor), number in kinds.items():
        bf16 = major >= 8  # Ampere
        seen = f"{number} x {name}, {gib} GiB, capability {major}.{minor}"
        yield OK if bf16 else WARNING, f"{seen}, {'' if bf16 else 'no '}bf16"
    if devices:
        return
    if not _DEVICE.exists() or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        yield OK, "none: CPU"
        return
    reason = "none is visible to this process"
    try:
        torch.cuda.init()
    except Exception as error:  # of the driver, or of a build without CUDA
        reason = error_text(error)
    seen = f"this machine has one, but torch {torch.__version__} cannot use it: {reason}"
    yield WRONG if torch.version.cuda else WARNING, seen


@check("GPU per rank", "one process per GPU: Slurm's --gpus-per-node, without --gpus-per-task")
def check_ranks(site: Site) -> Iterator[tuple[str, str]]:
    """Compare the ranks with the GPUs that they see."""
    if 0 < count() < site.num_ranks:
        yield WRONG, f"{site.num_ranks} ranks, but this one sees {count()} GPUs"


@check("GPU state", "end the process, or ask for whole nodes; after errors drain and reset it")
def check_states(site: Site) -> Iterator[tuple[str, str]]:
    """Find GPUs that others use or that have lost data. A driver that does not answer raises."""
    rows = nvidia_smi(_QUERY, "--format=csv,noheader,nounits").splitlines()
    if not count():
        return
    import torch

    indices = {f"GPU-{torch.cuda.get_device_properties(i).uuid}": i for i in range(count())}
    for uuid, used, errors in (row.split(", ") for row in rows if row.split(", ")[0] in indices):
        if used.isdigit() and int(used) > _IDLE_MIB:
            seen = f"{int(used) / 1024:.1f} GiB are in use by another process (nvidia-smi names it)"
            yield WARNING, f"GPU {indices[uuid]}: {seen}"
        if errors.isdigit() and int(errors):
            seen = f"{errors} uncorrected memory errors since the driver was loaded"
            yield WRONG, f"GPU {indices[uuid]}: {seen}"


@check("GPU links", "turn ACS and IOMMU off in the BIOS; in a container expose the GPUs together")
def check_links(site: Site) -> Iterator[tuple[str, str]]:
    """Find pairs of GPUs between which NCCL has to go through host memory."""
    import torch

    pairs = list(combinations(range(count()), 2))
    apart = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    if apart:
        some = ", ".join(f"{i} and {j}" for i, j in apart[:4]) + (", ..." if apart[4:] else "")
        yield WARNING, f"no peer access in {len(apart)} of {len(pairs)} pairs: {some}"
    elif pairs:
        yield OK, f"peer access in all {len(pairs)} pairs"

"""The GPUs of one machine: what they are, who else uses them, their errors and their links.

Torch says what a run will see; nvidia-smi, where it is installed, says what torch cannot.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

from neftune_dist.cluster.doctor.findings import OK, WARNING, WRONG, Finding, error_text
from neftune_dist.cluster.doctor.software import nvidia_smi

# An idle GPU holds some hundred MiB: the driver's own, and this process's context.
_IDLE_MIB = 1024
_DEVICE = Path("/dev/nvidia0")
_QUERY = "uuid,memory.used,ecc.errors.uncorrected.volatile.total"


def count() -> int:
    """GPUs that torch can use here; 0 where it cannot be imported."""
    try:
        import torch

        return torch.cuda.device_count()
    except Exception:  # whatever is wrong, the checks of the software say it
        return 0


def check_gpus(num_ranks: int) -> Iterator[Finding]:
    """Each kind of GPU with its memory and bf16; each one that is taken or has lost data.

    On a machine with GPUs this initialises CUDA but allocates nothing on them.

    Args:
        num_ranks: on this machine, each of which wants one.
    """
    import torch

    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    if not devices:
        yield _none()
        return
    kinds = Counter(
        (each.name, f"{each.total_memory / 2**30:.0f}", each.major, each.minor) for each in devices
    )
    for (name, gib, major, minor), number in kinds.items():
        bf16 = major >= 8  # Ampere
        text = f"{number} x {name}, {gib} GiB, capability {major}.{minor}"
        seen = f"{text}, {'' if bf16 else 'no '}bf16"
        yield Finding(OK if bf16 else WARNING, "GPUs", seen, "set model.dtype=fp32")
    if num_ranks > len(devices):
        seen = f"{num_ranks} ranks, but this one sees {len(devices)} GPUs"
        fix = "start one process a GPU; under Slurm give the node's GPUs to all of its tasks"
        yield Finding(WRONG, "GPUs", seen, f"{fix}: --gpus-per-node, no --gpus-per-task")
    try:
        rows = [row.split(", ") for row in _rows(nvidia_smi(f"--query-gpu={_QUERY}", _CSV))]
    except Exception as error:
        yield Finding(
            WRONG, "nvidia-smi", error_text(error), "update or reload the driver, or reboot"
        )
        return
    index_by_uuid = {f"GPU-{each.uuid}": i for i, each in enumerate(devices)}
    for uuid, used, errors in rows:
        index = index_by_uuid.get(uuid)
        if index is None:  # hidden from this process
            continue
        if used.isdigit() and int(used) > _IDLE_MIB:
            seen = f"{int(used) / 1024:.1f} GiB are in use by another process"
            fix = "nvidia-smi names the process; end it, or ask for whole nodes (--exclusive)"
            yield Finding(WARNING, f"GPU {index}", seen, fix)
        if errors.isdigit() and int(errors):
            seen = f"{errors} uncorrected memory errors since the driver was loaded"
            yield Finding(WRONG, f"GPU {index}", seen, "drain this machine and reset the GPU")


_CSV = "--format=csv,noheader,nounits"


def _rows(text: str) -> list[str]:
    return [row for row in text.splitlines() if row.strip()]


def _none() -> Finding:
    """No GPU: by nature, or for a reason that can be fixed?"""
    import os

    import torch

    if not _DEVICE.exists() or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return Finding(OK, "GPUs", "none: CPU")
    if torch.version.cuda is None:
        seen = f"this machine has one, but torch {torch.__version__} is built without CUDA"
        return Finding(WARNING, "GPUs", seen, "install a torch build that fits the driver")
    try:
        torch.cuda.init()
        reason = "none is visible to this process"
    except Exception as error:
        reason = error_text(error)
    fix = "see nvidia-smi and CUDA_VISIBLE_DEVICES; under Slurm ask for GPUs"
    return Finding(WRONG, "GPUs", f"this machine has one, but torch cannot use it: {reason}", fix)


def check_links() -> Iterator[Finding]:
    """What connects each pair of GPUs, and whether one can read the other's memory."""
    pairs = list(combinations(range(count()), 2))
    if not pairs:
        return
    import torch

    apart = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    links = link_types(nvidia_smi("topo", "-m"))
    kinds = Counter(f"{'NVLink' if k.startswith('NV') else 'PCIe'} ({k})" for k in links)
    text = ", ".join(f"{kind} between {number} pairs" for kind, number in kinds.items())
    text = text or f"{len(pairs)} pairs"
    if not apart:
        yield Finding(OK, "GPU links", f"{text}, each reaches its peer's memory")
        return
    some = ", ".join(f"{i} and {j}" for i, j in apart[:4]) + (", ..." if len(apart) > 4 else "")
    seen = f"{text}; no peer access in {len(apart)}: {some}"
    fix = "NCCL goes through host memory: in a machine's BIOS turn ACS and IOMMU off; in a "
    fix += "container or virtual machine expose the GPUs of one node together"
    yield Finding(WARNING, "GPU links", seen, fix)


def link_types(matrix: str) -> Sequence[str]:
    """One of NV#, PIX, PXB, PHB, NODE, SYS for each pair of GPUs in `nvidia-smi topo -m`."""
    rows = [row.split() for row in re.sub(r"\x1b\[[0-9;]*m", "", matrix).splitlines()]
    rows = [row for row in rows if row and re.fullmatch(r"GPU\d+", row[0])]
    # The first row is the head of the columns; it begins with a column, too.
    body = [row for row in rows if "X" in row]
    return [row[1 + j] for i, row in enumerate(body) for j in range(i + 1, len(body))]

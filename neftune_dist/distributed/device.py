"""A rank's GPU: the threads that use it, and the processor cores nearest to it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from neftune_dist.distributed.environment import expand_numbers

_SYSTEM = Path("/sys")


def enter_thread(device: torch.device) -> None:
    """Let this thread use the rank's GPU. A new thread is on GPU 0, where its first call of CUDA
    would take memory for every rank of the machine."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def set_cpu_affinity(device: torch.device) -> None:
    """Run this thread, and those that it starts, only on the cores of the GPU's NUMA node, where
    the system says which these are.

    (torchrun's `--numa-binding` ends the run where the program `numactl` is missing, or where a
    container forbids what that asks of the system.)
    """
    gpu: Any = torch.cuda.get_device_properties(device)
    place = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    with suppress(OSError, ValueError):
        node = int((_SYSTEM / "bus/pci/devices" / place / "numa_node").read_text())  # -1: unknown
        cores = (_SYSTEM / f"devices/system/node/node{node}/cpulist").read_text()
        near = {int(number) for number in expand_numbers(cores)} & os.sched_getaffinity(0)
        if near:
            os.sched_setaffinity(0, near)

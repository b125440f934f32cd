"""The process of a node: it meets the other nodes, then starts its ranks under torchrun."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from neftune_dist.cluster.launch import rendezvous
from neftune_dist.cluster.launch.torchrun import LOOPBACK, torchrun
from neftune_dist.config import UserError
from neftune_dist.distributed import environment, outcome
from neftune_dist.system import cgroups, network

# Ranks that die so soon after the first may have died of the same cause.
_SAME_SECONDS = 1


def node(folder: Path, words: Sequence[str], *, num_processes: int, minutes: float) -> int:
    """Meet the other nodes in `folder`, then run this node's ranks under torchrun.

    A failure is written to `folder`, too.

    Args:
        folder: of the attempt.
        words: of `train`.
        num_processes: on this node; 0: one a GPU, or one where there is none.
        minutes: to wait for the other nodes.

    Returns:
        The exit code.
    """
    hosts = os.environ.get("NEFTUNE_DIST_HOSTS", socket.gethostname()).split(",")
    index = environment.number("SLURM_PROCID", 0) if len(hosts) > 1 else 0
    rendezvous.arrive(folder, index)
    number = num_processes or 1
    # Until torchrun's ranks are there, nothing needs saving.
    signal.signal(signal.SIGUSR1, lambda *_: _leave(index * number))
    try:
        number = num_processes or num_gpus() or 1
        if len(hosts) == 1:
            address, port = LOOPBACK, network.free_port()
            os.environ.setdefault("GLOO_SOCKET_IFNAME", network.interface_of(LOOPBACK) or "lo")
        else:
            address, port = rendezvous.meet(folder, hosts, index, minutes * 60)
            network.use_interface_towards(address if index else hosts[1])
    except (TimeoutError, OSError, UserError) as error:
        kind = outcome.MISTAKE if isinstance(error, UserError) else outcome.LOST
        outcome.tell(index * number, kind, error=str(error))
        return outcome.EXIT_FAILED
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    _set_environment(folder, number)
    options = [f"--nnodes={len(hosts)}", f"--nproc-per-node={number}", "--max-restarts=0"]
    train = ["-m", "neftune_dist", "train", *words]
    return _torchrun([*options, *train], address, port, index)


def _torchrun(words: Sequence[str], address: str, port: int, index: int) -> int:
    """Run torchrun in this process and report the death of each rank; return its exit code."""
    try:
        torchrun(words, address, port, index)
    except SignalException:  # SIGTERM, which it has passed on
        return outcome.EXIT_FAILED
    except ChildFailedError as error:
        first = min(failure.timestamp for failure in error.failures.values())
        for rank, failure in error.failures.items():
            if failure.timestamp > first + _SAME_SECONDS:
                continue  # torchrun has killed it, because of the first
            code = failure.exitcode
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            outcome.tell(rank, outcome.FAILED, error=f"rank {rank} died: {how}")
            line = f"neftune-dist: rank {rank} on {socket.gethostname()} died: {how}"
            print(line, file=sys.stderr, flush=True)
        return outcome.EXIT_FAILED
    return outcome.EXIT_DONE


def _leave(rank: int) -> None:
    outcome.tell(rank, outcome.STOPPED)
    sys.exit(outcome.EXIT_DONE)


def _set_environment(folder: Path, num_processes: int) -> None:
    """Set the variables that torch and NCCL need, unless the user has set them."""
    defaults = {
        "OMP_NUM_THREADS": str(max(1, int(cgroups.num_cores()) // num_processes)),
        # torchrun passes SIGTERM on to the ranks and must not kill them while they save.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3600",
        # What was under way, when a collective hangs.
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": str(folder / "nccl_rank_"),
        # torchrun on the other nodes would report, at length, that the first one left before them.
        "LOGLEVEL": "CRITICAL",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONFAULTHANDLER": "1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def num_gpus() -> int:
    """GPUs that this process may use, found without torch: what Slurm says, or the driver."""
    if "SLURM_GPUS_ON_NODE" in os.environ:
        return environment.number("SLURM_GPUS_ON_NODE", 0)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    if visible is None:
        return present
    return min(present, len([index for index in visible.split(",") if index.strip()]))

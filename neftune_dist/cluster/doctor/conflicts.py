"""Known conflicts between the programs of one machine: how to see each, and how to fix it.

The source of each entry is the code or the issue threads of the packages that it names.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from neftune_dist.cluster.doctor.findings import OK, WARNING, WRONG, Finding, error_text
from neftune_dist.cluster.doctor.software import nccl_version


@dataclass(frozen=True)
class Conflict:
    """A known conflict.

    Attributes:
        check, status, fix: of its finding.
        found: returns the observation, or nothing where there is no such conflict.
    """

    check: str
    status: str
    found: Callable[[], str]
    fix: str


def check_conflicts() -> Iterator[Finding]:
    """Every known conflict that this machine has."""
    num_found = 0
    for conflict in CONFLICTS:
        try:
            seen = conflict.found()
        except ImportError:  # `check_imports` says it
            continue
        except Exception as error:
            seen = error_text(error)
        if seen:
            num_found += 1
            yield Finding(conflict.status, conflict.check, seen, conflict.fix)
    if not num_found:
        yield Finding(OK, "conflicts", f"none of the {len(CONFLICTS)} known")


def _nccl_packages() -> dict[str, str]:
    installed = {str(package.metadata["Name"]): package.version for package in distributions()}
    return {n: version for n, version in installed.items() if re.match(r"nvidia-nccl-cu\d+$", n)}


def _two_nccls() -> str:
    # They are one file, nvidia/nccl/lib/libnccl.so.2: the one installed last wins.
    packages = _nccl_packages()
    return " and ".join(packages) + " overwrite each other" if len(packages) > 1 else ""


def _shadowed_nccl() -> str:
    import torch

    packages = _nccl_packages()
    if not torch.version.cuda or len(packages) != 1:
        return ""
    ((package, wanted),) = packages.items()
    found = nccl_version()
    if wanted.split(".")[:3] == found.split(".")[:3]:
        return ""
    return f"NCCL {found} is loaded instead of {package} {wanted}"


def _no_cxx() -> str:
    command = (os.environ.get("CXX") or "c++").split()[0]
    return "" if shutil.which(command) else f"no {command} found"


def _no_triton_compiler() -> str:
    import torch

    if not torch.cuda.is_available():
        return ""
    wanted = [os.environ["CC"].split()[0]] if os.environ.get("CC") else ["gcc", "clang"]
    if not any(map(shutil.which, wanted)):
        return f"no {' or '.join(wanted)} found"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton does
    header = Path(sysconfig.get_paths(scheme=scheme)["include"]) / "Python.h"
    return "" if header.exists() else f"no {header}"


# Set once while debugging and forgotten since.
_SLOWING = ("CUDA_LAUNCH_BLOCKING", "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "NCCL_SHM_DISABLE")


def _slowing_variables() -> str:
    variables = [name for name in _SLOWING if os.environ.get(name, "0") != "0"]
    return ", ".join(f"{name}={os.environ[name]}" for name in variables)


def _unknown_interface() -> str:
    there = [name for _, name in socket.if_nameindex()]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = os.environ.get(variable, "")
        if not value or value.startswith("^"):  # NCCL: all but these
            continue
        nccl = variable.startswith("NCCL") and not value.startswith("=")  # names by their beginning
        for name in value.lstrip("=").split(","):
            if not any(n.startswith(name) if nccl else n == name for n in there):
                return f"{variable}={value}, but this machine has {', '.join(there)}"
    return ""


CONFLICTS = (
    Conflict("NCCL", WRONG, _two_nccls, "uninstall all of them, then install torch again"),
    Conflict("NCCL", WARNING, _shadowed_nccl, "take the other one out of LD_LIBRARY_PATH"),
    Conflict(
        "compiler",
        WARNING,
        _no_cxx,
        "torch.compile needs one on a CPU: install g++ or set CXX, or stay with "
        "model.compile=false and model.attention=auto",
    ),
    Conflict(
        "Triton",
        WRONG,
        _no_triton_compiler,
        "Triton compiles on first use: install gcc and Python's headers (python3-dev)",
    ),
    Conflict("environment", WARNING, _slowing_variables, "unset what makes a run slow"),
    Conflict(
        "environment", WRONG, _unknown_interface, "name an interface that this machine has, or none"
    ),
)

"""What is known to go wrong between the programs of one machine, as a table: seen how, mended how.

Each entry was read in the code or the issue threads of the packages it speaks of.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import socket
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import distribution, distributions
from pathlib import Path

from neftune_dist.cluster.doctor.findings import OK, WARNING, WRONG, Finding, told
from neftune_dist.cluster.doctor.software import closure, nccl_version


@dataclass(frozen=True)
class Conflict:
    """Something known to go wrong.

    Attributes:
        found: says what was seen, or nothing where the conflict is not there.
    """

    check: str
    status: str
    found: Callable[[], str]
    mend: str


def check_conflicts() -> Iterator[Finding]:
    """Every known conflict that this machine has."""
    num_found = 0
    for each in CONFLICTS:
        try:
            seen = each.found()
        except ImportError:  # `check_imports` says it
            continue
        except Exception as error:
            seen = told(error)
        if seen:
            num_found += 1
            yield Finding(each.status, each.check, seen, each.mend)
    if not num_found:
        yield Finding(OK, "conflicts", f"none of the {len(CONFLICTS)} known")


def _driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the driver, or a compatibility library in its place, can run."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(number)):
        return None
    return number.value // 1000, number.value % 1000 // 10


def _old_driver() -> str:
    # Within a major version a newer toolkit runs on an older driver.
    import torch

    driver = _driver_cuda()
    if not torch.version.cuda or not driver:
        return ""
    wanted = int(torch.version.cuda.split(".")[0])
    if driver[0] >= wanted:
        return ""
    return f"torch is built for CUDA {torch.version.cuda}, the driver's is {driver[0]}.{driver[1]}"


def _nccl_packages() -> dict[str, str]:
    names = {str(each.metadata["Name"]): each.version for each in distributions()}
    return {name: each for name, each in names.items() if re.match(r"nvidia-nccl-cu\d+$", name)}


def _two_nccls() -> str:
    # They are one file, nvidia/nccl/lib/libnccl.so.2: the last to be installed wins.
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


def _old_glibc() -> str:
    family, found = platform.libc_ver()
    if family != "glibc":
        return ""
    wanted = (0, 0)
    who = ""
    for name in closure("neftune-dist")[0]:
        wheel = distribution(name).read_text("WHEEL") or ""
        tags = re.findall(r"-manylinux_(\d+)_(\d+)_", wheel)
        # A wheel with several tags is satisfied by the oldest of them.
        least = min(((int(a), int(b)) for a, b in tags), default=(0, 0))
        if least > wanted:
            wanted, who = least, name
    if tuple(map(int, found.split(".")[:2])) >= wanted:
        return ""
    return f"{who} is built for glibc {wanted[0]}.{wanted[1]}, found {found}"


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
            if not any(each.startswith(name) if nccl else each == name for each in there):
                return f"{variable}={value}, but this machine has {', '.join(there)}"
    return ""


CONFLICTS = (
    Conflict(
        "driver",
        WRONG,
        _old_driver,
        "install the torch build for the driver's CUDA, or a newer driver",
    ),
    Conflict("NCCL", WRONG, _two_nccls, "uninstall all of them, then install torch anew"),
    Conflict("NCCL", WARNING, _shadowed_nccl, "take the other one out of LD_LIBRARY_PATH"),
    Conflict(
        "glibc", WRONG, _old_glibc, "use an image, or install on this machine, not on a newer one"
    ),
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

"""The programs of one machine: their versions, whether they fit each other, whether they load.

Torch and the like are imported inside the checks, so that a broken one is a finding, too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import distributions, requires
from importlib.util import find_spec
from pathlib import Path

from neftune_dist.cluster.doctor.findings import OK, WARNING, WRONG, Finding, Site, check, named
from neftune_dist.system.compilers import missing_compiler
from neftune_dist.system.versions import versions as system_versions

# By a run, or by transformers where they are installed.
_IMPORTED = ("torch", "transformers.models.llama.modeling_llama", "deepspeed", "datasets")
_IMPORTED_IF_THERE = ("flash_attn", "torchvision")
_PIP_CHECK = ("-m", "pip", "check")
_IMPORT_SECONDS, _PIP_SECONDS, _NVIDIA_SMI_SECONDS = 100.0, 60.0, 20.0
# Other versions of all else on another machine can train another model, or not talk to each other.
_MAY_DIFFER = {"python", "datasets", "driver"}
# Set once while debugging and forgotten since.
_SLOWING = ("CUDA_LAUNCH_BLOCKING", "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "NCCL_SHM_DISABLE")


def versions() -> dict[str, str]:
    """Versions by which machines are compared, by name, without those that are not installed."""
    found = {**system_versions()}
    with suppress(Exception):  # the check of imports says why
        import torch

        if torch.version.cuda:
            found |= {"CUDA of torch": torch.version.cuda, "NCCL": _nccl_version()}
    with suppress(OSError, subprocess.SubprocessError):
        found["driver"] = nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")
    return {name: text.splitlines()[0] for name, text in found.items() if text}


def _nccl_version() -> str:
    """The version of the loaded library, which need not be the one that was installed."""
    import torch

    return ".".join(map(str, torch.cuda.nccl.version()[:3]))


def nvidia_smi(*words: str) -> str:
    """Return its output; empty where this machine has none.

    Raises:
        subprocess.SubprocessError: it failed, or did not answer in time.
    """
    if not shutil.which("nvidia-smi"):
        return ""
    done = subprocess.run(
        ["nvidia-smi", *words], capture_output=True, text=True, timeout=_NVIDIA_SMI_SECONDS
    )
    if done.returncode:
        raise subprocess.SubprocessError(f"nvidia-smi: {(done.stdout + done.stderr).strip()}")
    return done.stdout.strip()


def compare_versions(of_hosts: Mapping[str, Mapping[str, str]]) -> Iterator[Finding]:
    """Versions that are not the same on all hosts."""
    for name in dict.fromkeys(name for found in of_hosts.values() for name in found):
        hosts_by_version: dict[str, list[str]] = {}
        for host, found in of_hosts.items():
            hosts_by_version.setdefault(found.get(name, "none"), []).append(host)
        if len(hosts_by_version) > 1:
            rows = [f"{text} on {named(hosts)}" for text, hosts in hosts_by_version.items()]
            fix = "use one environment (and one driver) on all hosts: a shared disk, or one image"
            status = WARNING if name in _MAY_DIFFER else WRONG
            yield Finding(status, f"{name} differs", "; ".join(rows), fix)


@check("versions")
def check_versions(site: Site) -> Iterator[tuple[str, str]]:
    """Show all versions in one row, and keep them for the comparison of hosts."""
    site.versions.update(versions())
    yield OK, ", ".join(f"{name} {text}" for name, text in site.versions.items())


@check("requirements", "install the version that is needed, or uninstall what needs it")
def check_requirements(site: Site) -> Iterator[tuple[str, str]]:
    """Run `pip check`; leave out packages that have nothing to do with those of a run."""
    command = [sys.executable, *_PIP_CHECK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_SECONDS)
    if "No module named pip" in done.stderr:
        yield OK, "not checked: this environment has no pip"
        return
    needed = [text for text in requires("neftune-dist") or () if "extra ==" not in text]
    core = {"neftune-dist"}
    core |= {re.split(r"[^\w.-]", text)[0].lower().replace("_", "-") for text in needed}
    wrong = False
    for line in done.stdout.splitlines():
        package, *words = re.findall(r"[\w.-]*\w", line.lower())
        wrong = wrong or package in core
        if package in core or core & {*words}:
            yield WRONG if package in core else WARNING, line.rstrip(".")
    if not wrong:
        yield OK, f"{len(core) - 1} packages are installed and fit each other"


@check("imports", "install a build of it for this torch, or uninstall it where it is optional")
def check_imports(site: Site) -> Iterator[tuple[str, str]]:
    """Import the libraries of a run, each in a process that a broken one may crash or hang."""
    names = [*_IMPORTED, *filter(find_spec, _IMPORTED_IF_THERE)]
    broken = False
    for name in names:
        command = [sys.executable, "-c", f"import {name}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_SECONDS)
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            problem = lines[-1] if done.returncode else ""
        except subprocess.TimeoutExpired:
            problem = f"it took more than {_IMPORT_SECONDS:.0f} seconds"
        if problem:
            broken = True
            yield WRONG, f"{name} cannot be imported: {problem}"
    if not broken:
        yield OK, ", ".join(name.split(".")[0] for name in names)


# Known conflicts, each from the code or the issue threads of the packages that it names.


@check("NCCL", "uninstall all NCCL packages, install torch again; see LD_LIBRARY_PATH")
def check_nccl(site: Site) -> Iterator[tuple[str, str]]:
    """Find two packages that overwrite each other, or a library that is not the package's."""
    import torch

    installed = {str(package.metadata["Name"]): package.version for package in distributions()}
    packages = [name for name in installed if re.fullmatch(r"nvidia-nccl-cu\d+", name)]
    if len(packages) > 1:  # one file, nvidia/nccl/lib/libnccl.so.2: the one installed last wins
        yield WRONG, f"{' and '.join(packages)} overwrite each other"
    elif packages and torch.version.cuda:
        wanted, found = installed[packages[0]], _nccl_version()
        if wanted.split(".")[:3] != found.split(".")[:3]:
            yield WARNING, f"NCCL {found} is loaded instead of {packages[0]} {wanted}"


@check("compiler", "install gcc, g++ and python3-dev, or set CC and CXX; model.compile needs them")
def check_compiler(site: Site) -> Iterator[tuple[str, str]]:
    """Find Triton's compiler on a GPU, where it is used first of all, torch.compile's on a CPU."""
    import torch

    on_gpu = torch.cuda.is_available()
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton does
    header = Path(sysconfig.get_paths(scheme=scheme)["include"]) / "Python.h"
    if missing := missing_compiler(on_gpu):
        yield WRONG if on_gpu else WARNING, f"{missing} is not found"
    elif on_gpu and not header.exists():
        yield WRONG, f"no {header}"


@check("environment", "unset the variables that make a run slow")
def check_slowing(site: Site) -> Iterator[tuple[str, str]]:
    """Find variables that were set for debugging."""
    variables = [name for name in _SLOWING if os.environ.get(name, "0") != "0"]
    if variables:
        yield WARNING, ", ".join(f"{name}={os.environ[name]}" for name in variables)

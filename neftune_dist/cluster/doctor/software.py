"""The programs of one machine: their versions, whether they fit each other, whether they load.

Torch and the like are imported inside the checks, so that a broken one is a finding, too.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path
from typing import TYPE_CHECKING

import neftune_dist
from neftune_dist.cluster.doctor.findings import OK, WARNING, WRONG, Finding, named

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_NAMED = ("torch", "transformers", "deepspeed", "datasets")
# By a run, or by transformers where they are installed.
_IMPORTED = ("torch", "transformers.models.llama.modeling_llama", "deepspeed", "datasets")
_IMPORTED_IF_THERE = {"flash-attn": "flash_attn", "torchvision": "torchvision"}
_IMPORT_SECONDS = 100.0
_SLOW_IMPORT_SECONDS = 60.0
_IMPORTER = """
import importlib, sys
for name in sys.argv[1:]:
    problem = ""
    try:
        importlib.import_module(name)
    except BaseException as error:
        lines = str(error).strip().splitlines()
        problem = f"{type(error).__name__}: {lines[0] if lines else ''}"
    print(f"\\ndoctor:{name}:{problem}", flush=True)
"""
_NVIDIA_SMI_SECONDS = 20.0
# Other versions of these on another machine can train another model, or not talk to each other.
_MUST_AGREE = {"neftune-dist", "torch", "CUDA of torch", "NCCL", "transformers", "deepspeed"}


def versions() -> dict[str, str]:
    """Versions by which machines are compared, by name, without those that are not installed."""
    found = {"neftune-dist": f"{neftune_dist.__version__} ({_sources()})"}
    found["python"] = platform.python_version()
    for name in _NAMED:
        with suppress(PackageNotFoundError):
            found[name] = distribution(name).version
    try:
        import torch
    except Exception:  # `check_imports` says why
        return found
    found["torch"] = torch.__version__
    if torch.version.cuda:
        found["CUDA of torch"] = torch.version.cuda
        found["NCCL"] = nccl_version()
    with suppress(OSError, subprocess.SubprocessError):
        driver = nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader").splitlines()
        found |= {"driver": driver[0]} if driver else {}
    return found


def nccl_version() -> str:
    """The version of the loaded library, which need not be the one that was installed."""
    import torch

    return ".".join(map(str, torch.cuda.nccl.version()[:3]))


def _sources() -> str:
    """A digest of this package's source files: tells uncommitted edits apart as well."""
    folder = Path(neftune_dist.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:8]


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
        lines = (done.stdout + done.stderr).strip().splitlines()
        raise subprocess.SubprocessError(lines[0] if lines else f"exit code {done.returncode}")
    return done.stdout.strip()


def check_versions(found: Mapping[str, str]) -> Iterator[Finding]:
    """All versions in one row."""
    yield Finding(OK, "versions", ", ".join(f"{name} {text}" for name, text in found.items()))


def compare_versions(of_hosts: Mapping[str, Mapping[str, str]]) -> Iterator[Finding]:
    """Versions that are not the same on all hosts."""
    for name in dict.fromkeys(name for found in of_hosts.values() for name in found):
        hosts_by_version: dict[str, list[str]] = {}
        for host, found in of_hosts.items():
            hosts_by_version.setdefault(found.get(name, "none"), []).append(host)
        if len(hosts_by_version) == 1:
            continue
        rows = [f"{version} on {named(hosts)}" for version, hosts in hosts_by_version.items()]
        fix = "use one environment on all hosts, such as one on a shared file system or one image"
        if name == "driver":
            fix = "have the same driver installed on all hosts"
        status = WRONG if name in _MUST_AGREE else WARNING
        yield Finding(status, f"{name} differs", "; ".join(rows), fix)


def check_requirements() -> Iterator[Finding]:
    """Whether the packages that neftune-dist requires are there, and fit each other and the rest.

    As `pip check` does, but without pip, which not every environment has, and without the packages
    that have nothing to do with these.
    """
    from packaging.utils import canonicalize_name

    # Of two copies the first on the path is the one in use.
    installed = {canonicalize_name(d.metadata["Name"] or ""): d for d in [*distributions()][::-1]}
    ours = installed.get(canonicalize_name("neftune-dist"))
    core = {canonicalize_name(needed.name) for needed in _requirements(ours)} if ours else set()
    num_wrong = 0
    for name, package in installed.items():
        for requirement in _requirements(package):
            wanted = canonicalize_name(requirement.name)
            found = installed[wanted].version if wanted in installed else "none"
            is_core = name in core or package is ours
            if wanted in installed and requirement.specifier.contains(found, prereleases=True):
                continue
            who = f"{package.metadata['Name']} {package.version}"
            seen = f"{who} needs {requirement.name}{requirement.specifier}, found {found}"
            if is_core:
                num_wrong += 1
                yield Finding(WRONG, "requirements", seen, f'install "{requirement}"')
            elif wanted in core and wanted in installed:
                fix = f"uninstall {name}, or install the version that fits {wanted} {found}"
                yield Finding(WARNING, "requirements", seen, fix)
    if not num_wrong:
        yield Finding(OK, "requirements", f"{len(core)} packages are there and fit each other")


def _requirements(package: Distribution) -> Iterator[Requirement]:
    """The requirements of an installed package without extras."""
    from packaging.requirements import InvalidRequirement, Requirement

    for text in package.requires or ():
        with suppress(InvalidRequirement):  # of a package older than the syntax
            requirement = Requirement(text)
            if not requirement.marker or requirement.marker.evaluate({"extra": ""}):
                yield requirement


def check_imports() -> Iterator[Finding]:
    """Whether another process can import the libraries of a run, and how long that takes."""
    names = dict.fromkeys(_IMPORTED, "")
    for package, name in _IMPORTED_IF_THERE.items():
        with suppress(PackageNotFoundError):
            distribution(package)
            names[name] = package
    began = time.monotonic()
    problems = _import_problems(list(names))
    seconds = time.monotonic() - began
    for name, problem in problems.items():
        fix = f"install {name.split('.')[0]} again"
        if names[name]:
            fix = f"uninstall {names[name]}, or install a build of it for this torch"
        yield Finding(WRONG, "imports", f"{name} cannot be imported: {problem}", fix)
    if not problems:
        slow = seconds > _SLOW_IMPORT_SECONDS
        seen = f"{', '.join(name.split('.')[0] for name in names)} in {seconds:.0f} seconds"
        fix = "put the environment on a local disk, or into an image"
        yield Finding(WARNING if slow else OK, "imports", seen, fix)


def _import_problems(names: list[str]) -> dict[str, str]:
    """Why some of `names` cannot be imported."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _IMPORTER, *names],
            capture_output=True,
            text=True,
            timeout=_IMPORT_SECONDS,
        )
        output, end = done.stdout, f"the process ended with code {done.returncode}"
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode()
        end = f"it took more than {_IMPORT_SECONDS:.0f} seconds"
    results = dict(
        line.split(":", 2)[1:] for line in output.splitlines() if line.startswith("doctor:")
    )
    problems = {name: problem for name, problem in results.items() if problem}
    last = next((name for name in names if name not in results), None)
    return problems | ({last: end} if last else {})

"""The programs of one machine: versions, what they need of each other, whether they load.

Torch and the like are imported where they are asked, so that a broken one is a finding, too.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path
from typing import TYPE_CHECKING

import neftune_dist
from neftune_dist.cluster.doctor.findings import OK, WARNING, WRONG, Finding, named

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_NAMED = ("torch", "transformers", "deepspeed", "datasets")
# Imported by a run, or by transformers where they are installed.
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
    """What machines are compared by: name and version; those that are not there are left out."""
    found = {"neftune-dist": f"{neftune_dist.__version__} ({_sources()})"}
    found["python"] = platform.python_version()
    for name in _NAMED:
        with suppress(PackageNotFoundError):
            found[name] = distribution(name).version
    try:
        import torch
    except Exception:  # whatever is wrong with it, `check_imports` says it
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
    """Of the library that is loaded, which need not be the one that was installed."""
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
    """Its output; empty where this machine has none.

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
    """All versions in one row; a row for each of the main ones that is too old or missing."""
    from packaging.requirements import Requirement

    yield Finding(OK, "versions", ", ".join(f"{name} {each}" for name, each in found.items()))
    us = distribution("neftune-dist")
    needed = {r.name: str(r.specifier) for r in map(Requirement, us.requires or ())}
    needed["python"] = us.metadata["Requires-Python"] or ""
    for name in ("python", *_NAMED):
        requirement = Requirement(f"{name}{needed[name]}")
        if name not in found or not _satisfies(requirement, found[name]):
            seen = f"{found.get(name, 'not installed')} ({requirement.specifier} is needed)"
            yield Finding(WRONG, name, seen, f'install "{requirement}"')


def compare_versions(of_hosts: Mapping[str, Mapping[str, str]]) -> Iterator[Finding]:
    """Versions that are not the same on all hosts."""
    for name in dict.fromkeys(name for found in of_hosts.values() for name in found):
        hosts_by_version: dict[str, list[str]] = {}
        for host, found in of_hosts.items():
            hosts_by_version.setdefault(found.get(name, "none"), []).append(host)
        if len(hosts_by_version) > 1:
            seen = "; ".join(
                f"{each} on {named(hosts)}" for each, hosts in hosts_by_version.items()
            )
            status = WRONG if name in _MUST_AGREE else WARNING
            what = "the same driver" if name == "driver" else "one environment"
            mend = f"use {what} on all hosts, one from a shared file system or one image, say"
            mend = mend if name != "driver" else "have the same driver installed on all hosts"
            yield Finding(status, f"{name} differs", seen, mend)


def check_requirements() -> Iterator[Finding]:
    """Whether all that neftune-dist needs, and what that needs in turn, satisfies each other; and
    whether other installed packages want another version of one of these."""
    from packaging.utils import canonicalize_name

    ours, unmet = closure("neftune-dist")
    for who, requirement, version in unmet:
        seen = f"{who} needs {requirement.name}{requirement.specifier}, found {version or 'none'}"
        yield Finding(WRONG, "requirements", seen, f'install "{requirement}"')
    for package in _others(ours):
        name = package.metadata["Name"]
        for requirement in _requirements(package, set()):
            found = ours.get(canonicalize_name(requirement.name))
            if found is not None and not _satisfies(requirement, found):
                needs = f"{requirement.name}{requirement.specifier}"
                seen = f"{name} {package.version} needs {needs}, found {found}"
                mend = (
                    f"uninstall {name}, or install the version that fits {requirement.name} {found}"
                )
                yield Finding(WARNING, "requirements", seen, mend)
    if not unmet:
        yield Finding(OK, "requirements", f"{len(ours)} packages satisfy each other")


def closure(root: str) -> tuple[dict[str, str], list[tuple[str, Requirement, str]]]:
    """Canonical name and version of all that `root` needs; and (who, needs what, found) unmet."""
    from packaging.utils import canonicalize_name

    versions_by_name: dict[str, str] = {}
    unmet: list[tuple[str, Requirement, str]] = []
    waiting: list[tuple[str, frozenset[str]]] = [(canonicalize_name(root), frozenset())]
    seen = set(waiting)
    while waiting:
        name, extras = waiting.pop()
        package = distribution(name)
        versions_by_name[name] = package.version
        for requirement in _requirements(package, set(extras)):
            try:
                found = distribution(requirement.name).version
            except PackageNotFoundError:
                found = ""
            if not found or not _satisfies(requirement, found):
                unmet.append((f"{package.metadata['Name']} {package.version}", requirement, found))
            entry = (canonicalize_name(requirement.name), frozenset(requirement.extras))
            if found and entry not in seen:
                seen.add(entry)
                waiting.append(entry)
    return versions_by_name, unmet


def _others(closure: Iterable[str]) -> Iterator[Distribution]:
    from packaging.utils import canonicalize_name

    seen = set(closure)
    for each in distributions():
        name = canonicalize_name(each.metadata["Name"] or "")
        if name and name not in seen:  # of two copies the first on the path is the one in use
            seen.add(name)
            yield each


def _requirements(package: Distribution, extras: set[str]) -> Iterator[Requirement]:
    from packaging.requirements import InvalidRequirement, Requirement

    for text in package.requires or ():
        try:
            requirement = Requirement(text)
        except InvalidRequirement:  # of a package older than the syntax
            continue
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras | {""}):
            yield requirement


def _satisfies(requirement: Requirement, found: str) -> bool:
    return requirement.specifier.contains(found, prereleases=True)


def check_imports() -> Iterator[Finding]:
    """Whether what a run imports can be imported, in a process of its own, and in what time."""
    names = dict.fromkeys(_IMPORTED, "")
    for package, name in _IMPORTED_IF_THERE.items():
        with suppress(PackageNotFoundError):
            distribution(package)
            names[name] = package
    began = time.monotonic()
    problems = _import_problems(list(names))
    seconds = time.monotonic() - began
    for name, problem in problems.items():
        mend = f"install {name.split('.')[0]} anew"
        if names[name]:
            mend = f"uninstall {names[name]}, or install a build of it for this torch"
        yield Finding(WRONG, "imports", f"{name} cannot be imported: {problem}", mend)
    if not problems:
        slow = seconds > _SLOW_IMPORT_SECONDS
        seen = f"{', '.join(name.split('.')[0] for name in names)} in {seconds:.0f} seconds"
        mend = "put the environment on a local disk, or into an image"
        yield Finding(WARNING if slow else OK, "imports", seen, mend)


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
    told = dict(
        line.split(":", 2)[1:] for line in output.splitlines() if line.startswith("doctor:")
    )
    problems = {name: problem for name, problem in told.items() if problem}
    last = next((name for name in names if name not in told), None)
    return problems | ({last: end} if last else {})

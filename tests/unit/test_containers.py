"""The container recipes, as far as they can be checked without an engine; site.sh's branches."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKER = (ROOT / "slurm" / "Dockerfile").read_text()
APPTAINER = (ROOT / "slurm" / "apptainer.def").read_text()


def instructions(text: str) -> list[str]:
    """A recipe's instructions without comments, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return [line.strip() for line in "\n".join(lines).replace("\\\n", "").splitlines() if line]


def section(name: str) -> list[str]:
    """The lines of a section of apptainer.def."""
    found = re.search(rf"^%{name}\n(.*?)(?=^%|\Z)", APPTAINER, re.MULTILINE | re.DOTALL)
    assert found
    return instructions(found[1])


def docker_copies() -> list[str]:
    words = [line.split()[1:-1] for line in instructions(DOCKER) if line.startswith("COPY ")]
    return [source for sources in words for source in sources]


def apptainer_copies() -> list[str]:
    return [line.split()[0] for line in section("files")]


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    split = [line.split("==") for line in lines if "==" in line]
    return {canonicalize_name(name): Version(version) for name, version in split}


def test_every_copied_file_exists_and_all_that_the_package_is_made_of_is_copied() -> None:
    needed = {"pyproject.toml", "constraints.txt", PROJECT["readme"], *PROJECT["license-files"]}
    links = (ROOT / "neftune_dist" / "shipped").iterdir()
    needed |= {"neftune_dist", *(str(link.resolve().relative_to(ROOT)) for link in links)}
    for copies in (docker_copies(), apptainer_copies()):
        assert set(copies) == needed
        assert all((ROOT / name).exists() for name in copies)


def test_both_recipes_do_the_same_on_a_python_that_the_package_takes() -> None:
    [base] = [line.split()[1] for line in instructions(DOCKER) if line.startswith("FROM ")]
    assert f"From: {base}" in APPTAINER
    version = re.match(r"python:(\d+\.\d+)-", base)
    assert version and version[1] in SpecifierSet(PROJECT["requires-python"])
    assert f"Programming Language :: Python :: {version[1]}" in PROJECT["classifiers"]
    runs = [line.removeprefix("RUN ") for line in instructions(DOCKER) if line.startswith("RUN ")]
    steps = [" ".join(step.split()) for line in runs for step in line.split("&&")]
    post = [" ".join(line.split()) for line in section("post")]
    assert [line for line in post if not line.startswith("cd ")] == steps


def test_torch_is_installed_first_and_all_else_is_pinned() -> None:
    installs = [line for line in section("post") if line.startswith("pip install")]
    assert "'^torch==' constraints.txt" in installs[0] and len(installs) == 2
    found = re.search(r"\.\[(.*)\]", installs[1])
    assert found and "--constraint" in installs[1]
    extras = found[1].split(",")
    wanted = [*PROJECT["dependencies"]]
    wanted += [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    for line in wanted:
        requirement = Requirement(line)
        assert pins()[canonicalize_name(requirement.name)] in requirement.specifier, line


@pytest.mark.parametrize("file", ["Dockerfile", "apptainer.def"])
def test_recipe_says_that_it_was_never_built(file: str) -> None:
    """To be dropped, with the sentence, when somebody has built it."""
    assert "Nobody has built it yet" in (ROOT / "slurm" / file).read_text()


@pytest.mark.parametrize(
    ("image", "shown"),
    [
        ("", "||"),
        (
            "/i/neftune.sif",
            "|apptainer exec --nv --bind {here}:{here} --pwd {here} /i/neftune.sif|python3",
        ),
        (
            "/i/neftune.sqsh",
            "--container-image=/i/neftune.sqsh --container-mounts={here}:{here} "
            "--container-workdir={here}||python3",
        ),
    ],
)
def test_site_names_the_image_to_apptainer_or_to_pyxis(
    image: str, shown: str, tmp_path: Path
) -> None:
    text = (ROOT / "slurm" / "site.sh").read_text()
    assert text.count("# image=/images/neftune.sif") == 1
    edited = text.replace("# image=/images/neftune.sif", f"image={image}" if image else "")
    (tmp_path / "site.sh").write_text(edited)
    names = "SRUN_OPTIONS", "CONTAINER", "PYTHON"
    shows = "|".join(f"${{NEFTUNE_DIST_{name}:-}}" for name in names)
    program = f'set -euo pipefail; . ./site.sh; echo "{shows}"'
    done = subprocess.run(
        ["bash", "-c", program], cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True
    )
    assert done.returncode == 0 and done.stdout.decode() == shown.format(here=tmp_path) + "\n"


def test_site_refuses_another_kind_of_image(tmp_path: Path) -> None:
    text = (
        (ROOT / "slurm" / "site.sh").read_text().replace("# image=/images/neftune.sif", "image=x")
    )
    (tmp_path / "site.sh").write_text(text)
    done = subprocess.run(["bash", "-c", ". ./site.sh"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1

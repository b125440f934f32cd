"""The wheel, installed outside the checkout and without the optional packages."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_model import environment, make_config

ROOT = Path(__file__).parents[2]
# Without them FSDP2 trains, and the hook and the callback can be imported.
_ABSENT = ("deepspeed", "accelerate", "matplotlib", "markdown", "trl", "peft")
# Neither their modules nor their metadata are found.
_ABSENCE = """import sys
from importlib.metadata import Distribution, PackageNotFoundError
sys.modules.update(dict.fromkeys({names}))
of_all = Distribution.from_name
def from_name(name):
    if name in {names}:
        raise PackageNotFoundError(name)
    return of_all(name)
Distribution.from_name = from_name
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel, in which `_ABSENT` cannot be imported."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    # From a copy: setuptools leaves a folder build/ beside its sources, and packs what lies there.
    source = folder / "source"
    for name in ("neftune_dist", "configs", "slurm"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = ["wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)]
    subprocess.run([*pip, *build], check=True, timeout=120)
    [wheel] = folder.glob("*.whl")
    target = folder / "site"
    install = ["install", "-q", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run([*pip, *install], check=True, timeout=120)
    (target / "sitecustomize.py").write_text(_ABSENCE.format(names=_ABSENT))
    return target


def run(site: Path, folder: Path, *words: object, code: int = 0) -> str:
    """What a command prints, standard output first."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env=environment(PYTHONPATH=str(site)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_wheel_holds_what_it_prints_and_starts_from(site: Path, tmp_path: Path) -> None:
    verb = ("-m", "neftune_dist")
    where = run(site, tmp_path, "-c", "import neftune_dist; print(neftune_dist.__file__)")
    assert where.startswith(str(site))
    assert "noise.alpha=5.0" in run(site, tmp_path, *verb, "config", "noise.alpha")
    run(site, tmp_path, *verb, "init", "--slurm")
    assert (tmp_path / "slurm" / "train.sbatch").exists()
    run(site, tmp_path, *verb, "init", "sharegpt-7b")
    assert "run_dir: runs/sharegpt-7b" in (tmp_path / "sharegpt-7b.yaml").read_text()


def test_fsdp2_trains_without_deepspeed(site: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, train={"max_steps": 2, "global_batch_size": 4})
    run(site, tmp_path, "-m", "neftune_dist", "train", config, "run_dir=run")
    assert (tmp_path / "run" / "checkpoints" / "latest").exists()


def test_missing_engine_is_one_sentence_before_anything_begins(site: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, train={"max_steps": 2})
    words = ("-m", "neftune_dist", "train", config, "run_dir=run", "engine.name=deepspeed")
    said = run(site, tmp_path, *words, code=2)
    assert "engine.name=deepspeed needs the package deepspeed: pip install 'deepspeed'." in said
    assert "Traceback" not in said and not (tmp_path / "run").exists()


def test_study_without_its_packages_is_one_sentence(site: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path)
    said = run(site, tmp_path, "-m", "neftune_dist", "study", config, "run_dir=study", code=2)
    assert "needs the package matplotlib: pip install 'neftune-dist[reports]'" in said
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("peft", ["", "for n in ('peft', 'trl'): del sys.modules[n]\n"])
def test_hook_and_callback_are_imported_without_accelerate(
    peft: str, site: Path, tmp_path: Path
) -> None:
    """PEFT, which transformers imports where it is installed, itself imports accelerate."""
    program = (
        f"import sys\n{peft}"
        "from neftune_dist import NEFTune, NEFTuneCallback\n"
        "NEFTune(5.0)\n"
        "try: NEFTuneCallback(5.0)\n"
        "except ImportError as error: print(error)\n"
    )
    said = run(site, tmp_path, "-c", program)
    assert "NEFTuneCallback needs accelerate" in said and "neftune-dist[trl]" in said

"""What a command may overwrite: its own, and nothing else, wherever it is sent and however it ends.

Faults are put into the operations on files themselves, by an audit hook: every one of them fails
once for want of room, and at every one of them the process dies once.
"""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from neftune_dist.checkpoint import marked_folder
from neftune_dist.checkpoint.export import MARK, export
from neftune_dist.checkpoint.run_files import keep_small_files, keep_template
from neftune_dist.config import UserError, read_json, with_checksum
from neftune_dist.distributed.signals import StopSignal
from neftune_dist.evaluation.evaluate import evaluate
from neftune_dist.system import storage
from tests.support import tiny_model

PARTS = ("evaluate.instructions=held_out", "evaluate.max_instructions=2")
WORDS = (*PARTS, "evaluate.max_new_tokens=4", "evaluate.train_documents=2")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("overwrite")
    config = tiny_model.make_config(folder, train={"max_steps": 1})
    tiny_model.train(config, folder / "run")
    return folder / "run"


def quiet_export(run_dir: Path, output: Path | None, **options: Any) -> Path:
    return export(run_dir, output, log=lambda _: None, **options)


def snapshot(root: Path) -> dict[str, tuple[int, str]]:
    """Every entry below a folder, and the folder: mode and content, or target."""

    def content(path: Path) -> str:
        if path.is_symlink():
            return str(path.readlink())
        return path.read_bytes().hex() if path.is_file() else ""

    found = [root, *root.rglob("*")] if root.is_dir() else [root]
    return {str(path): (path.lstat().st_mode, content(path)) for path in found}


def is_whole(folder: Path, dtype: str) -> bool:
    """Whether an export is there as it was written, in that dtype, and nothing else with it."""
    try:
        marked_folder.refuse_other(folder, MARK)
        listed = json.loads((folder / MARK).read_text())["files"]
    except (UserError, OSError):
        return False
    complete = listed and all((folder / name).is_file() for name in listed)
    return bool(complete) and dtypes(folder) == {f"torch.{dtype}"}


def dtypes(folder: Path) -> set[str]:
    """Of the configuration and of the weights."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = list(file.keys())
        found = {str(file.get_tensor(name).dtype) for name in names}
    return found | {f"torch.{json.loads((folder / 'config.json').read_text())['dtype']}"}


# ----- wrong places -------------------------------------------------------------------------------
# Each makes a place below a folder that holds a copy of the run, and returns what is given as
# --output, and the working directory.


def project(at: Path) -> tuple[object, Path]:
    (at / "project").mkdir()
    for name in ("config.json", "thesis.txt"):
        (at / "project" / name).write_text("mine")
    return at / "project", at


def project_from_below(at: Path) -> tuple[object, Path]:
    project(at)
    (at / "project" / "sub").mkdir()
    return "..", at / "project" / "sub"


def working_directory(at: Path) -> tuple[object, Path]:
    project(at)
    return ".", at / "project"


def working_directory_by_another_name(at: Path) -> tuple[object, Path]:
    project(at)
    return "./", at / "project"


def export_as_working_directory(at: Path) -> tuple[object, Path]:
    return ".", quiet_export(at / "run", at / "exported")


def root(at: Path) -> tuple[object, Path]:
    return "/", at


def base_model(at: Path) -> tuple[object, Path]:
    return at / "model", at


def base_model_that_is_an_export(at: Path) -> tuple[object, Path]:
    quiet_export(at / "run", at / "exported")
    shutil.rmtree(at / "model")
    (at / "exported").rename(at / "model")
    return at / "model", at


def run_itself(at: Path) -> tuple[object, Path]:
    return at / "run", at


def above_the_run(at: Path) -> tuple[object, Path]:
    (at / "config.json").write_text("mine")
    return at, at / "model"


def checkpoint(at: Path) -> tuple[object, Path]:
    return at / "run" / "checkpoints" / "step_00000001", at


def new_among_checkpoints(at: Path) -> tuple[object, Path]:
    return at / "run" / "checkpoints" / "export", at


def model_files_of_the_run(at: Path) -> tuple[object, Path]:
    return at / "run" / "model", at


def exported_with(change: Callable[[Path], object]) -> Callable[[Path], tuple[object, Path]]:
    def make(at: Path) -> tuple[object, Path]:
        change(quiet_export(at / "run", at / "exported"))
        return at / "exported", at

    return make


def forge(folder: Path) -> None:
    listed = {"../thesis.txt": {"size": 4, "xxh3": ""}}
    (folder.parent / "thesis.txt").write_text("mine")
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / MARK).write_text(json.dumps({"made_by": "neftune_dist", "files": listed}))


def plain_file(at: Path) -> tuple[object, Path]:
    (at / "thesis.txt").write_text("mine")
    return at / "thesis.txt", at


def below_a_file(at: Path) -> tuple[object, Path]:
    (at / "thesis.txt").write_text("mine")
    return at / "thesis.txt" / "export", at


def empty_folder(at: Path) -> tuple[object, Path]:
    (at / "empty").mkdir()
    return at / "empty", at


def link_to_a_project(at: Path) -> tuple[object, Path]:
    (at / "link").symlink_to(project(at)[0].__fspath__())  # type: ignore[attr-defined]
    return at / "link", at


def link_to_the_base_model(at: Path) -> tuple[object, Path]:
    (at / "link").symlink_to(at / "model")
    return at / "link", at


def link_to_itself(at: Path) -> tuple[object, Path]:
    (at / "link").symlink_to("link")
    return at / "link", at


PLACES: dict[str, Callable[[Path], tuple[object, Path]]] = {
    case.__name__: case
    for case in (
        *(project, project_from_below, working_directory, working_directory_by_another_name),
        *(export_as_working_directory, root, base_model, base_model_that_is_an_export),
        *(run_itself, above_the_run, checkpoint, new_among_checkpoints, model_files_of_the_run),
        *(plain_file, below_a_file, empty_folder),
        *(link_to_a_project, link_to_the_base_model, link_to_itself),
    )
} | {
    "export_and_a_file": exported_with(lambda e: (e / "thesis.txt").write_text("mine")),
    "export_and_a_folder": exported_with(lambda e: (e / ".git").mkdir()),
    "export_and_a_link": exported_with(lambda e: (e / "data").symlink_to("..")),
    "export_with_a_card_rewritten": exported_with(lambda e: (e / "README.md").write_text("mine")),
    "export_with_weights_trained_on": exported_with(
        lambda e: (e / "model.safetensors").write_bytes(
            (e / "model.safetensors").read_bytes()[:-1] + b"\x7f"
        )
    ),
    "export_of_an_earlier_version": exported_with(lambda e: (e / MARK).unlink()),
    "forged_mark": exported_with(forge),
}


@pytest.fixture
def copy(run_dir: Path, tmp_path: Path) -> Path:
    """A folder with the base model and the run, which names it."""
    at = tmp_path / "at"
    at.mkdir()
    for name in ("model", "run"):
        shutil.copytree(run_dir.parent / name, at / name)
    for file in (at / "run" / "checkpoints").glob("step_*/trainer_state.json"):
        text = file.read_text().replace(str(run_dir.parent), str(at))
        old = marked_folder.WrittenFile.of(file)
        file.write_text(text)
        manifest = file.with_name("manifest.json")
        new = marked_folder.WrittenFile.of(file)
        content = read_json(manifest)
        content["files"][file.name] = vars(new)
        assert vars(old) != vars(new)
        manifest.write_text(json.dumps(with_checksum(content)))
    return at


@pytest.mark.parametrize("place", PLACES)
def test_wrong_place_for_an_export_stays_as_it_is(
    place: str, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, working_directory = PLACES[place](copy)
    monkeypatch.chdir(working_directory)
    before = snapshot(copy)
    with pytest.raises(UserError) as raised:
        quiet_export(copy / "run", Path(str(output)))
    assert re.search(r"(another( one)?|remove this one|written: [\w ]+)\.$", str(raised.value))
    assert snapshot(copy) == before


def test_command_refuses_a_wrong_place_in_one_sentence(copy: Path) -> None:
    before = snapshot(copy)
    words = ("export", copy / "run", "--output", ".")
    done = tiny_model.run_forked(*words, before=partial(os.chdir, copy / "model"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("neftune-dist: --output=") and done.stderr.count("\n") == 1
    assert snapshot(copy) == before


def test_earlier_export_is_replaced_through_a_link_too(copy: Path) -> None:
    for name in ("exported", "link"):
        quiet_export(copy / "run", copy / name, dtype="fp32")
        quiet_export(copy / "run", copy / name, dtype="bf16")
        assert is_whole(copy / "exported", "bfloat16")
        (copy / "link").unlink(missing_ok=True)
        (copy / "link").symlink_to("exported")
    assert sorted(path.name for path in copy.iterdir()) == ["exported", "link", "model", "run"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_exported_files_follow_the_umask(umask: int, run_dir: Path, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        output = quiet_export(run_dir, tmp_path / "e")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in output.iterdir()} == {0o666 & ~umask}


def test_run_files_follow_umask_and_are_not_executable(run_dir: Path) -> None:
    wrong = [
        path
        for path in run_dir.rglob("*")
        if path.is_file() and path.stat().st_mode & 0o777 != 0o666 & ~umask()
    ]
    assert not wrong


def umask() -> int:
    present = os.umask(0)
    os.umask(present)
    return present


# ----- folders of other commands ------------------------------------------------------------------


def test_run_directory_with_foreign_files_is_not_trained_in(copy: Path) -> None:
    """Such as where the configuration lies, a model's folder, the root of the file system."""
    config = tiny_model.make_config(copy / "project", train={"max_steps": 1})
    before = snapshot(copy)
    for folder, why in (
        (config.parent, "holds config.yaml, but no neftune_run.json"),
        (copy / "model", "holds config.json, but no neftune_run.json"),
        ("/", "is a root or home directory"),
    ):
        for verb in ("train", "launch"):
            done = tiny_model.run_forked(verb, config, f"run_dir={folder}")
            assert done.returncode == 2
            assert why in done.stderr
    assert snapshot(copy) == before


@pytest.mark.parametrize("name", ["answers.json", "answers3.jsonl", "settings.json"])
def test_folder_with_foreign_answers_is_not_evaluated_into(name: str, copy: Path) -> None:
    folder = project(copy)[0]
    assert isinstance(folder, Path)
    (folder / name).write_text('{"subject": "mine"}\n')
    before = snapshot(folder)
    with pytest.raises(UserError, match=r"settings\.json|another model"):
        evaluate(copy / "run", output=folder, stop=StopSignal(), settings=WORDS)
    assert snapshot(folder) == before


def test_links_in_a_run_directory_are_not_written_through(copy: Path) -> None:
    """A folder of the base model's files, linked to spare their space, has them rewritten."""
    run, base = copy / "run", copy / "model"
    shutil.rmtree(run / "model")
    (run / "model").symlink_to(base)
    (run / "config.yaml").rename(copy / "theirs.yaml")
    (run / "config.yaml").symlink_to(copy / "theirs.yaml")
    theirs = snapshot(base), snapshot(copy / "theirs.yaml")
    keep_small_files(base, run)
    keep_template("another", run)
    storage.write(run / "config.yaml", "another")
    assert (snapshot(base), snapshot(copy / "theirs.yaml")) == theirs
    assert not (run / "model").is_symlink()


# ----- faults -------------------------------------------------------------------------------------


class Dead(BaseException):
    """What is left of a process that was killed: nothing in it is done any more."""


class Fault:
    """At the `count`-th change of a file below `folder`: `error`; `Dead` then comes for ever."""

    current: Fault | None = None

    def __init__(self, folder: Path, count: int, error: type[BaseException]) -> None:
        self.folder, self.count, self.error = str(folder), count, error
        self.seen, self.thread = 0, threading.get_ident()

    def check(self, event: str, arguments: tuple[Any, ...]) -> None:
        if threading.get_ident() != self.thread or not self.changes(event, arguments):
            return
        self.seen += 1
        if self.error is Dead and self.seen >= self.count:
            raise Dead
        if self.seen == self.count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def changes(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "open":
            mode, flags = arguments[1], arguments[2]
            writes = (mode or "")[:1] in ("w", "a", "x") if mode else flags & 3
            return bool(writes) and self.folder in str(arguments[0])
        changing = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate")
        return event in changing and self.folder in str(arguments[0])


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if Fault.current is not None:
        Fault.current.check(event, arguments)


@contextmanager
def fault(folder: Path, count: int, error: type[BaseException]) -> Iterator[Fault]:
    if not getattr(sys, "_neftune_audited", False):  # a hook cannot be taken off again
        sys.addaudithook(_hook)
        sys._neftune_audited = True  # type: ignore[attr-defined]
    Fault.current = Fault(folder, count, error)
    try:
        yield Fault.current
    finally:
        Fault.current = None
        # As the system does for a process that is dead: its locks are let go.
        for descriptor in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                if "lock" in os.readlink(f"/proc/self/fd/{descriptor}").rpartition("/")[2]:
                    os.close(int(descriptor))


def test_export_killed_anywhere_leaves_old_or_new(run_dir: Path, tmp_path: Path) -> None:
    output, count, done = tmp_path / "exported", 0, False
    quiet_export(run_dir, output, dtype="fp32")
    states = set()
    while not done:
        count += 1
        with fault(tmp_path, count, Dead), suppress(Dead):
            quiet_export(run_dir, output, dtype="bf16")
            done = True
        old = is_whole(output, "float32"), is_whole(tmp_path / ".exported.neftune-old", "float32")
        new = is_whole(output, "bfloat16")
        assert any(old) or new, f"the {count}-th operation"
        states.add((*old, new))
        # The next one puts right what was left, and leaves nothing but itself.
        quiet_export(run_dir, output, dtype="fp32")
        assert is_whole(output, "float32")
        assert [path.name for path in tmp_path.iterdir()] == ["exported"]
    # Before, between the renames, before the old one is removed, afterwards.
    assert states >= {(True, False, False), (False, True, False), (False, False, True)}
    assert count > 20


def test_export_on_full_disk_leaves_the_old_one(run_dir: Path, tmp_path: Path) -> None:
    output, count, failures, done = tmp_path / "exported", 0, 0, False
    quiet_export(run_dir, output, dtype="fp32")
    while not done:
        count += 1
        with fault(tmp_path, count, OSError) as given:
            try:
                quiet_export(run_dir, output, dtype="bf16")
                done = given.seen < count
            except UserError as error:
                assert re.search(r"exported.* cannot be written: No space left", str(error))
                failures += 1
                assert is_whole(output, "float32")
        names = {path.name for path in tmp_path.iterdir()}
        assert names <= {"exported", ".exported.neftune-old", ".exported.neftune-lock"}
        quiet_export(run_dir, output, dtype="fp32")
        assert [path.name for path in tmp_path.iterdir()] == ["exported"]
    assert failures > 12


@contextmanager
def no_file_over(num_bytes: int) -> Iterator[None]:
    """Writes beyond that fail in the system itself, for Rust's as for Python's."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_partly_written_files_are_not_published(run_dir: Path, tmp_path: Path) -> None:
    output = quiet_export(run_dir, tmp_path / "exported", dtype="fp32")
    for size in sorted({path.stat().st_size for path in output.iterdir()}):
        with no_file_over(size - 1), pytest.raises(UserError, match="File too large"):
            quiet_export(run_dir, output, dtype="fp32")
        assert is_whole(output, "float32")
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]


def test_evaluation_on_full_disk_is_continued(run_dir: Path, tmp_path: Path) -> None:
    folder, reference = tmp_path / "results", tmp_path / "untouched"
    assert evaluated(run_dir, reference) == 0
    wanted = (reference / "summary.json").read_text(), (reference / "answers.json").read_text()
    count, done = 0, False
    while not done:
        count += 1
        with fault(folder, count, OSError) as given:
            try:
                evaluated(run_dir, folder)
                done = given.seen < count
            except UserError as error:
                assert "cannot be written: No space left on device." in str(error)
        assert evaluated(run_dir, folder) == 0
        assert ((folder / "summary.json").read_text(), (folder / "answers.json").read_text()) == (
            wanted
        )
        assert {path.name for path in folder.iterdir()} == {
            path.name for path in reference.iterdir()
        }
        shutil.rmtree(folder)
    assert count > 10


def evaluated(run_dir: Path, folder: Path) -> int:
    return evaluate(run_dir, output=folder, stop=StopSignal(), settings=WORDS)


# ----- races --------------------------------------------------------------------------------------


def test_two_exports_at_once_do_not_mix(run_dir: Path, tmp_path: Path) -> None:
    def one(dtype: str) -> subprocess.CompletedProcess[str]:
        return tiny_model.run_forked(
            "export", run_dir, "--output", tmp_path / "exported", "--dtype", dtype
        )

    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            for done in pool.map(one, ("fp32", "bf16", "fp32")):
                refused = done.returncode == 2 and "is being written by another" in done.stderr
                assert done.returncode == 0 or refused, done.stderr
        assert is_whole(tmp_path / "exported", "bfloat16") or is_whole(
            tmp_path / "exported", "float32"
        )
        assert [path.name for path in tmp_path.iterdir()] == ["exported"]


def test_two_evaluations_at_once_do_not_mix(run_dir: Path, tmp_path: Path) -> None:
    def one(folder: Path) -> subprocess.CompletedProcess[str]:
        return tiny_model.run_forked("evaluate", run_dir, "--output", folder, *WORDS)

    assert one(tmp_path / "alone").returncode == 0
    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(one, [tmp_path / "both"] * 2):
            refused = done.returncode == 2 and "by another evaluation" in done.stderr
            assert done.returncode == 0 or refused, done.stdout + done.stderr
    for file in ("summary.json", "answers.json", "items.json"):
        both = (tmp_path / "both" / file).read_text()
        assert both == (tmp_path / "alone" / file).read_text()

"""Mistakes of users end in one sentence: paths, launcher variables, options, damaged JSON."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from neftune_dist import cli
from neftune_dist.checkpoint.run_files import keep_small_files
from neftune_dist.cluster.launch import supervisor
from neftune_dist.config import (
    KNOBS,
    Nullable,
    UserError,
    load_config,
    parse_json,
    read_json,
    user_path,
    with_checksum,
)
from neftune_dist.distributed import environment, outcome
from neftune_dist.system import console
from neftune_dist.system.checkpoint_names import newest_step
from tests.support import tiny_model

IMPOSSIBLE = {
    "~nosuchuser/x": "names no known user",
    "/tmp/" + "x" * 256: "too long",
    "é" * 128: "too long",
    "x/" * 2100 + "x.jinja": "too long",
    "a\0b": "",
}


@pytest.mark.parametrize("text", IMPOSSIBLE)
@pytest.mark.parametrize("key", [*(key for key in KNOBS if KNOBS[key].is_path), "evaluate.tasks"])
def test_impossible_path_in_a_setting_is_refused(key: str, text: str) -> None:
    words = ["model.name_or_path=m", "judge.url=http://x/v1", "judge.model=m"]
    name = key.replace("[]", "[0]")
    text = text if key != "evaluate.tasks" else f"mmlu,arc={text}"
    setting = f"{key}={text}"
    if "[]" in key:
        setting = f"data.mixture=[{json.dumps({'source': text})}]"
    with pytest.raises(UserError) as error:
        load_config(None, [*words, setting])
    assert str(error.value).startswith(name) and IMPOSSIBLE.get(text, "") in str(error.value)
    assert "\n" not in str(error.value)


def main(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    return int(ended.value.code or 0), capfd.readouterr().err


@pytest.mark.parametrize("text", ["~nosuchuser/x", "x" * 300, ""])
@pytest.mark.parametrize(
    "words",
    [
        ("checkpoints", "{}"),
        ("export", "{}"),
        ("export", ".", "--output", "{}"),
        ("evaluate", "{}"),
        ("evaluate", ".", "--output", "{}"),
        ("train", "{}"),
        ("launch", "{}"),
        ("plan", "{}"),
        ("doctor", "--run-dir", "{}"),
    ],
)
def test_impossible_path_in_an_argument_exits_2(
    words: tuple[str, ...], text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code, err = main(capfd, *(word.format(text) for word in words))
    assert code == 2 and "Traceback" not in err
    assert err.count("\n") == 1 and err.startswith("neftune-dist: ")


@pytest.mark.parametrize(
    "words",
    [
        ("launch", "c", "--processes", "-1"),
        ("launch", "c", "--processes", ""),
        ("launch", "c", "--processes", "100000"),
        ("launch", "c", "--rendezvous-minutes", "nan"),
        ("launch", "c", "--rendezvous-minutes", "-1"),
        ("launch", "c", "--max-restarts", "-1"),
        ("export", "r", "--step", "-1"),
        ("export", "r", "--step", "9" * 5000),
        ("prepare", "c", "--show", "-3"),
    ],
)
def test_impossible_number_exits_2(
    words: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    code, err = main(capfd, *words)
    assert code == 2 and "Traceback" not in err
    assert "is out of range" in err or "is not a whole number" in err


def test_package_that_cannot_be_imported_exits_2(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Unless it is one of ours: that is a fault of this program."""
    monkeypatch.delitem(sys.modules, "neftune_dist.checkpoint.export", raising=False)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    code, err = main(capfd, "export", ".")
    assert code == 2 and err.count("\n") == 1
    assert "`from safetensors.torch import save_file` fails: import of safetensors.torch" in err
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "neftune_dist.checkpoint.export", None)
    with pytest.raises(ImportError):
        cli.main(["export", "."])


ALL = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "variables",
    [
        *[{name: "x"} for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")],
        *[{name: ""} for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")],
        *[{name: "-1"} for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")],
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "0"},
        {"RANK": "1"},
        {"MASTER_ADDR": "localhost"},
        *[{**ALL, name: None} for name in ALL if name != "WORLD_SIZE"],
        {**ALL, "RANK": "2"},
        {**ALL, "MASTER_PORT": "0"},
        {**ALL, "MASTER_PORT": "70000"},
        {**ALL, "MASTER_PORT": "http"},
        {**ALL, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"},
        {**ALL, "LOCAL_WORLD_SIZE": "3"},
        {**ALL, "MASTER_ADDR": "no-such-machine.invalid"},
        {**ALL, "MASTER_ADDR": "a..b"},
        {**ALL, "MASTER_ADDR": "x" * 300},
    ],
    ids=str,
)
def test_impossible_launcher_variables_are_refused(
    variables: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "_RESOLVE_SECONDS", 0.5)
    for name, value in variables.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        environment.find_place()
    assert any(name in str(error.value) for name in (*ALL, "LOCAL_RANK", "LOCAL_WORLD_SIZE"))


def test_launcher_variables_give_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.find_place() == environment.Place()
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_PORT", "29500")  # as `launch` sets it
    assert environment.find_place() == environment.Place()
    for name, value in {**ALL, "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert environment.find_place() == environment.Place(1, 2, 1, 2, "127.0.0.1", 29500)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
def test_os_error_is_one_sentence_and_exits_2(
    number: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), "/some/file")

    monkeypatch.setattr(Path, "is_dir", refused)
    code, err = main(capfd, "checkpoints", "run")
    assert code == 2 and err.count("\n") == 1
    assert err.startswith(f"neftune-dist: /some/file: {os.strerror(number)}: ")


def test_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ConnectionResetError(errno.ECONNRESET, "reset")

    monkeypatch.setattr(Path, "is_dir", broken)
    with pytest.raises(ConnectionResetError):
        cli.main(["checkpoints", "run"])


@dataclass(frozen=True)
class Point:
    x: int
    name: str = ""
    y: float | None = None


FORM = {"step": int, "loss?": float | None, "points": [Point], "by": {str: [float]}}
GOOD: dict[str, Any] = {"step": 1, "points": [{"x": 1, "y": 2}], "by": {"a": [1, 2.5]}}


def test_json_that_matches_its_schema_is_read() -> None:
    read = parse_json(json.dumps({**GOOD, "other": 1}), FORM)
    assert read["points"] == [Point(1, "", 2)] and read["other"] == 1
    assert parse_json(json.dumps(with_checksum(GOOD)), FORM)["by"] == {"a": [1, 2.5]}
    assert parse_json("null", Nullable(FORM)) is None
    assert parse_json("[1e999, NaN]", [float])[0] == float("inf")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b"9" * 5000,
        b'{"step": 1, "points": [], "by": {"a": [' + b"9" * 309 + b"]}}",
        *(
            json.dumps({**GOOD, **change}).encode()
            for change in (
                {"step": "1"},
                {"step": True},
                {"step": 1.0},
                {"step": None},
                {"loss": "x"},
                {"points": {}},
                {"points": [[]]},
                {"points": [{}]},
                {"points": [{"x": None}]},
                {"points": [{"x": 1, "z": 1}]},
                {"by": []},
                {"by": {"a": 1}},
                {"by": {"a": [None]}},
            )
        ),
        json.dumps({**with_checksum(GOOD), "step": 2}).encode(),
        json.dumps({**GOOD, "checksum": []}).encode(),
    ],
)
def test_json_that_does_not_match_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"file\.json is damaged: .*; remove it\.$"):
        read_json(path, FORM, fix="remove it")


def test_checksum_covers_every_byte_of_the_values() -> None:
    content = json.dumps(with_checksum({"a": [1.25, None, "x y"], "b": {"c": True}})).encode()
    seen = 0
    for i in range(len(content)):
        for other in (content[i] ^ 1, content[i] ^ 4, ord("7")):
            damaged = content[:i] + bytes([other]) + content[i + 1 :]
            try:
                read = parse_json(damaged)
            except ValueError:
                seen += 1
                continue
            read.pop("checksum", None)
            assert damaged == content or {"a", "b"} <= read.keys()
            assert read == {"a": [1.25, None, "x y"], "b": {"c": True}} or "checksum" not in read
    assert seen > len(content)


def test_malformed_reports_of_ranks_are_ignored(tmp_path: Path) -> None:
    folder = tmp_path / "logs" / "attempt_0001"
    folder.mkdir(parents=True)
    good = {"kind": "failed", "step": 3, "error": "boom", "checkpoint": 2, "when": 1.0}
    odd: list[Any] = [None, True, "x", [], {}, -1.5]
    for key in good:
        for value in odd:
            for name in ("rank_0.json", "outcome.json"):
                (folder / name).write_text(json.dumps({**good, key: value}))
            past = outcome.outcomes(tmp_path)
            outcome.verdict(past, 3)
            outcome.is_over(folder)
            outcome.conclude(folder, 1, 0, "ended")
    (folder / "outcome.json").write_text(json.dumps(good))
    assert outcome.outcomes(tmp_path) == [outcome.Outcome(**good)]


def test_removed_run_directory_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run_dir=.* was removed"):
        outcome.conclude(tmp_path / "run" / "logs" / "attempt_0001", 1, 0, "")
    assert not outcome.is_over(tmp_path / "run" / "logs" / "attempt_0001")


def test_file_of_the_base_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))  # as root never gets

    (tmp_path / "generation_config.json").write_text("{}")
    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(UserError, match=r"generation_config\.json cannot be read: Permission"):
        keep_small_files(tmp_path, tmp_path / "run")


def test_newest_step_needs_a_manifest(tmp_path: Path) -> None:
    assert newest_step(tmp_path) == 0
    for name, marked in (("step_00000004", True), ("step_00000008", False), ("step_x", True)):
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        if marked:
            (folder / "manifest.json").touch()
    (tmp_path / "checkpoints" / "latest").write_text("step_99999999\n")
    assert newest_step(tmp_path) == 4


def test_output_is_drained_when_disk_or_reader_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 s of a full disk, in milliseconds: what was lost is counted in the log."""
    full, written = threading.Event(), os.write
    full.set()

    def write(descriptor: int, block: bytes) -> int:
        if descriptor == 1:
            raise BrokenPipeError(errno.EPIPE, "nobody reads")
        if full.is_set():
            raise OSError(errno.ENOSPC, "no space")
        return written(descriptor, block)

    reading, writing = os.pipe()
    with (tmp_path / "console.log").open("wb", buffering=0) as log:
        monkeypatch.setattr(supervisor.os, "write", write)
        copying = threading.Thread(
            target=supervisor._copy, args=(os.fdopen(reading, "rb"), log), daemon=True
        )
        copying.start()
        for _ in range(64):  # more than a pipe holds: it would block if it were not drained
            written(writing, b"x" * (1 << 16))
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and copying.is_alive() and full.is_set():
            time.sleep(0.1)
            full.clear()
        written(writing, b"and on it goes\n")
        os.close(writing)
        copying.join(10)
    assert not copying.is_alive()
    text = (tmp_path / "console.log").read_bytes()
    assert b"bytes of output are missing here" in text and text.endswith(b"and on it goes\n")


@pytest.mark.parametrize(
    ("verb", "place"), [("checkpoints", "/dev/full"), ("config", "pipe"), ("config", "closed")]
)
def test_broken_console_does_not_end_a_verb(verb: str, place: str, tmp_path: Path) -> None:
    """To a full disk, to a reader that has gone, and without any."""
    (tmp_path / "checkpoints").mkdir()
    word = str(tmp_path) if verb == "checkpoints" else "noise.alpha"
    command = [sys.executable, "-m", "neftune_dist", verb, word]
    if place == "closed":
        command = ["bash", "-c", 'exec "$@" >&-', "_", *command]
        out: Any = None
    elif place == "pipe":
        reading, out = os.pipe()
        os.close(reading)
    else:
        out = os.open(place, os.O_WRONLY)
    done = subprocess.run(
        command,
        stdout=out,
        stderr=subprocess.PIPE,
        text=True,
        env=tiny_model.environment(),
        timeout=120,
    )
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert done.returncode == (2 if place == "/dev/full" else 0), done.stderr
    assert ("No space left" in done.stderr) == (place == "/dev/full")


def test_closed_standard_input_is_one_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    console.protect()
    assert sys.stdin.fileno() == 0


def test_user_path_expands_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert user_path("~/runs", "run_dir") == Path("/home/somebody/runs")

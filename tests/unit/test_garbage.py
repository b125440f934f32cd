"""A process ends as ever, though without Python's own search for garbage."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest

from neftune_dist.cli import main
from neftune_dist.system import garbage
from tests.support import tiny_model

# Named in a module, so that Python's own end would collect it.
PROGRAM = """
import atexit, gc, sys, threading, time
from neftune_dist import cli

class Sweeper:
    def __del__(self):
        print("swept")

sweeper = Sweeper()
sweeper.itself = sweeper

def work():
    time.sleep(0.5)
    print("thread")

def main():
    atexit.register(print, "handler")
    threading.Thread(target=work).start()
    print(gc.get_threshold()[0], end=" ")
    {ending}

cli.main = main
cli.run()
"""


@pytest.mark.parametrize(
    ("ending", "code", "swept"),
    [
        # By that of a process which leaves a GPU behind that waits for others.
        ("cli.garbage.end_at_once(); sys.exit(2)", 2, False),
        ("cli.garbage.end_at_once(); raise ValueError('a bug')", 1, False),
        ("sys.exit(0)", 0, False),
        ("sys.exit(75)", 75, False),
        ("sys.exit()", 0, False),
        ("sys.exit('a message')", 1, False),
        ("raise ValueError('a bug')", 1, True),
    ],
)
def test_process_ends_with_its_code_after_threads_and_handlers(
    ending: str, code: int, swept: bool
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(ending=ending)],
        env=tiny_model.environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    assert done.stdout.split() == ["50000", "thread", "handler", *["swept"] * swept]
    assert ("ValueError: a bug" in done.stderr) == ("a bug" in ending)
    assert ("a message" in done.stderr) == ("message" in ending)


def test_process_that_has_started_never_collects_its_imports() -> None:
    program = (
        "import gc; from neftune_dist.system import garbage as g; usual = gc.get_threshold();"
        "g.collect_rarely(); print(gc.get_threshold() > usual, gc.get_freeze_count());"
        "g.keep_imports(); print(gc.get_threshold() == usual, gc.get_freeze_count() > 1000)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "0", "True", "True"], done.stderr


@pytest.mark.parametrize(
    ("words", "target"),
    [
        (["train", "quickstart", "model.name_or_path=x"], "training.train.train"),
        (["evaluate", "x"], "evaluation.evaluate.evaluate"),
        (["chat", "x"], "evaluation.chat.chat"),
        (["export", "x"], "checkpoint.export.export"),
    ],
)
def test_verbs_that_hold_tensors_collect_as_usual(
    words: list[str], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def work(*_: object, **__: object) -> int:
        events.append("work")
        return 0

    monkeypatch.setattr(garbage, "keep_imports", lambda: events.append("kept"))
    monkeypatch.setattr(f"neftune_dist.{target}", work)
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0 and events == ["kept", "work"]


def test_other_processes_are_collected_as_they_were() -> None:
    before = gc.get_threshold(), gc.get_freeze_count()
    garbage.keep_imports()
    assert (gc.get_threshold(), gc.get_freeze_count()) == before


def test_collector_is_on_again_after_an_error() -> None:
    assert gc.isenabled()
    with pytest.raises(OSError), garbage.without_collecting():
        assert not gc.isenabled()
        os.stat("/nowhere")
    assert gc.isenabled()

"""Small faults put into the package, one at a time: each must make a test fail.

    python -m tests.faults [WORD ...]     all of faults.jsonl, or those whose line holds a WORD

A line of faults.jsonl names the fault, the file, the text that is replaced and by what, and the
arguments of pytest that must find it. The faults are put into a copy of the tree. Exit code 1 where
one survives, or where the text that it replaces no longer stands in its file exactly once.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAULTS = Path(__file__).with_suffix(".jsonl")
_LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "runs")


def run_tests(arguments: list[str], log: Path) -> int:
    """Run pytest in a forked process, which has all of torch and transformers already."""
    process = os.fork()
    if process == 0:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments])))
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def verdict(fault: dict[str, str], arguments: list[str], tree: Path) -> str:
    """Put a fault into the tree, run its tests, take it out."""
    path = tree / fault["file"]
    text = path.read_text()
    if text.count(fault["old"]) != 1:
        return "stale"
    log = tree / "faults.log"
    path.write_text(text.replace(fault["old"], fault["new"]))
    try:
        code = run_tests(arguments, log)
    finally:
        path.write_text(text)
    if code not in (0, 1):
        return f"pytest ended with {code}: {log.read_text()[-300:]}"
    failed = [line for line in log.read_text().splitlines() if line.startswith("FAILED ")]
    name = failed[0].split(" - ")[0].removeprefix("FAILED ") if failed else ""
    return f"caught by {name}" if code else "SURVIVED"


def main(words: list[str]) -> int:
    """Try every fault whose line holds one of the words, and print what became of it."""
    lines = [
        line
        for line in FAULTS.read_text().splitlines()
        if not words or any(word in line for word in words)
    ]
    if not lines:
        raise SystemExit(f"No line of {FAULTS} holds {' or '.join(words)}.")
    caught = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=_LEFT_OUT)
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        sys.modules.pop("tests", None)  # this tree's, which `python -m` has imported
        os.environ["PYTHONPATH"] = str(tree)
        shared = str(ROOT.parent / "shared")
        os.environ.setdefault("NEFTUNE_DIST_TEST_DATA", shared)
        sys.dont_write_bytecode = True
        for name in ("torch", "transformers", "datasets", "omegaconf"):
            __import__(name)
        for line in lines:
            fault = json.loads(line)
            found = verdict(fault, fault["tests"], tree)
            caught += found.startswith("caught")
            print(f"{fault['file']}: {fault['fault']}: {found}", flush=True)
    print(f"{caught} of {len(lines)} caught")
    return int(caught < len(lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

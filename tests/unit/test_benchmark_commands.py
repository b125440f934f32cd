"""Benchmarks begin by the commands that the READMEs and their own first lines give."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "tests" / "benchmarks"


def test_a_benchmark_that_imports_the_tests_is_run_as_a_module() -> None:
    """Run as a file, it has its own folder on Python's path, not the root."""
    texts = [path.read_text() for path in [*ROOT.rglob("README.md"), *BENCHMARKS.glob("*.py")]]
    by_file = {
        name for text in texts for name in re.findall(r"python tests/benchmarks/(\w+)\.py", text)
    }
    by_module = {
        name for text in texts for name in re.findall(r"-m tests\.benchmarks\.(\w+)", text)
    }
    assert by_file and by_module
    for name in by_file | by_module:
        source = (BENCHMARKS / f"{name}.py").read_text()
        imported = {
            node.module.partition(".")[0]
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.ImportFrom) and node.module
        }
        puts_the_root_there = "sys.path.insert" in source
        if name in by_file:
            assert "tests" not in imported or puts_the_root_there, name
        if name in by_module:  # its neighbours are not on the path
            assert not imported & {path.stem for path in BENCHMARKS.glob("*.py")}, name

"""The list of faults is about today's code; that each is caught: `python -m tests.faults`."""

from __future__ import annotations

import json

import pytest

from tests.faults import FAULTS, ROOT

LINES = FAULTS.read_text().splitlines()


@pytest.mark.parametrize("line", LINES, ids=range(1, len(LINES) + 1))
def test_fault_can_be_put_into_its_file(line: str) -> None:
    fault = json.loads(line)
    assert (ROOT / fault["file"]).read_text().count(fault["old"]) == 1, fault["fault"]
    assert fault["new"] != fault["old"]
    places = [word for word in fault["tests"] if word.startswith("tests/")]
    assert places
    for place in places:
        file, _, test = place.partition("::")
        assert f"def {test.partition('[')[0]}" in (ROOT / file).read_text()

"""The kernels of `LowPrecisionAdamW` leave the reference's bits, under Triton's interpreter."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.support import moment_updates
from tests.support.interpreter import DEADLINE_SECONDS
from tests.support.moment_updates import CASES

pytest.importorskip("triton")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("states", ["bf16", "8bit"])
def test_bits_are_the_references(states: str, case: str, interpreter: ProcessPoolExecutor) -> None:
    """The parameter, and what lies around the piece; the moments, or their codes and scales."""
    interpreted = interpreter.submit(moment_updates.run, states, CASES[case], "cpu", True)
    moment_updates.assert_same_bits(
        interpreted.result(DEADLINE_SECONDS), moment_updates.run(states, CASES[case])
    )

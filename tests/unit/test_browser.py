"""A sweep in TensorBoard, in a real browser. To look at it: tests/support/browser.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from neftune_dist.config import LoggingConfig
from neftune_dist.training.trackers import Trackers
from tests.support import browser

pytestmark = pytest.mark.skipif(browser.BROWSER is None, reason="needs chromium on the PATH")


def test_tensorboard_names_runs_and_shows_the_loss_first(tmp_path: Path) -> None:
    for alpha in (0.0, 5.0):
        facts = {"config": {"noise": {"alpha": alpha}}}
        trackers = Trackers(tmp_path / f"alpha-{alpha:g}", LoggingConfig(), facts, 0)
        for step in range(1, 5):
            figures = {"loss": 1 / step, "num_tokens": 7, "step_seconds": 2.0, "noise_norm": 2.9}
            trackers.record({"step": step, **figures})
        trackers.samples([{"step": 4, "index": 0, "instruction": "Why?", "output": "So."}])
        trackers.close()
    with browser.tensorboard(tmp_path) as address:
        cards = browser.browse(f"{address}/#timeseries", "--dump-dom")
    assert all(f'/alpha-{alpha}/tensorboard/alpha-{alpha}"' in cards for alpha in "05")
    groups = re.findall(r'class="group-title" title="([^"]*)"', cards)
    assert groups[0] == "loss" and {"noise", "speed", "tokens"} <= {*groups}

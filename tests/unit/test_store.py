"""What publishing leaves on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import xxhash

from neftune_dist.checkpoint import store
from neftune_dist.checkpoint.flat import WrittenFile
from neftune_dist.config import CheckpointConfig


def publish(run_dir: Path, step: int, settings: CheckpointConfig) -> Path:
    """A checkpoint of one file that tells the step; its folder."""
    partial = store.begin(run_dir, step)
    content = f"all the tensors of step {step}".encode()
    (partial / "__0_0.distcp").write_bytes(content)
    written = WrittenFile(len(content), xxhash.xxh3_128(content).hexdigest())
    store.publish(partial, f'{{"step": {step}}}', {"__0_0.distcp": written}, settings)
    return partial.with_suffix("")


def steps(run_dir: Path) -> list[int]:
    return [each.step for each in store.find_all(run_dir)]


@pytest.mark.parametrize(
    ("keep", "keep_every_steps", "kept"),
    [
        (1, 0, [5]),
        (2, 0, [5, 4]),
        (9, 0, [5, 4, 3, 2, 1]),
        (0, 0, [5, 4, 3, 2, 1]),
        (0, 2, [5, 4, 3, 2, 1]),
        (1, 2, [5, 4, 2]),
        (2, 3, [5, 4, 3]),
    ],
)
def test_what_is_kept(keep: int, keep_every_steps: int, kept: list[int], tmp_path: Path) -> None:
    for step in range(1, 6):
        publish(tmp_path, step, CheckpointConfig(keep=keep, keep_every_steps=keep_every_steps))
    assert steps(tmp_path) == kept
    for each in store.find_all(tmp_path):
        assert each.first_flaw() is None
        assert each.trainer_state() == {"step": each.step}
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {"latest", *(f"step_{step:08d}" for step in kept)}
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000005\n"


def test_a_later_checkpoint_that_was_passed_over_takes_no_sound_ones_place(tmp_path: Path) -> None:
    """A flipped bit changes no size: by sizes alone step 8 is still the newest, and with one to
    keep, it was kept in place of the step that a resumed run had just published."""
    settings = CheckpointConfig(keep=1)
    shard = publish(tmp_path, 8, settings) / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[3] ^= 1
    shard.write_bytes(content)
    publish(tmp_path, 6, settings)
    publish(tmp_path, 7, settings)
    eight, seven = store.find_all(tmp_path)
    assert (eight.step, seven.step) == (8, 7)
    assert eight.first_flaw() == "__0_0.distcp"
    assert seven.first_flaw() is None
    assert publish(tmp_path, 8, settings).with_name("step_00000008.damaged").is_dir()
    assert steps(tmp_path) == [8]
    assert store.find_all(tmp_path)[0].first_flaw() is None


def test_what_a_crash_left_is_swept_away_and_never_read(tmp_path: Path) -> None:
    settings = CheckpointConfig(keep=1)
    publish(tmp_path, 1, settings)
    (store.begin(tmp_path, 2) / "__0_0.distcp").write_bytes(b"half")
    assert steps(tmp_path) == [1]
    assert [path.name for path in store.leftovers(tmp_path)] == ["step_00000002.partial"]
    publish(tmp_path, 3, settings)
    assert steps(tmp_path) == [3]
    assert store.leftovers(tmp_path) == []

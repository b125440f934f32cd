"""The checkpoint that a run resumes from, and what makes it another run's."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from neftune_dist.checkpoint import resume, store
from neftune_dist.config import CheckpointConfig, Config, UserError
from neftune_dist.distributed.world import World

IDENTITY: dict[str, Any] = {
    "architecture": {"hidden_size": 64, "num_layers": 2},
    "tokenizer": "t",
    "dataset": "d",
    "data": "content",
    "order": "feistel-1",
    "template": "x",
    "base": "b",
}


class FakeWorld(World):
    """One of several ranks; `from_others` is the text that another one has.

    Attributes:
        lines: logged.
    """

    def __init__(self, from_others: str | None = None) -> None:
        self.rank, self.size, self._from_others = 0, 2, from_others
        self.lines: list[str] = []

    @contextmanager
    def agree(self) -> Iterator[None]:
        yield

    def from_first(self, text: str) -> str:
        return text

    def from_any(self, text: str | None) -> str | None:
        other, self._from_others = self._from_others, None
        return text or other

    def log(self, line: str) -> None:
        self.lines.append(line)


def publish(run_dir: Path, step: int) -> store.Checkpoint:
    run_dir.mkdir(exist_ok=True)
    partial = store.begin(run_dir, step)
    store.publish(partial, json.dumps({"step": step}), {}, CheckpointConfig(keep=0))
    return store.Checkpoint(partial.with_suffix(""))


def find(run_dir: Path, world: FakeWorld, **settings: Any) -> store.Checkpoint | None:
    config = Config(checkpoint=CheckpointConfig(**settings))
    return resume.find(run_dir, config, world)


def test_finds_the_newest_sound_checkpoint(tmp_path: Path) -> None:
    assert find(tmp_path, FakeWorld()) is None
    one, two = publish(tmp_path, 1), publish(tmp_path, 2)
    assert find(tmp_path, FakeWorld()) == two
    world = FakeWorld(from_others="__1_0.distcp")  # a flaw that another rank found
    assert find(tmp_path, world) == one
    (line,) = world.lines
    assert str(two.folder) in line and "__1_0.distcp is not what was written" in line
    (one.folder / "trainer_state.json").write_text("{}")
    (two.folder / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="holds damaged checkpoints only"):
        find(tmp_path, FakeWorld())


def test_checks_bytes_unless_told_not_to(tmp_path: Path) -> None:
    one = publish(tmp_path, 1)
    state = one.folder / "trainer_state.json"
    state.write_text(state.read_text().replace("1", "2"))  # of the same size
    world = FakeWorld()
    world.size = 1  # whose part is every file
    with pytest.raises(UserError, match="holds damaged checkpoints only"):
        find(tmp_path, world)
    assert find(tmp_path, world, verify=False) == one


def test_named_checkpoint_is_for_a_run_without_its_own(tmp_path: Path) -> None:
    named = publish(tmp_path / "other", 3)
    run_dir = tmp_path / "run"
    assert find(run_dir, FakeWorld(), resume=str(named.folder)) == named
    assert find(run_dir, FakeWorld(), resume="never") is None
    publish(run_dir, 1)
    for word in ("never", str(named.folder)):
        with pytest.raises(UserError, match="holds the checkpoint step_00000001"):
            find(run_dir, FakeWorld(), resume=word)
    with pytest.raises(UserError, match="is no checkpoint directory"):
        find(tmp_path / "new", FakeWorld(), resume=str(tmp_path))


def check(change: Callable[[dict[str, Any], Config], None], accept: str | None = None) -> list[str]:
    """The changes reported for a run that differs from its checkpoint by `change`."""
    identity, config = copy.deepcopy(IDENTITY), Config()
    config.data.template = "a.jinja"
    state = {"identity": copy.deepcopy(identity), "config": config.to_dict()}
    change(identity, config)
    if accept:
        config.checkpoint.accept_changes = accept
    found = store.Checkpoint(Path("checkpoints/step_00000001"))
    return resume.check_same_run(found, state, identity, config)


def test_same_run_has_no_changes() -> None:
    assert check(lambda identity, config: None) == []


@pytest.mark.parametrize("key", sorted(IDENTITY.keys() - {"order"}))
def test_another_identity_is_refused(key: str) -> None:
    def change(identity: dict[str, Any], config: Config) -> None:
        identity[key] = {**identity[key], "num_layers": 3} if key == "architecture" else "another"

    with pytest.raises(UserError, match="restore the configuration that made it") as caught:
        check(change)
    words = {"architecture": "num_layers", "data": "other data", "base": "frozen weights"}
    assert words.get(key, f"another {key}" if key != "template" else "another text") in str(
        caught.value
    )


@pytest.mark.parametrize("recorded", [{}, {"order": "another"}])
def test_another_order_of_documents_is_refused(recorded: dict[str, str]) -> None:
    """The first versions recorded none."""
    identity = {key: value for key, value in IDENTITY.items() if key != "order"}
    state = {"identity": {**identity, **recorded}, "config": Config().to_dict()}
    found = store.Checkpoint(Path("checkpoints/step_00000001"))
    then = recorded.get("order", "sorted")
    with pytest.raises(UserError, match=rf"documents in another order \({then}, now feistel-1\)"):
        resume.check_same_run(found, state, IDENTITY, Config())


@pytest.mark.parametrize("key", ["tokenizer", "dataset", "data"])
def test_checkpoint_that_records_no_identity_is_refused(key: str) -> None:
    identity = {name: value for name, value in IDENTITY.items() if name != key}
    state = {"identity": identity, "config": Config().to_dict()}
    found = store.Checkpoint(Path("checkpoints/step_00000001"))
    with pytest.raises(UserError, match="restore the configuration that made it"):
        resume.check_same_run(found, state, IDENTITY, Config())


def test_field_unknown_to_one_version_of_transformers_is_no_difference() -> None:
    def change(identity: dict[str, Any], config: Config) -> None:
        identity["architecture"]["new_field"] = 1

    assert check(change) == []


def test_settings_that_change_training_are_refused_or_accepted_by_name() -> None:
    def change(identity: dict[str, Any], config: Config) -> None:
        config.noise.alpha = 9.0

    with pytest.raises(UserError, match=r"noise\.alpha \(then 5\.0, now 9\.0\)"):
        check(change)
    assert check(change, "noise.alpha") == ["noise.alpha was 5.0, is now 9.0"]


def test_settings_of_where_and_how_long_may_change() -> None:
    def change(identity: dict[str, Any], config: Config) -> None:
        config.engine.name, config.train.micro_batch_tokens = "deepspeed", 99
        config.data.template, config.train.num_epochs = "moved.jinja", 7.0

    assert check(change) == [f"train.num_epochs was {Config().train.num_epochs}, is now 7.0"]

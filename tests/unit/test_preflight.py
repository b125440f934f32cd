"""Predictions for a run before it is queued, and its snapshot: without Slurm."""

from __future__ import annotations

import gzip
import subprocess
from argparse import Namespace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import constants

from neftune_dist import arguments, cli  # noqa: F401 (fills VERBS)
from neftune_dist.cluster.submit import inventory, preflight, slurm, snapshot
from neftune_dist.config import Config, DataConfig, SourceConfig, TrainConfig, UserError
from neftune_dist.data import sampler
from neftune_dist.system import versions
from neftune_dist.system.text import duration_text


@pytest.mark.parametrize(
    ("settings", "steps", "made", "present", "number"),
    [
        ({}, 100, 0, 0, 3),
        ({"keep": 5}, 100, 0, 0, 6),
        ({"keep": 5}, 100, 10, 2, 4),
        ({"keep": 2}, 100, 50, 2, 1),
        ({"keep": 0}, 100, 0, 0, 10),
        ({"keep": 0}, 105, 50, 5, 6),
        ({"keep": 0, "every_steps": 0}, 100, 0, 0, 1),
        ({"keep": 0}, None, 0, 0, 1),
        ({"keep": 2, "keep_every_steps": 20}, 100, 0, 0, 3 + 4),
        ({"keep": 2, "keep_every_steps": 20}, None, 0, 0, 3),
    ],
)
def test_how_many_checkpoints_need_room(
    tmp_path: Path,
    settings: dict[str, int],
    steps: int | None,
    made: int,
    present: int,
    number: int,
) -> None:
    config = Config(run_dir=str(tmp_path))
    for name, value in {"every_steps": 10, **settings}.items():
        setattr(config.checkpoint, name, value)
    for i in range(present):
        (tmp_path / "checkpoints" / f"step_{i:08d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000090.partial").mkdir(parents=True)
    assert preflight._num_checkpoints(config, steps, made) == number


def test_steps_are_those_of_the_schedule() -> None:
    for train in (TrainConfig(), TrainConfig(num_epochs=0.01), TrainConfig(num_epochs=2.5)):
        for number in (128, 129, 1000):
            config = Config(train=train)
            steps = preflight._num_steps(config, number)
            assert steps == sampler.make_sampler(train, number, "x").num_steps


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("1:00:00", 3600),
        ("2-3", 183600),
        ("2-3:04", 183840),
        ("2-03:04:05", 183845),
        ("UNLIMITED", float("inf")),
        ("0", float("inf")),
    ],
)
def test_times_are_read_as_slurm_reads_them(text: str, seconds: float) -> None:
    assert slurm.seconds("--time", text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        *(
            "afterok:1",
            "AfterOK:1:2",
            "after:1+5:2",
            "afterany:1,afternotok:2",
            "afterok:1?after:2",
        ),
        *("singleton", "aftercorr:1_2", "afterok:1_*", "afterok:1+1", "afterburstbuffer:1", "123"),
    ],
)
def test_conditions_that_sbatch_takes_are_taken(text: str) -> None:
    """Each was accepted by `sbatch --test-only` of Slurm 22.05, as INFINITE is for --time."""
    words = ["submit", "x", "--nodes=1", "--processes=1", "--time=INFINITE", "--dependency", text]
    slurm.check_options(Namespace(**arguments.parse(words)))


def test_durations_are_written_in_their_two_largest_units() -> None:
    texts = [duration_text(seconds) for seconds in (59, 600, 12000, 200000)]
    assert texts == ["59 s", "10 min", "3 h 20 min", "2 d 7 h"]


@pytest.mark.parametrize(
    ("name", "content", "number"),
    [
        ("a.jsonl", b'{}\n\n  \n{}\n{"last": 1}', 3),
        ("a.json", b"\xef\xbb\xbf {}\n{}\n", 2),
        ("a.json", b'\n [{}, {"a": [1, 2]}, {}]', 3),
        ("a.json", b"\xef\xbb\xbf[{}, {}, 1, {}]", 3),  # a number is no row
        ("a.jsonl.gz", gzip.compress(b"{}\n" * 7, mtime=0), 7),
        ("a.JSON.GZ", gzip.compress(b"[{}, {}]", mtime=0), 2),
        ("a.csv", b'\xef\xbb\xbfprompt,completion\n"a\nb",c\n\nd,e\n', 2),
        ("a.tsv.gz", gzip.compress(b"prompt\tcompletion\na\tb\n", mtime=0), 1),
    ],
)
def test_rows_are_counted(tmp_path: Path, name: str, content: bytes, number: int) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert inventory.count_rows(DataConfig(source=str(path))) == number


def test_rows_of_parquet_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["x"] * 12}), path)
    assert inventory.count_rows(DataConfig(source=str(path))) == 12
    (tmp_path / "b.jsonl").write_text("{}\n" * 5)
    assert inventory.count_rows(DataConfig(source=str(tmp_path))) == 17
    assert inventory.count_rows(DataConfig(source=f"{tmp_path}/*.j*")) == 5
    path = tmp_path / "c.parquet"
    path.write_bytes(b"no such file")
    with pytest.raises(
        UserError, match=r"data\.source=.*c\.parquet is not a readable Parquet file"
    ):
        inventory.count_rows(DataConfig(source=str(path)))


def test_rows_of_a_mixture_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (str(tmp_path / name) for name in ("a.jsonl", "b.jsonl"))
    Path(one).write_text("{}\n" * 10)
    Path(two).write_text("{}\n" * 8)
    data = DataConfig(mixture=[SourceConfig(one, weight=2), SourceConfig(two, max_documents=5)])
    assert inventory.count_rows(data) == 25
    data.mixture[0].weight = 0.25
    assert inventory.count_rows(data) == 7  # of 2.5, half to even
    data.held_out_source = str(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"data\.held_out_source=.* does not exist"):
        inventory.count_rows(data)
    data.held_out_source = "org/name"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"data\.held_out_source=org/name is not on this machine"):
        inventory.count_rows(data)
    data.mixture[1].source = str(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"data\.mixture\[1\]\.source=.* does not exist"):
        inventory.count_rows(data)


def test_paths_of_data_are_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = Config(
        data=DataConfig(
            mixture=[SourceConfig("x/*.json"), SourceConfig("org/name")], held_out_source="h.csv"
        )
    )
    preflight.anchor(config)
    assert [source.source for source in config.data.mixture] == [f"{tmp_path}/x/*.json", "org/name"]
    assert (config.data.source, config.data.held_out_source) == ("builtin", f"{tmp_path}/h.csv")
    config.data.held_out_source = "org/name"
    preflight.anchor(config)
    assert config.data.held_out_source == "org/name"


def test_held_out_share_is_not_trained_on() -> None:
    train = TrainConfig(global_batch_size=10, num_epochs=1)
    config = Config(data=DataConfig(held_out_fraction=0.25), train=train)
    assert preflight._num_steps(config, 100) == 8


def test_rows_of_long_files_are_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inventory, "_COUNTED_BYTES", 10)
    (tmp_path / "a.json").write_text("{}\n" * 100)
    data = DataConfig(source=str(tmp_path / "a.json"))
    assert inventory.count_rows(data) is None
    assert preflight._num_steps(Config(data=data, train=TrainConfig(max_steps=7)), None) == 7


def test_code_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_CHECKOUT", tmp_path)
    versions.versions.cache_clear()

    def git(*words: str) -> str:
        identity = ("-c", "user.name=x", "-c", "user.email=x@x")
        done = subprocess.run(
            ["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return done.stdout

    git("init")
    (tmp_path / "a.py").write_text("one\n")
    git("add", ".")
    git("commit", "-m", "x")
    (tmp_path / "a.py").write_text("two\n")
    (tmp_path / "unknown.py").write_text("three\n")
    files = snapshot.code()
    versions.versions.cache_clear()
    commit = git("rev-parse", "--short=12", "HEAD").strip()
    assert files["code.txt"].splitlines()[1] == f"commit {commit}-dirty"
    assert files["code.txt"].endswith(" M a.py\n?? unknown.py\n")
    git("checkout", "a.py")
    patch = tmp_path / "code.patch"
    patch.write_text(files["code.patch"])
    git("apply", str(patch))
    assert (tmp_path / "a.py").read_text() == "two\n"


def test_missing_git_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions.versions.cache_clear()
    monkeypatch.setenv("PATH", "/nowhere")
    assert "commit not known\n" in snapshot.code()["code.txt"]
    versions.versions.cache_clear()

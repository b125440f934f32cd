"""`train.profile_steps` writes a trace and a table, and changes nothing that is trained."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from tests.support import tiny_model

KINDS = ("matrix products", "attention", "noise", "copies and casts")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.make_config(
        tmp_path_factory.mktemp("profile"), train={"max_steps": 6}, noise={"alpha": 5.0}
    )


def profiled(config: Path, run_dir: Path, *words: str) -> tuple[str, list[Path]]:
    done = tiny_model.run_forked("train", config, f"run_dir={run_dir}", *words, ranks=2)
    assert done.returncode == 0, done.stderr
    return done.stdout, sorted((run_dir / "profile").glob("*"))


def test_trace_and_table_name_where_the_time_goes(config: Path, tmp_path: Path) -> None:
    said, files = profiled(config, tmp_path / "run", "train.profile_steps=3")
    assert [file.name for file in files] == [
        "steps_00000003_00000005.json.gz",
        "steps_00000003_00000005.txt",
    ]
    events = json.loads(gzip.decompress(files[0].read_bytes()))["traceEvents"]
    names = [event.get("name") for event in events]
    num_layers = 2
    assert names.count("neftune_dist::varlen_attention") >= 3 * num_layers
    assert names.count("neftune_dist::add_noise_") >= 3

    table = files[1].read_text()
    by_kind, by_operator = table.split("\n\n")
    shares = {
        row[0]: float(row[1]) for row in re.findall(r"(?m)^(\S.*?) {2,}\S+ +([\d.]+)%$", by_kind)
    }
    assert shares.keys() >= set(KINDS)
    assert sum(shares.values()) == pytest.approx(100, abs=0.1 * len(shares))
    assert all(shares[kind] > 0 for kind in KINDS)
    # Which operators take longest depends on the machine.
    listed = re.findall(r"(?m)^(\S.*?) {2,}[\d.]+ +([\d.]+) +[\d.]+%$", by_operator)
    assert 10 <= len(listed) <= 25
    assert {name for name, _ in listed} <= {str(name)[:58] for name in names}
    times = [float(milliseconds) for _, milliseconds in listed]
    assert times == sorted(times, reverse=True)
    for line in by_kind.splitlines():
        assert line in said
    assert re.search(r"speed: \d+ tokens/s", said)

    plain = tiny_model.train(config, tmp_path / "plain", ranks=2)
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert tiny_model.untimed(records) == tiny_model.untimed(plain)


@pytest.mark.parametrize(
    ("steps", "names"),
    [(4, ["steps_00000003_00000004.json.gz", "steps_00000003_00000004.txt"]), (2, [])],
)
def test_short_run_writes_the_steps_that_there_were(
    steps: int, names: list[str], config: Path, tmp_path: Path
) -> None:
    words = ["train.profile_steps=10", f"train.max_steps={steps}"]
    said, files = profiled(config, tmp_path / "run", *words)
    assert [file.name for file in files] == names
    assert ("nothing was profiled" in said) == (not names)

"""launcher/submit.py, against a Slurm of small shell scripts."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
from huggingface_hub import constants

from neftune_dist import cli
from neftune_dist.cluster.submit import preflight, slurm, snapshot
from neftune_dist.config import Config, load_config

ROOT = Path(__file__).parents[2]
SUBMIT = ROOT / "launcher" / "submit.py"
SIZE = ("--nodes", "2", "--processes", "2", "--time", "01:00:00")
HEAVY = ("torch", "transformers", "datasets")


class Done(NamedTuple):
    code: int
    out: str
    err: str


@dataclass
class Site:
    """A login node: `here` is where the user stands, `calls` what Slurm was asked."""

    here: Path
    answers: Path
    calls: Path
    capture: pytest.CaptureFixture[str]

    def run(self, *words: object) -> Done:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
            patch.setattr(sys, "argv", ["neftune-dist", "submit", *map(str, words)])
            cli.main()
        return Done(left.value.code, *self.capture.readouterr())  # type: ignore[arg-type]

    def ok(self, *words: object) -> str:
        done = self.run(*words)
        assert done.code == 0, done.err
        return done.out

    def answer(self, command: str, text: str, code: int = 0, error: str = "") -> None:
        shown = f"cat <<'END'\n{text}\nEND\n" if text else ""
        failing = f"echo {shlex.quote(error)} >&2\ncode={code}\n"
        (self.answers / command).write_text(shown + failing)

    def asked(self, command: str) -> list[list[str]]:
        files = sorted(self.calls.glob(f"{command}.*"), key=lambda path: int(path.suffix[1:]))
        return [file.read_text().split("\0")[:-1] for file in files]

    def tree(self) -> list[str]:
        return sorted(str(path.relative_to(self.here)) for path in self.here.rglob("*"))


FAKE = """#!/bin/sh
me=$(basename "$0")
n=$(ls "{calls}" | grep -c "^$me\\.")
for word; do printf '%s\\0' "$word"; done >"{calls}/$me.$n"
env >"{calls}/environment-$me"
code=0
if [ -e "{answers}/$me" ]; then
  . "{answers}/$me"
elif [ "$me" = sbatch ]; then
  echo $((100 + n))
fi
exit $code
"""


def weights(path: Path, *shapes: list[int]) -> Path:
    """A safetensors file of these bfloat16 tensors."""
    header, end = {}, 0
    for number, shape in enumerate(shapes):
        size = 2
        for length in shape:
            size *= length
        header[f"t{number}"] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    return path


@pytest.fixture
def site(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Site:
    """A configuration, a model of 1,000 parameters, 80 rows, and a cluster of 4 + 2 nodes."""
    for name in ("here/model", "bin", "answers", "calls", "hub"):
        (tmp_path / name).mkdir(parents=True)
    found = Site(tmp_path / "here", tmp_path / "answers", tmp_path / "calls", capsys)
    for command in ("sbatch", "sinfo", "squeue", "scancel"):
        fake = tmp_path / "bin" / command
        fake.write_text(FAKE.format(calls=found.calls, answers=found.answers))
        fake.chmod(0o755)
    found.answer("sinfo", "main*|4|1-00:00:00|gpu:h100:8(S:0-1)\nsmall|2|infinite|(null)")
    (found.here / "model" / "config.json").write_text("{}")
    weights(found.here / "model" / "model.safetensors", [30, 30], [100])
    (found.here / "rows.jsonl").write_text("{}\n" * 80)
    (found.here / "run.yaml").write_text(
        json.dumps(
            {
                "run_dir": "runs/one",
                "model": {"name_or_path": "model"},
                "data": {"source": "rows.jsonl", "num_held_out": 8},
                "train": {"global_batch_size": 10},
                "checkpoint": {"every_steps": 5},
            }
        )
    )
    monkeypatch.chdir(found.here)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("SBATCH_PARTITION", raising=False)
    # As huggingface_hub reads these where it is imported afterwards.
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return found


# --- refusals -------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def index_without_file(path: Path) -> None:
    path.unlink()
    index = {"weight_map": {"t0": "model-00001-of-00002.safetensors"}}
    path.with_name("model.safetensors.index.json").write_text(json.dumps(index))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def with_checkpoint(path: Path, step: int = 5) -> None:
    mark = path / "checkpoints" / f"step_{step:08d}" / "manifest.json"
    mark.parent.mkdir(parents=True)
    mark.touch()


REFUSALS: list[tuple[str | tuple[str, str], str]] = [
    ("noise.alfa=3", "did you mean noise.alpha?"),
    ("noise.alpha=x", "noise.alpha=x is not a number"),
    ("word", "unknown words: word"),
    ("model.name_or_path=./none", "/here/none is no model directory"),
    ("model.name_or_path=org/name", "HF_HUB_OFFLINE keeps the job from asking the hub"),
    ("model.name_or_path=o/n!", "is neither a directory nor a hub id"),
    ("model.weights=none", "/here/none is no directory"),
    ("model.revision=main", "model.revision=main has no effect"),
    ("data.source=none.jsonl", "/here/none.jsonl does not exist"),
    ("data.source=org/name", "data.source=org/name is not on this machine"),
    ("data.source=../bin", "/bin is a directory without a .json"),
    ("data.source=r*.csv", "/here/r*.csv matches no file"),
    ("data.source=builtin data.mixture=[{source:no.csv}]", "data.mixture[0].source="),
    ("data.source=run.yaml", "/here/run.yaml cannot be read: give a .json"),
    ("data.num_held_out=75", "has 80 rows, too few for one step"),
    ("engine.num_replicas=3", "engine.num_replicas=3 does not divide the 4 processes"),
    ("run_dir=run.yaml/x", "/here/run.yaml is no directory"),
    ("run_dir=/proc/x", "/proc"),
    ("run_dir=~nobody-of-this-name/x", "names no known user"),
    ("run_dir=a\\b", "Slurm cannot log to a backslash"),
    ("checkpoint.resume=none", "is no complete checkpoint directory"),
    ("--nodes 5", "--nodes=5, but the partition main has 4."),
    ("--nodes 0", "argument --nodes: 0 is out of range"),
    ("--nodes 3 --partition small", "--nodes=3, but the partition small has 2."),
    ("--partition huge", "--partition=huge is not known; there are: main, small."),
    ("--time 1-00:00:01", "above the limit of the partition main: ask for 1-00:00:00"),
    ("--time soon", "--time=soon is no time"),
    ("--time 5", "--signal-seconds=300, in which the run saves before its limit"),
    ("--chain 0", "argument --chain: 0 is out of range"),
    ("--array 0-3", "give run_dir=... with {} in it"),
    ("--array 0-3 run_dir={}/../x", "tasks share run_dir="),
    ("--array 1,2 run_dir=${noise.alpha}{} noise.alpha={}", "may differ in the task's index alone"),
    ("--array 0-5000 run_dir={}", "does not name 1 to 1000 tasks"),
    ("--array x run_dir={}", "--array=x is not of the form"),
    ("--array 0-1 run_dir={} optim.warmup_steps=-{}", "optim.warmup_steps=-1 is out of range"),
    ("--sbatch=output=x", "--output is an option of submit.py itself"),
    ("--sbatch=arr=0-3", "--array is an option of submit.py itself"),
    ("--dependency afterok:x", "--dependency=afterok:x is no list of conditions"),
    ("--dependency afterok:1,", "--dependency=afterok:1, is no list of conditions"),
    ("--dependency singleton:1", "--dependency=singleton:1 is no list of conditions"),
    ("--time ٣:00:00", "is no time"),
    ("--signal-seconds 65536", "argument --signal-seconds: 65536 is out of range"),
    (("--mem", ""), "argument --mem: it is empty"),
    ("--sbatch=-N", "--sbatch=-N is no long option"),
    (("--job-name", "a\nb"), "contains control characters"),
    ("--gpus 8", "--gpus"),
]


@pytest.mark.parametrize(("words", "sentence"), REFUSALS, ids=[str(words) for words, _ in REFUSALS])
def test_mistake_is_one_sentence_and_queues_and_writes_nothing(
    site: Site, words: str | tuple[str, str], sentence: str
) -> None:
    before = site.tree()
    done = site.run("run.yaml", *SIZE, *(words.split() if isinstance(words, str) else words))
    assert (done.code, done.out) == (2, "")
    assert sentence in done.err
    assert done.err.startswith("neftune-dist: ")
    assert done.err.count("\n") == 1
    assert site.asked("sbatch") == []
    assert site.tree() == before


@pytest.mark.parametrize(
    ("name", "spoil", "sentence"),
    [
        ("model/model.safetensors", cut, "model.safetensors cannot be read"),
        ("model/model.safetensors", empty, "model.safetensors cannot be read"),
        ("model/model.safetensors", index_without_file, "00001-of-00002.safetensors is missing"),
        ("model/config.json", Path.unlink, "is a directory without a config.json"),
        ("rows.jsonl", empty, "rows.jsonl has no row that can be read"),
        ("rows.jsonl", lambda path: path.write_text(" \n\n"), "rows.jsonl has no row that can"),
        ("rows.jsonl", lambda path: path.write_text("[1, 2"), "rows.jsonl is not valid JSON"),
        ("run.yaml", Path.unlink, "The configuration file run.yaml cannot be read"),
    ],
)
def test_spoilt_files_are_refused(
    site: Site, name: str, spoil: Callable[[Path], object], sentence: str
) -> None:
    spoil(site.here / name)
    before = site.tree()
    done = site.run("run.yaml", *SIZE)
    assert done.code == 2
    assert sentence in done.err
    assert (site.asked("sbatch"), site.tree()) == ([], before)


@pytest.mark.parametrize(
    ("gpus", "partition", "sentence"),
    [
        ("8", "main", None),
        ("h100:8", "main", None),
        ("9", "main", "partition main has 0 such nodes: 4 with gpu:h100:8(S:0-1)"),
        ("a100:1", "main", "partition main has 0 such nodes"),
        ("1", "small", "partition small has 0 such nodes"),
        ("1", "small,main", None),
        ("none", "main", "--gpus-per-node=none is not of the form"),
    ],
)
def test_gpus_are_compared_with_those_of_the_partition(
    site: Site, gpus: str, partition: str, sentence: str | None
) -> None:
    size = ("--nodes", 2, "--gpus-per-node", gpus, "--time", "1:0:0", "--partition", partition)
    done = site.run("run.yaml", *size)
    assert (done.code, len(site.asked("sbatch"))) == ((2, 0) if sentence else (0, 1)), done.err
    if sentence:
        assert sentence in done.err
    else:
        assert f"ranks: {2 * int(gpus[-1])}, {gpus[-1]} on each of 2 nodes" in done.out
        assert (
            f"--processes {gpus[-1]}" in (site.here / "runs/one/submit/0001/job.sbatch").read_text()
        )


def test_nodes_with_enough_gpus_are_counted_over_all_kinds(site: Site) -> None:
    site.answer(
        "sinfo", "main*|1|infinite|gpu:8\nmain*|1|infinite|gpu:a:4,gpu:b:4\nmain*|9|infinite|gpu:2"
    )
    size = ("--gpus-per-node", "8", "--time", "1:0:0")
    assert "has 2 such nodes" in site.run("run.yaml", "--nodes", 3, *size).err
    site.ok("run.yaml", "--nodes", 2, *size)


def test_limit_may_be_the_partitions_own(site: Site) -> None:
    site.ok("run.yaml", *SIZE[:4], "--time", "24:00:00")


def test_folder_that_cannot_be_written_is_refused(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != site.here)  # root may all
    done = site.run("run.yaml", *SIZE)
    assert done.code == 2
    assert f"runs/one cannot be written: {site.here} does not allow it." in done.err


def test_folder_that_train_would_refuse_is_not_written(site: Site) -> None:
    before = site.tree()
    for folder, reason in (("model", "holds config.json"), ("/", "is a root or home directory")):
        done = site.run("run.yaml", *SIZE, f"run_dir={folder}")
        assert done.code == 2 and reason in done.err
    assert site.tree() == before


def test_options_are_required_in_one_sentence(site: Site) -> None:
    assert "arguments are required: --nodes" in site.run("run.yaml", *SIZE[2:]).err
    one_of = "--gpus-per-node or --processes is needed, and only one of them."
    both = ("--gpus-per-node", 1, "--processes", 1)
    for ranks in ((), both):
        assert one_of in site.run("run.yaml", "--nodes", 1, "--time", 9, *ranks).err


@pytest.mark.parametrize("resume", ["never", "elsewhere"])
def test_run_that_the_job_would_not_continue_is_refused(site: Site, resume: str) -> None:
    with_checkpoint(site.here / "runs" / "one")
    done = site.run("run.yaml", *SIZE, f"checkpoint.resume={resume}")
    assert done.code == 2
    assert "holds checkpoints: set another run_dir" in done.err


def test_refusal_of_slurm_is_repeated_and_leaves_nothing(site: Site) -> None:
    reason = "sbatch: error: Which project?\nsbatch: error: Batch job submission failed: Invalid."
    site.answer("sbatch", "", 1, reason)
    before = site.tree()
    done = site.run("run.yaml", *SIZE)
    assert done.code == 2
    sentence = "Slurm refused the job: Which project?; Batch job submission failed: Invalid.\n"
    assert done.err == f"neftune-dist: {sentence}"
    assert site.tree() == before


@pytest.mark.parametrize("said", ["", "slurm 22.05.8"])
def test_sbatch_that_queues_nothing_leaves_nothing(site: Site, said: str) -> None:
    site.answer("sbatch", said)  # such as with --sbatch test-only, or --sbatch version
    before = site.tree()
    done = site.run("run.yaml", *SIZE)
    assert done.code == 2
    assert f"sbatch queued nothing; it says: {said or 'nothing'}\n" in done.err
    assert site.tree() == before


def test_missing_or_silent_slurm_exits_2(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.answer("sinfo", "", 1, "sinfo: error: Unable to contact slurm controller")
    assert "sinfo failed: Unable to contact slurm controller" in site.run("run.yaml", *SIZE).err
    (site.answers / "sinfo").write_text("exec sleep 5")
    monkeypatch.setattr(slurm.run, "__kwdefaults__", {"script": "", "timeout": 0.1})
    assert "Slurm does not answer (sinfo)" in site.run("run.yaml", *SIZE).err
    monkeypatch.setenv("PATH", "/nowhere")
    assert "sinfo was not found" in site.run("run.yaml", *SIZE).err


# --- space ----------------------------------------------------------------------------------------


def disk(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))


def test_checkpoints_must_fit(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 3 * 12 * 1000  # two are kept, and one more is written before the older goes
    disk(needed - 1, monkeypatch)
    done = site.run("run.yaml", *SIZE)
    assert done.code == 2
    assert f"on the disk of {site.here}: set a lower checkpoint.keep" in done.err
    assert not (site.here / "runs").exists()
    site.ok("run.yaml", *SIZE, "checkpoint.keep=1")
    site.ok("run.yaml", *SIZE, "run_dir=small", "optim.states=bf16")  # 8 bytes a parameter
    disk(needed, monkeypatch)
    site.ok("run.yaml", *SIZE, "run_dir=other")


def test_tasks_of_an_array_share_the_space(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    disk(2 * 36_000 - 1, monkeypatch)
    words = ("run.yaml", *SIZE, "run_dir=runs/{}", "--array")
    assert site.run(*words, "0-1").code == 2
    site.ok(*words, "0")


def test_parameters_and_disk_are_predicted(site: Site) -> None:
    shutil.rmtree(site.here / "model")
    (site.here / "model").mkdir()
    (site.here / "model" / "config.json").write_text("{}")
    for number, shape in enumerate(([100_000, 500], [50_000_000])):
        name = f"model-{number}.safetensors"
        size = 2 * math.prod(shape)
        header = {f"t{number}": {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}}
        text = json.dumps(header).encode()
        (site.here / "model" / name).write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(site.here / "model" / name, 8 + len(text) + size)  # without content
    index = {"weight_map": {"t0": "model-0.safetensors", "t1": "model-1.safetensors"}}
    (site.here / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    out = site.ok("run.yaml", *SIZE, "--dry-run")
    assert "model, 100.0 M parameters" in out
    assert "disk: 3 x 1.1 GiB for checkpoints" in out


# --- what is not imported -------------------------------------------------------------------------


def test_torch_is_not_needed(site: Site) -> None:
    """It submits where importing torch and its like fails, and from the tree alone."""
    program = f"""
import runpy, sys
class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY}:
            raise ImportError(name)
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f)]
sys.path = [p for p in sys.path if p != {str(ROOT)!r}]
sys.meta_path.insert(0, Refusing())
sys.argv = ["submit.py", *{["run.yaml", *SIZE]!r}]
try:
    runpy.run_path({str(SUBMIT)!r}, run_name="__main__")
finally:
    print("imported:", *[name for name in {HEAVY} if name in sys.modules])
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("imported:\n")
    assert len(site.asked("sbatch")) == 1


def test_old_python_can_read_the_launcher() -> None:
    """Up to where it starts a newer one, or says that it is too old."""
    text = SUBMIT.read_text()
    ast.parse(text, feature_version=(3, 6))
    head = text[: text.index("sys.path.insert")]
    assert "version_info" in head
    assert set(re.findall(r"^(?:import|from) (\S+)", head, re.MULTILINE)) == {
        "os",
        "sys",
        "importlib.util",
        "pathlib",
    }


# --- the script -----------------------------------------------------------------------------------

ODD = """it's a "$HOME" % run; `x` & #1"""


def tokens(script: str) -> list[str]:
    """What the #SBATCH lines say."""
    lines = re.findall("^#SBATCH (.*)$", script, re.MULTILINE)
    return [token for line in lines for token in shlex.split(line)]


def executed(script: str, folder: Path, **variables: str) -> list[str]:
    """What the batch script executes, in place of python3."""
    (folder / "slurm").mkdir(parents=True)
    (folder / "slurm" / "site.sh").touch()
    (folder / "python3").write_text('#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done\n')
    (folder / "python3").chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", script.replace(str(slurm.ROOT), str(folder))],
        env={"PATH": f"{folder}:/usr/bin:/bin", **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\0")[:-1]


def test_script_is_train_sbatch_with_fixed_arguments(site: Site, tmp_path: Path) -> None:
    out = site.ok("run.yaml", *SIZE, f"run_dir=runs/{ODD}", "--max-restarts", "7")
    run_dir = site.here / "runs" / ODD
    kept = run_dir / "submit" / "0001"
    script = (kept / "job.sbatch").read_text()
    body = re.sub(r"\A(#.*\n)+", "", (ROOT / "slurm" / "train.sbatch").read_text())
    assert script.endswith(body)
    assert script.startswith("#!/usr/bin/env bash\n")
    ran = executed(script, tmp_path / "repository")
    launch = ["-m", "neftune_dist", "launch", str(kept / "config.yaml")]
    options = ["--processes", "2", "--max-restarts", "7", "--rendezvous-minutes", "15"]
    assert ran == [*launch, *options]
    log = str(run_dir).replace("%", "%%") + "/logs/slurm-%j.out"
    assert f"--output={log}" in tokens(script)
    assert (run_dir / "logs").is_dir()
    assert shlex.quote(str(run_dir / "logs" / "slurm-100.out")) in out


def test_options_reach_slurm(site: Site) -> None:
    given = {
        "cpus-per-task": "12",
        "mem": "0",
        "partition": "main,small",
        "account": "a b",
        "qos": "high",
        "constraint": "h100&nvme",
        "exclude": "n[1-2]",
        "job-name": "my $job",
    }
    words = [f"--{name}={value}" for name, value in given.items()]
    extra = ["--mail", "me@x.org", "--sbatch", "exclusive", "--sbatch", "comment=it's"]
    site.ok("run.yaml", *SIZE, *words, *extra, "--signal-seconds", "60")
    script = site.here / "runs" / "one" / "submit" / "0001" / "job.sbatch"
    header = tokens(script.read_text())
    assert {
        *words,
        "--nodes=2",
        "--ntasks-per-node=1",
        "--time=01:00:00",
        "--signal=B:USR1@60",
        "--open-mode=append",
        "--requeue",
        "--mail-user=me@x.org",
        "--mail-type=BEGIN,END,FAIL,REQUEUE",
        "--exclusive",
        "--comment=it's",
        f"--chdir={ROOT}",
        f"--output={script.parents[2]}/logs/slurm-%j.out",
    } == set(header)
    # On the command line, too: the user's SBATCH_ variables would win over the header.
    assert site.asked("sbatch") == [["--parsable", *header, str(script)]]


def test_gpus_reach_slurm_and_the_launcher(site: Site) -> None:
    site.ok("run.yaml", "--nodes", 4, "--gpus-per-node", "h100:8", "--time", "60")
    (asked,) = site.asked("sbatch")
    assert "--gpus-per-node=h100:8" in asked
    assert "--processes 8" in Path(asked[-1]).read_text()


def test_job_does_not_inherit_the_step_it_was_submitted_from(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("WANDB_MODE", "offline")
    site.ok("run.yaml", *SIZE)
    seen = (site.calls / "environment-sbatch").read_text().splitlines()
    assert {"SLURM_CONF=/etc/slurm.conf", "WANDB_MODE=offline"} <= set(seen)
    assert not [line for line in seen if line.startswith("SLURM_STEP")]


# --- the dry run ----------------------------------------------------------------------------------


def test_dry_run_prints_the_script_and_writes_and_queues_nothing(site: Site) -> None:
    site.answer("sbatch", "", 0, "sbatch: Job 7 to start at 2030-01-01T00:00:00")
    before = site.tree()
    out = site.ok("run.yaml", *SIZE, "--dry-run", "--account", "mine")
    assert site.tree() == before
    (asked,) = site.asked("sbatch")
    assert asked[0] == "--test-only"
    assert "Slurm: Job 7 to start at 2030-01-01T00:00:00" in out
    site.answer("sbatch", "100")
    site.ok("run.yaml", *SIZE, "--account", "mine")
    script = (site.here / "runs" / "one" / "submit" / "0001" / "job.sbatch").read_text()
    assert script in out


def test_dry_run_shows_the_answer_of_slurm(site: Site) -> None:
    site.answer("sbatch", "", 1, "allocation failure: Invalid account")
    out = site.ok("run.yaml", *SIZE, "--dry-run")
    assert "Slurm: would not start it now: allocation failure: Invalid account.\n" in out


def test_dry_run_exits_2_where_sbatch_cannot_read_the_options(site: Site) -> None:
    site.answer("sbatch", "", 255, "sbatch: error: Invalid --mem specification")
    done = site.run("run.yaml", *SIZE, "--dry-run", "--mem", "much", "--dependency", "afterok:5")
    assert (done.code, done.out) == (2, "")
    assert "sbatch refuses these options: Invalid --mem specification.\n" in done.err
    assert "--dependency=afterok:5" in site.asked("sbatch")[0]


def test_dry_run_works_without_slurm(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    out = site.ok("run.yaml", *SIZE, "--dry-run")
    assert "#SBATCH --nodes=2" in out
    assert "Slurm: sinfo was not found" in out and "were not looked at" in out


def test_dry_run_works_where_slurms_controller_is_away(site: Site) -> None:
    site.answer("sinfo", "", 1, "sinfo: error: Unable to contact slurm controller")
    out = site.ok("run.yaml", *SIZE, "--dry-run")
    assert "#SBATCH --nodes=2" in out
    assert "Slurm: sinfo failed: Unable to contact slurm controller. Nodes, limits" in out


def test_setting_written_as_an_option_is_shown_as_it_should_be(site: Site) -> None:
    done = site.run("run.yaml", *SIZE, "--noise.alpha", 5)
    assert done.code == 2 and "a setting is written noise.alpha=VALUE" in done.err


# --- the snapshot ---------------------------------------------------------------------------------


def test_snapshot_does_not_follow_later_edits(site: Site) -> None:
    site.ok("run.yaml", *SIZE, "noise.alpha=7", "data.cache_dir=~/x")
    wanted = load_config("run.yaml", ["noise.alpha=7"])
    wanted.run_dir = str(site.here / "runs" / "one")
    wanted.model.name_or_path = str(site.here / "model")
    wanted.data.source = str(site.here / "rows.jsonl")
    wanted.data.cache_dir = str(Path.home() / "x")
    (site.here / "run.yaml").write_text("noise: {alpha: 1}")
    kept = site.here / "runs" / "one" / "submit" / "0001"
    assert asdict(load_config(kept / "config.yaml")) == asdict(wanted)
    assert (kept / "job").read_text() == "100\n"
    words = shlex.split((kept / "words").read_text())
    assert words == [
        "neftune-dist",
        "submit",
        "run.yaml",
        *SIZE,
        "noise.alpha=7",
        "data.cache_dir=~/x",
    ]


def test_paths_become_absolute_and_hub_ids_stay(site: Site) -> None:
    config = Config(run_dir="a")
    config.model.name_or_path, config.model.weights = "org/name", "w"
    config.data.source, config.checkpoint.resume = "tatsu-lab/alpaca", "old/step_00000005"
    config.data.template = "mine.jinja"
    config.evaluate.instructions, config.judge.reference = "i.jsonl", "~/r.json"
    preflight.anchor(config)
    assert config.evaluate.instructions == str(site.here / "i.jsonl")
    assert config.judge.reference == str(Path.home() / "r.json")
    assert config.data.template == str(site.here / "mine.jinja")
    assert (config.model.name_or_path, config.data.source) == ("org/name", "tatsu-lab/alpaca")
    assert config.model.weights == str(site.here / "w")
    assert config.checkpoint.resume == str(site.here / "old" / "step_00000005")
    config.data.source, config.checkpoint.resume = "builtin", "auto"
    config.data.template = "vicuna"
    (site.here / "vicuna").mkdir()  # not the template
    config.evaluate.instructions, config.judge.reference = "held_out", None
    preflight.anchor(config)
    assert (config.evaluate.instructions, config.judge.reference) == ("held_out", None)
    assert (config.data.source, config.checkpoint.resume) == ("builtin", "auto")
    assert config.data.template == "vicuna"


def test_snapshots_are_numbered(site: Site) -> None:
    for number in (1, 2):
        out = site.ok("run.yaml", *SIZE)
        assert (site.here / f"runs/one/submit/{number:04d}/job").exists()
        assert f"as kept in {site.here}/runs/one/submit/{number:04d}\n" in out
    assert snapshot.jobs(site.here / "runs" / "one") == ["100", "101"]
    shutil.rmtree(site.here / "runs/one/submit/0001")
    (site.here / "runs/one/submit/notes").mkdir()
    assert snapshot.next_folder(site.here / "runs/one").name == "0003"


# --- the queue, chains, arrays --------------------------------------------------------------------


def test_run_directory_in_use_is_refused_unless_the_job_waits(site: Site) -> None:
    site.ok("run.yaml", *SIZE)
    site.answer("squeue", "100 RUNNING")
    done = site.run("run.yaml", *SIZE)
    assert done.code == 2
    sentence = f"{site.here}/runs/one is in use by job 100 (running): cancel it, or queue after it"
    assert f"{sentence} with --dependency=afterany:100." in done.err
    assert len(site.asked("sbatch")) == 1
    assert "--jobs=100" in site.asked("squeue")[-1]
    site.ok("run.yaml", *SIZE, "--dependency", "afterok:100")
    assert "--dependency=afterok:100" in site.asked("sbatch")[-1]
    site.ok("run.yaml", *SIZE, "run_dir=other")


def test_jobs_that_slurm_no_longer_knows_are_no_hindrance(site: Site) -> None:
    site.ok("run.yaml", *SIZE)
    site.answer("squeue", "", 1, "slurm_load_jobs error: Invalid job id specified")
    site.ok("run.yaml", *SIZE)
    site.answer("squeue", "", 1, "slurm_load_jobs error: Unable to contact slurm controller")
    assert "squeue failed" in site.run("run.yaml", *SIZE).err


def test_jobs_of_a_chain_wait_for_each_other(site: Site) -> None:
    out = site.ok("run.yaml", *SIZE, "--chain", 3, "--dependency", "afterok:9")
    asked = site.asked("sbatch")
    waits = [[w for w in words if w.startswith("--dependency")] for words in asked]
    assert waits == [
        [f"--dependency={after}"] for after in ("afterok:9", "afterany:100", "afterany:101")
    ]
    kept = site.here / "runs" / "one" / "submit" / "0001"
    assert {words[-1] for words in asked} == {str(kept / "job.sbatch")}
    # Slurm would put a job back into the queue in front of the next link.
    assert all("--no-requeue" in words and "--requeue" not in words for words in asked)
    assert (kept / "job").read_text() == "100\n101\n102\n"
    assert "job: 100 101 102" in out
    assert "stop:     scancel 101 102; scancel --batch --signal=TERM 100" in out
    assert "cancel:   scancel 100 101 102" in out
    assert "pause:" not in out


def test_chain_waits_for_the_job_that_uses_the_run_directory(site: Site) -> None:
    site.ok("run.yaml", *SIZE, "--chain", 2)
    site.answer("squeue", "101 PENDING\n100 RUNNING")
    site.ok("run.yaml", *SIZE, "--chain", 2)
    assert "--dependency=afterany:100:101" in site.asked("sbatch")[2]
    assert "--dependency=afterany:102" in site.asked("sbatch")[3]


def test_chain_is_queued_whole_or_not_at_all(site: Site) -> None:
    (site.answers / "sbatch").write_text(
        'case "$*" in *--dependency*) echo "error: Too many." >&2; code=1 ;; *) echo 55 ;; esac'
    )
    before = site.tree()
    done = site.run("run.yaml", *SIZE, "--chain", 2)
    assert done.code == 2
    assert "Slurm refused the job: Too many." in done.err
    assert site.asked("scancel") == [["55"]]
    assert site.tree() == before


def test_each_task_of_an_array_has_a_snapshot_and_finds_it(site: Site, tmp_path: Path) -> None:
    words = ("run_dir=runs/50%_{}", "noise.alpha={}", "--array", "1,5-7:2%2")
    out = site.ok("run.yaml", *SIZE, *words)
    (asked,) = site.asked("sbatch")
    assert "--array=1,5-7:2%2" in asked
    assert f"--output={site.here}/runs/50%%_%a/logs/slurm-%A_%a.out" in asked
    assert "--job-name=50%_{}" in asked
    script = Path(asked[-1]).read_text()
    for index in (1, 5, 7):
        kept = site.here / f"runs/50%_{index}/submit/0001"
        config = load_config(kept / "config.yaml")
        assert (config.noise.alpha, config.run_dir) == (index, str(kept.parents[1]))
        assert (kept / "job").read_text() == f"100_{index}\n"
        assert (kept / "job.sbatch").read_text() == script
        folder = tmp_path / f"repository{index}"
        ran = executed(script, folder, SLURM_ARRAY_TASK_ID=str(index))
        assert ran[2:6] == ["launch", str(kept / "config.yaml"), "--processes", "2"]
        assert (kept.parents[1] / "logs").is_dir()
    assert f"tail -F {site.here}/runs/50%_1/logs/slurm-100_1.out" in out
    assert f"tensorboard --logdir {site.here}/runs\n" in out
    site.answer("squeue", "100_5 RUNNING")
    done = site.run("run.yaml", *SIZE, *words)
    assert "A run directory is in use by job 100_5 (running)" in done.err
    assert "--dependency=afterany:100." in done.err


def test_commands_to_watch_and_to_stop_are_printed(site: Site) -> None:
    out = site.ok("run.yaml", *SIZE)
    for line in (
        "squeue --jobs=100",
        f"tail -F {site.here}/runs/one/logs/slurm-100.out",
        f"tensorboard --logdir {site.here}/runs/one/tensorboard",
        "scancel --batch --signal=TERM 100",
        "scancel --batch --signal=USR1 100",
    ):
        assert line in out


# --- prediction -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "steps: about 24"),  # 3 epochs of (80 - 8) / 10 steps, the last of each a short one
        (("train.num_epochs=1",), "steps: about 8"),
        (("train.max_steps=5",), "steps: 5\n"),
        (("data.source=builtin",), "steps: about 900"),
    ],
)
def test_steps_are_predicted(site: Site, words: tuple[str, ...], line: str) -> None:
    assert line in site.ok("run.yaml", *SIZE, *words, "--dry-run")


def measured(site: Site, *steps: tuple[float, int], published: int) -> None:
    run_dir = site.here / "runs" / "one"
    with_checkpoint(run_dir, published)
    rows = [
        json.dumps({"step": i, "step_seconds": seconds, "world_size": size})
        for i, (seconds, size) in enumerate(steps, 1)
    ]
    (run_dir / "metrics.jsonl").write_text("\n".join([*rows, '{"step_sec']))


def test_time_is_predicted_from_steps_on_as_many_ranks(site: Site) -> None:
    measured(site, (1000.0, 8), (90.0, 4), (100.0, 4), (990.0, 4), published=2)
    out = site.ok("run.yaml", *SIZE, "--dry-run", "train.max_steps=110")
    assert "steps: 110, 108 of them left" in out
    assert "time: about 3 h 0 min for the steps left, 100 s a step (median of 3 on 4 ranks)" in out
    # Of an hour, five minutes are for saving.
    assert "time: that is about 4 times --time=01:00:00: it requeues itself" in out
    out = site.ok("run.yaml", *SIZE, "--dry-run", "train.max_steps=110", "--chain", 3)
    assert "--chain=3 is too short" in out
    out = site.ok("run.yaml", *SIZE, "--dry-run", "train.max_steps=110", "--chain", 4)
    assert "too short" not in out


def test_time_is_never_guessed(site: Site) -> None:
    unknown = "time: not known before the run has recorded a step on 4 ranks"
    assert unknown in site.ok("run.yaml", *SIZE, "--dry-run")
    measured(site, (1.0, 8), published=2)
    assert unknown in site.ok("run.yaml", *SIZE, "--dry-run")


def test_finished_run_has_no_steps_left(site: Site) -> None:
    measured(site, (1.0, 4), published=10)
    out = site.ok("run.yaml", *SIZE, "--dry-run", "train.max_steps=10")
    assert "steps: 10, none of them left" in out


# --- what lies on this machine --------------------------------------------------------------------


@pytest.mark.parametrize("reference", [True, False])
def test_cached_model_is_found_offline(site: Site, tmp_path: Path, reference: bool) -> None:
    commit = "0123456789" * 4
    root = tmp_path / "hub" / "hub" / "models--org--name"
    folder = root / "snapshots" / commit
    folder.mkdir(parents=True)
    weights(folder / "model.safetensors", [2_000_000])
    words = ["run.yaml", *SIZE, "--dry-run", "model.name_or_path=org/name"]
    if reference:
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(commit)
    else:
        assert site.run(*words).code == 2
        words.append(f"model.revision={commit}")
    assert "model: org/name, 2.0 M parameters\n" in site.ok(*words)


def test_cached_dataset_is_found_offline(site: Site, tmp_path: Path) -> None:
    words = ("run.yaml", *SIZE, "--dry-run", "data.source=org/rows", "train.max_steps=3")
    assert site.run(*words).code == 2
    (tmp_path / "hub" / "datasets" / "org___rows").mkdir(parents=True)
    assert "data: org/rows, rows not counted here" in site.ok(*words)


def test_model_and_data_of_the_hub_are_left_to_the_job(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    out = site.ok("run.yaml", *SIZE, "model.name_or_path=org/name", "data.source=org/rows")
    assert "model: org/name, size not known from here, which the job takes from the hub" in out
    assert "disk: not checked" in out


def test_hub_is_read_from_the_sites_settings(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "ROOT", tmp_path)
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "site.sh").write_text(
        "export HF_HUB_OFFLINE=yes HF_HOME=/shared/hf; echo hi"
    )
    slurm.adopt_site()
    assert (os.environ["HF_HUB_OFFLINE"], os.environ["HF_HOME"]) == ("yes", "/shared/hf")
    program = "from huggingface_hub import constants as c; print(c.HF_HUB_OFFLINE, c.HF_HUB_CACHE)"
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert done.stdout == "True /shared/hf/hub\n"


def test_verb_submit_does_what_the_script_does(site: Site) -> None:
    words = ["run.yaml", *SIZE, "--dry-run"]
    script = site.run(*words)
    with pytest.raises(SystemExit) as left:
        cli.main(["submit", *words])
    assert left.value.code == script.code == 0
    assert site.capture.readouterr().out == script.out


def test_folder_without_the_batch_scripts_is_refused(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the package was installed from a wheel."""
    monkeypatch.setattr(slurm, "ROOT", site.here)
    done = site.run("run.yaml", *SIZE)
    assert done.code == 2 and "neftune-dist init --slurm" in done.err
    with pytest.raises(SystemExit):
        cli.main(["init", "--slurm"])
    assert site.run("run.yaml", *SIZE, "--dry-run").code == 0

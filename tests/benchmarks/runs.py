"""Training runs through the real command line, for the benchmarks that compare them."""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from neftune_dist.config import load_config
from neftune_dist.system.processor import processor_name

ROOT = Path(__file__).parents[2]
_TICKS = os.sysconf("SC_CLK_TCK")
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Finished:
    """A process that came to its end.

    out: what it printed. marks: seconds of processor time that it had used when each line of the
    watched file was there. others: share of the machine's cores that other processes took
    meanwhile. load: the machine's load average over a minute, just before.
    """

    out: str
    marks: list[float]
    others: float
    load: float


def common_arguments(description: str) -> argparse.ArgumentParser:
    """What every comparison of training runs takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a Hugging Face model directory")
    parser.add_argument("data", type=Path, help="rows, as data.source takes them")
    parser.add_argument("--rounds", type=int, default=3, help="of all contenders in turn")
    parser.add_argument("--steps", type=int, default=1, help="counted, a round and contender")
    # Memory that a process touches for the first time takes longer, in the first two steps.
    few = {"type": int, "choices": range(1, 100), "metavar": "N"}
    parser.add_argument("--warm-up", default=2, help="steps before, not counted", **few)
    parser.add_argument("--documents", type=int, default=16, help="a step, over all ranks")
    parser.add_argument("--length", type=int, default=512, help="most tokens of a document")
    parser.add_argument("--micro-batch-tokens", type=int, default=1024, help="ours, a forward")
    parser.add_argument("--alpha", type=float, default=5.0, help="noise; 0: none")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"], help="of all")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="ours")
    return parser


def settings(args: argparse.Namespace, seed: int) -> list[str]:
    """This package's, as `key=value` words. seed: of the round; it decides the documents."""
    return [
        f"model.name_or_path={args.model}",
        f"model.dtype={args.dtype}",
        f"data.source={args.data}",
        f"data.max_length={args.length}",
        f"noise.alpha={args.alpha}",
        f"optim.learning_rate={args.learning_rate}",
        "optim.schedule=constant",
        f"train.global_batch_size={args.documents}",
        f"train.micro_batch_tokens={args.micro_batch_tokens}",
        f"train.max_steps={args.warm_up + args.steps}",
        f"train.seed={seed}",
        "checkpoint.mode=sync",
        *args.set,
    ]


def environment(threads: int) -> dict[str, str]:
    """So many threads a process, no GPU, no hub; and this checkout's package."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def run(
    words: Sequence[object], threads: int, limit_seconds: float, watched: Path | None = None
) -> Finished:
    """Run Python with these words, and see what else the machine did meanwhile.

    Raises:
        SystemExit: it failed, or was not done within the limit; with the end of what it said.
    """
    load = os.getloadavg()[0]
    began, busy, own = time.monotonic(), _busy_seconds(), _seconds_of_children()
    marks: list[float] = []
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            [sys.executable, *map(str, words)], env=environment(threads), stdout=out, stderr=err
        )
        try:
            while process.poll() is None and time.monotonic() - began < limit_seconds:
                if watched is not None and watched.exists():
                    number = watched.read_bytes().count(b"\n")
                    marks += [_seconds_of(process.pid)] * (number - len(marks))
                time.sleep(_POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
        out.seek(0)
        err.seek(0)
        said = out.read()
        if process.returncode:
            raise SystemExit(f"{' '.join(map(str, words))}\n{(said + err.read())[-3000:]}")
    others = _busy_seconds() - busy - (_seconds_of_children() - own)
    cores = len(os.sched_getaffinity(0))
    share = max(0.0, others / (time.monotonic() - began) / cores)
    return Finished(said, marks, share, load)


def train(
    words: Sequence[str], *, ranks: int, threads: int, limit_seconds: float
) -> tuple[list[dict[str, Any]], Finished]:
    """Train with these `key=value` words in a run directory of its own; the steps' records."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = ["logging.progress=false", "logging.tensorboard=false"]
        config = Path(folder) / "config.yaml"
        config.write_text(load_config(None, [*words, *quiet, f"run_dir={folder}/run"]).to_yaml())
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        done = run(
            [*(launcher if ranks > 1 else []), "-m", "neftune_dist", "train", config],
            threads,
            limit_seconds,
            watched=Path(folder) / "run/metrics.jsonl",
        )
        lines = (Path(folder) / "run/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], done


def median_ratio(above: Sequence[float], below: Sequence[float]) -> str:
    """Of figures measured in turn, round by round: the ratio's median, and its least and most."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def spread(figures: Sequence[float]) -> str:
    """Median, and the least and the most."""
    return f"{statistics.median(figures):.1f} ({min(figures):.1f}, {max(figures):.1f})"


def environment_line(packages: Sequence[str]) -> str:
    """Date, machine and versions."""
    found = ", ".join(f"{name} {version(name)}" for name in packages)
    cores = len(os.sched_getaffinity(0))
    return f"{time.strftime('%Y-%m-%d')}, {processor_name()}, {cores} cores, {found}"


def show(rows: Mapping[str, Sequence[object]], heads: Sequence[str]) -> None:
    """A table: a name and a column for each head."""
    lines = [["", *heads], *([name, *map(str, cells)] for name, cells in rows.items())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, *cells in lines:
        line = "".join(f"  {c:>{w}}" for c, w in zip(cells, widths[1:], strict=True))
        print(f"{name:{widths[0]}}{line}")


def _busy_seconds() -> float:
    """Of all cores, for all processes, since the machine started: user, nice and system time."""
    user, nice, system = Path("/proc/stat").read_text().split()[1:4]
    return (int(user) + int(nice) + int(system)) / _TICKS


def _seconds_of(process: int) -> float:
    """Processor time of a process and its threads; 0 where it has ended."""
    try:
        after_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(after_name[11]) + int(after_name[12])) / _TICKS


def _seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime

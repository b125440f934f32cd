"""The runs of a study, and the processes that train and evaluate them.

Every run is an ordinary `neftune-dist train` and `neftune-dist evaluate`, so the same command
continues a stopped study: `train` skips finished runs, `evaluate` keeps what was measured with the
same settings. Imports no torch: a batch script gets a run's words from here.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from subprocess import PIPE, Popen
from types import FrameType

from neftune_dist.config import WHILE_TRAINING, Config
from neftune_dist.distributed.outcome import EXIT_STOPPED
from neftune_dist.system import children

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def pairs(alphas: Sequence[float], seeds: Sequence[int]) -> list[tuple[float, int]]:
    """Alpha and seed of each run, by its number: all alphas of a seed, then of the next."""
    return [(alpha, seed) for seed in seeds for alpha in alphas]


def run_dir(folder: Path, alpha: float, seed: int) -> Path:
    """The directory of one run of the study in `folder`."""
    return folder / f"alpha_{plain(alpha)}_seed_{seed}"


def run_words(settings: Sequence[str], folder: Path, alpha: float, seed: int) -> list[str]:
    """The words after `train CONFIG` for one run of a study.

    Args:
        settings: the study's `key=value` words.
        folder: of the study.
        alpha: of the run.
        seed: of the run, as train.seed.
    """
    place = f"run_dir={run_dir(folder, alpha, seed)}"
    return [*settings, *noise_words(alpha), f"train.seed={seed}", place]


def noise_words(alpha: float) -> list[str]:
    """Words that set alpha, whatever noise the configuration has."""
    # A configuration gives noise.seed for the other runs.
    return [f"noise.alpha={plain(alpha)}", *([] if alpha else ["noise.seed=null"])]


def evaluation_words(config: Config) -> list[str]:
    """The words after `evaluate RUN_DIR`: the study's settings, even where the run was trained with
    others."""
    # Without answers to beat, `evaluate` asks no judge.
    judge = asdict(config.judge) if config.judge.reference else {"reference": None}
    return [
        f"{section}.{key}={'null' if value is None else value}"
        for section, values in (("evaluate", asdict(config.evaluate)), ("judge", judge))
        for key, value in values.items()
        if key not in WHILE_TRAINING
    ]


def evaluation_folder(run: Path, step: int) -> Path:
    """The folder into which `evaluate` writes the results of a run at `step`."""
    return run / "evaluations" / f"step_{step:08d}"


def is_finished(run: Path) -> bool:
    """Whether a run has been evaluated."""
    return any(run.glob("evaluations/*/summary.json"))


def perform(train: Sequence[str], evaluate: Sequence[str], num_ranks: int) -> tuple[int, str]:
    """Train and evaluate one run; finished parts are skipped.

    Args:
        train: words after `train`.
        evaluate: words after `evaluate`.
        num_ranks: processes of the run.

    Returns:
        Exit code (75: stopped), and the last line of standard error.
    """
    launcher = ["-m", "neftune_dist.cluster.launch.torchrun", f"--nproc_per_node={num_ranks}"]
    command = [sys.executable, *(launcher if num_ranks > 1 else []), "-m", "neftune_dist"]
    code, last_line = execute([*command, "train", *train])
    return (code, last_line) if code else execute([*command, "evaluate", *evaluate])


def execute(command: Sequence[str]) -> tuple[int, str]:
    """Run a command, passing stop signals on as SIGTERM. Return its exit code (75: stopped) and the
    last line of standard error, or which signal ended it."""
    # In a new session the run gets Ctrl-C from this process alone, not from the terminal, too.
    process = Popen(
        command,
        stderr=PIPE,
        errors="replace",
        start_new_session=True,
        preexec_fn=children.ended_with_parent(),
    )
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        process.terminate()

    before = {number: signal.signal(number, stop) for number in _STOP_SIGNALS}
    last_line, launcher_speaks = "", False
    try:
        for line in process.stderr or ():
            print(line, end="", file=sys.stderr, flush=True)
            # torchrun's own report of a failed rank comes after what the rank said.
            launcher_speaks |= "torch/distributed/elastic/" in line
            last_line = last_line if launcher_speaks else line.strip() or last_line
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code < 0:
        memory = ", perhaps out of memory" if -code == signal.SIGKILL else ""
        last_line = f"ended by {signal.Signals(-code).name}{memory}"
    return EXIT_STOPPED if stopped else code, last_line


def plain(alpha: float) -> str:
    """Alpha as in the names of run directories: 5, 2.5."""
    return str(int(alpha)) if float(alpha).is_integer() else repr(alpha)

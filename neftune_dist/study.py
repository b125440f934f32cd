"""`neftune-dist study`: runs that differ in alpha and seed alone, compared pair by pair.

Each run is `neftune-dist train` in a process of its own, so that the same command continues a study
that was stopped: finished runs say so and are read again. Runs of one seed take the same documents
in the same steps (law 4), which is checked, and so their held-out losses are compared in pairs. No
effect is claimed that the seeds cannot tell from chance.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from subprocess import PIPE, Popen
from types import FrameType
from typing import Any

from neftune_dist.config import UserError, load_config

EXIT_STOPPED = 75
_FEWEST_SEEDS = 3  # below, an interval over seeds means nothing
_RESAMPLES = 10_000
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@dataclass(frozen=True)
class Run:
    """What a finished run says of itself. Losses are means over supervised tokens."""

    alpha: float
    seed: int
    first: float  # held-out loss before training
    last: float  # and after it
    training: float  # loss over the last tenth of the steps, noise on
    noise_norm: float  # mean over the steps
    noise_law: float  # what the noise law says that it should be
    steps: list[tuple[int, int, int]]  # of each step: number, tokens, supervised tokens


def study(
    config_path: str | os.PathLike[str],
    settings: Sequence[str],
    *,
    alphas: Sequence[float],
    num_seeds: int,
    num_ranks: int,
) -> int:
    """Train at each of `alphas` and `num_seeds` seeds from `train.seed` on; write report.md.

    The configuration's `run_dir` is the study's directory, and its `noise.alpha` is overridden.
    `num_ranks` processes share a run, on this machine. The exit code: 0 done; 75 stopped, the same
    command continues; else that of the run that failed. Raises `UserError` for what cannot be
    studied, before the first run, and for runs that cannot be compared.
    """
    if "RANK" in os.environ:
        raise UserError("study starts its runs itself: call it without torchrun, with --ranks.")
    if num_seeds < 1 or num_ranks < 1:
        raise UserError(f"--seeds={num_seeds} and --ranks={num_ranks} must both be 1 or more.")
    if not alphas or len(set(alphas)) < len(alphas):
        raise UserError(f"--alphas={','.join(map(_plain, alphas))}: the values must be distinct.")
    configs = [load_config(config_path, [*settings, *_noise_words(alpha)]) for alpha in alphas]
    if not configs[0].data.holds_out:
        raise UserError("data.num_held_out=0, but a study compares held-out losses: set it.")
    folder = Path(configs[0].run_dir).expanduser()
    pairs = [(configs[0].train.seed + i, alpha) for i in range(num_seeds) for alpha in alphas]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    command = [sys.executable, *(launcher if num_ranks > 1 else []), "-m", "neftune_dist", "train"]
    runs: list[Run] = []
    for seed, alpha in pairs:
        what = f"run {len(runs) + 1} of {len(pairs)} (alpha {_plain(alpha)}, seed {seed})"
        print(f"study: {what}", flush=True)
        words = run_words(settings, folder, alpha, seed)
        code, last_line = _execute([*command, str(config_path), *words])
        if code:
            fate = f"failed with exit code {code}: {last_line}"
            fate = "stopped; the same command continues" if code == EXIT_STOPPED else fate
            print(f"study: {what} {fate}", file=sys.stderr, flush=True)
            return max(code, 1)  # a run that a signal ended has a code below 0
        runs.append(read_run(_run_dir(folder, alpha, seed), alpha, seed))
    (folder / "report.md").write_text(report(runs))
    print(f"\n{report(runs)}\nstudy: done, the report is {folder / 'report.md'}", flush=True)
    return 0


def run_words(settings: Sequence[str], folder: Path, alpha: float, seed: int) -> list[str]:
    """What `train` is given after the configuration, for one run of the study in `folder`."""
    run_dir = _run_dir(folder, alpha, seed)
    return [*settings, *_noise_words(alpha), f"train.seed={seed}", f"run_dir={run_dir}"]


def read_run(run_dir: Path, alpha: float, seed: int) -> Run:
    """A finished run, from its metrics.jsonl and evaluations.jsonl. Raises `UserError`."""
    steps = _read(run_dir / "metrics.jsonl")
    held_out = {row["step"]: row["held_out_loss"] for row in _read(run_dir / "evaluations.jsonl")}
    if not steps or not {0, steps[-1]["step"]} <= held_out.keys():
        raise UserError(f"{run_dir} lacks the held-out loss before or after its training.")
    # A step that was skipped may have no loss.
    losses = [s["loss"] for s in steps[-max(1, len(steps) // 10) :] if s["loss"] is not None]
    if not losses or None in (held_out[0], held_out[steps[-1]["step"]]):
        raise UserError(f"{run_dir} has no finite loss before or after its training.")
    return Run(
        alpha=alpha,
        seed=seed,
        first=held_out[0],
        last=held_out[steps[-1]["step"]],
        training=fmean(losses),
        noise_norm=fmean(step["noise_norm"] for step in steps),
        noise_law=fmean(step["noise_law"] for step in steps),
        steps=[(s["step"], s["num_tokens"], s["num_supervised_tokens"]) for s in steps],
    )


def report(runs: Sequence[Run]) -> str:
    """Means per alpha, paired differences, a conclusion in words: Markdown. `runs` go by seed."""
    base, *others = sorted({run.alpha for run in runs})
    by_alpha = {alpha: [run for run in runs if run.alpha == alpha] for alpha in [base, *others]}
    seeds = [run.seed for run in by_alpha[base]]
    means, differences, conclusions = [], [], []
    for alpha, these in by_alpha.items():
        rows = [(r.first, r.last, r.training, r.noise_norm, r.noise_law) for r in these]
        figures = map(fmean, zip(*rows, strict=True))
        means.append([_plain(alpha), *(f"{figure:.4f}" for figure in figures)])
    for alpha in others:
        paired = list(zip(by_alpha[alpha], by_alpha[base], strict=True))
        if any(one.steps != two.steps for one, two in paired):
            what = f"runs of alpha {_plain(alpha)} and {_plain(base)}"
            raise UserError(f"The {what} differ in their documents or steps: set another run_dir.")
        values = [one.last - two.last for one, two in paired]
        bounds = interval(values)
        shown = f"{bounds[0]:+.4f} to {bounds[1]:+.4f}" if bounds else "too few seeds"
        signed = [f"{value:+.4f}" for value in [*values, fmean(values)]]
        differences.append([_plain(alpha), *signed, shown])
        conclusions.append(f"- alpha {_plain(alpha)}: {conclusion(values, bounds)}")
    heads = ["alpha", "held-out loss before", "held-out loss after"]
    heads += ["training loss, last tenth of steps, noise on", "noise norm", "noise law"]
    paired_heads = ["alpha", *(f"seed {seed}" for seed in seeds), "mean", "95 % interval"]
    return f"""# Study of noise.alpha

{len(runs)} runs of {len(runs[0].steps)} steps; seeds: {", ".join(map(str, seeds))}.

## Means over the seeds

{_table(heads, means)}

## Held-out loss after training, minus that of alpha {_plain(base)} at the same seed

{_table(paired_heads, differences)}

Below zero is better. The interval is of the mean: a bootstrap over seeds, too narrow while these
are few, and for each alpha by itself.

## Conclusion

{chr(10).join(conclusions) or "- one alpha alone: nothing to compare."}

Held-out loss is all that was compared; the quality of answers is another matter.
"""


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Bootstrap 95 % interval of the mean, the same at every call; None for too few values."""
    if len(values) < _FEWEST_SEEDS:
        return None
    draw = random.Random(0)
    means = sorted(fmean(draw.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    return means[_RESAMPLES // 40], means[-1 - _RESAMPLES // 40]


def conclusion(values: Sequence[float], bounds: tuple[float, float] | None) -> str:
    """What the paired differences `values` of held-out loss and their interval allow to say."""
    if bounds is None:
        seeds = "1 seed is" if len(values) == 1 else f"{len(values)} seeds are"
        return f"no difference seen: {seeds} too few to tell noise from effect."
    if bounds[0] <= 0 <= bounds[1]:
        return "no difference seen: the interval includes 0."
    direction = "lower" if bounds[1] < 0 else "higher"
    return f"held-out loss {direction} by {abs(fmean(values)):.4f}; the interval excludes 0."


def _run_dir(folder: Path, alpha: float, seed: int) -> Path:
    return folder / f"alpha_{_plain(alpha)}_seed_{seed}"


def _noise_words(alpha: float) -> list[str]:
    # noise.seed contradicts alpha 0; a configuration gives it for the other runs.
    return [f"noise.alpha={_plain(alpha)}", *([] if alpha else ["noise.seed=null"])]


def _execute(command: Sequence[str]) -> tuple[int, str]:
    """Run to the end, passing stop signals on as SIGTERM: exit code (75: stopped), last stderr."""
    # In a session of its own the run hears of Ctrl-C from here alone, not from the terminal, too.
    process = Popen(command, stderr=PIPE, errors="replace", start_new_session=True)
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
    return EXIT_STOPPED if stopped and code else code, last_line


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def _table(heads: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---:"] * len(heads), *rows])


def _plain(alpha: float) -> str:
    return str(int(alpha)) if float(alpha).is_integer() else repr(alpha)

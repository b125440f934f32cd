"""`neftune-dist study`: train and evaluate the missing runs, judge their answers, report.

Mistakes are refused before the first run; so are runs that cannot be compared.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean

from neftune_dist.config import (
    Config,
    UserError,
    check_evaluation_packages,
    check_packages,
    load_config,
    user_path,
)
from neftune_dist.evaluation.judge import compare
from neftune_dist.evaluation.tasks import check_known, read_words
from neftune_dist.evaluation.win_rate import Judgement
from neftune_dist.study import grid, report
from neftune_dist.study.design import check_items, power_line
from neftune_dist.study.grid import plain, run_dir
from neftune_dist.study.measures import Judged
from neftune_dist.study.results import Run, alphas_of, check_as_asked, check_comparable, read_run
from neftune_dist.system import storage
from neftune_dist.system.text import duration_text


def study(
    config_path: str | os.PathLike[str],
    settings: Sequence[str],
    *,
    alphas: Sequence[float],
    num_seeds: int,
    num_ranks: int,
    only: int | None = None,
    report_only: bool = False,
) -> int:
    """Train and evaluate at each of `alphas` and `num_seeds` seeds from `train.seed` on; report.

    The configuration's `run_dir` is the study's directory, and its `noise.alpha` is overridden.

    Args:
        config_path: a configuration's path or the name of a shipped one.
        settings: `key=value` words.
        alphas: the least one is what the others are compared with.
        num_seeds: seeds train.seed, train.seed + 1, ...
        num_ranks: processes of a run, on this machine.
        only: number of a run, from 0, to make alone, without a report: a task of a job array.
        report_only: make no run; all must be finished.

    Returns:
        Exit code: 0 done; 75 stopped, the same command continues; else that of the failed run.

    Raises:
        UserError: what cannot be studied, before the first run; runs that cannot be compared.
    """
    if "RANK" in os.environ:
        raise UserError("study starts its runs itself: call it without torchrun, with --ranks.")
    if len(set(alphas)) < len(alphas):
        raise UserError(f"--alphas={','.join(map(plain, alphas))}: the values must be distinct.")
    # At all alphas, of which a configuration may refuse some.
    config, *_ = [load_config(config_path, [*settings, *grid.noise_words(a)]) for a in alphas]
    check_items(config)
    folder = user_path(config.run_dir, "run_dir")
    seeds = range(config.train.seed, config.train.seed + num_seeds)
    load_config(config_path, grid.run_words(settings, folder, alphas[0], seeds[-1]))
    places = grid.pairs(alphas, seeds)
    if only is not None and not 0 <= only < len(places):
        raise UserError(f"--only={only}: the runs of this study are 0 to {len(places) - 1}.")
    power = power_line(config, num_seeds)
    if not report_only:
        # Before hours of training.
        check_packages(config)
        check_evaluation_packages(config)
        check_known(read_words(config.evaluate.tasks, config.evaluate.max_task_items))
        report.claim(folder)
        print(f"study: {power}", flush=True)
        asked = range(len(places)) if only is None else [only]

        def run(alpha: float, seed: int) -> tuple[int, str]:
            train = [str(config_path), *grid.run_words(settings, folder, alpha, seed)]
            evaluate = [str(run_dir(folder, alpha, seed)), *grid.evaluation_words(config)]
            return grid.perform(train, evaluate, num_ranks)

        if code := _make(asked, places, folder, run):
            return code
    if only is not None:
        return 0
    runs = [read_run(run_dir(folder, *place), *place) for place in places]
    check_comparable(runs)
    if report_only:  # otherwise the runs themselves have refused what differs
        words = grid.run_words(settings, folder, runs[0].alpha, runs[0].seed)
        check_as_asked(runs[0], load_config(config_path, words))
    report.claim(folder)
    with storage.hold(folder / ".lock", f"{folder} is being reported on by another study."):
        _report(runs, config, folder, power)
    return 0


def _make(
    asked: Sequence[int],
    places: Sequence[tuple[float, int]],
    folder: Path,
    run: Callable[[float, int], tuple[int, str]],
) -> int:
    """Make the runs with the numbers `asked`, one after another; stop at the first that fails.

    Args:
        asked: numbers of runs.
        places: alpha and seed of all runs of the study.
        folder: of the study.
        run: makes one; returns its exit code and the last line that it said.

    Returns:
        Exit code: 0, or of the run that stopped or failed.
    """
    left = [number for number in asked if not grid.is_finished(run_dir(folder, *places[number]))]
    seconds: list[float] = []  # that each of the runs made so far took
    for number in asked:
        alpha, seed = places[number]
        shown = f"study: run {number + 1} of {len(places)} (alpha {plain(alpha)}, seed {seed})"
        time_left = f", about {duration_text(fmean(seconds) * len(left))} left" if seconds else ""
        print(f"{shown}{time_left if left else ''}", flush=True)
        begin = time.monotonic()
        code, last = run(alpha, seed)
        if code:
            outcome = f"failed with exit code {code}: {last}"
            if code == grid.EXIT_STOPPED:
                outcome = "stopped; the same command continues"
            print(f"{shown} {outcome}", file=sys.stderr, flush=True)
            return max(code, 1)  # a run that a signal ended has a code below 0
        if number in left:
            left.remove(number)
            seconds.append(time.monotonic() - begin)
    return 0


def _report(runs: Sequence[Run], config: Config, folder: Path, power: str) -> None:
    notes = _missing(runs, config)
    judged: Judged = {}
    failure = None
    try:
        judged = _judged(runs, config, folder)
    except UserError as error:  # what has been measured is reported all the same
        failure = error
        notes.append(f"Win rates: the judge was not available. {error}")
    text = report.write(folder, runs, judged, notes, power)
    where = f"{folder / 'report.md'} and report.html"
    print(f"\n{text}\nstudy: done, the report is {where}", flush=True)
    if failure:
        raise failure


def _judged(runs: Sequence[Run], config: Config, folder: Path) -> Judged:
    """Answers of every other alpha compared with those of the least one at the same seed."""
    if not _has_judge(config):
        return {}
    base = alphas_of(runs)[0]
    answers = {(run.alpha, run.seed): run.answers for run in runs if run.answers}
    chosen = [key for key in answers if key[0] != base and (base, key[1]) in answers]
    # One call for all runs applies the endpoint's limits of cost and requests to the whole study;
    # the alpaca_eval package takes one set of answers at a time.
    by_package, into = bool(config.judge.annotator), folder / "judgements"
    judged: dict[tuple[float, int], Sequence[Judgement]] = {}
    for group in filter(None, [[key] for key in chosen] if by_package else [chosen]):
        ours = [answer for key in group for answer in answers[key]]
        theirs = [answer for _, seed in group for answer in answers[base, seed]]
        place = run_dir(into, *group[0]) if by_package else into
        found = iter(compare(ours, theirs, config.judge, place, partial(print, flush=True)))
        judged |= {key: list(islice(found, len(answers[key]))) for key in group}
    return judged


def _has_judge(config: Config) -> bool:
    return bool(config.judge.url or config.judge.annotator)


def _missing(runs: Sequence[Run], config: Config) -> list[str]:
    """Why sections of the report are missing."""
    without = [run.folder.name for run in runs if not run.summary]
    if without:
        return [
            f"Answers, tasks, losses by document: {', '.join(without)} had no evaluation, which "
            "the same command without --report-only makes."
        ]
    notes = {
        "Losses of training documents: set `evaluate.train_documents`.": not any(
            "train_loss" in run.figures("losses") for run in runs
        ),
        "Answers: set `evaluate.instructions`.": not any(run.figures("answers") for run in runs),
        "Abilities: `evaluate.tasks` names none.": not any(run.figures("tasks") for run in runs),
        "Win rates: no judge is configured (`judge.url`), so no answers were judged.": (
            not _has_judge(config)
        ),
    }
    return [note for note, is_missing in notes.items() if is_missing]

"""Verbs on what a run has made."""

from __future__ import annotations

import os
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any, Literal

from neftune_dist.arguments import (
    CONFIG,
    EVALUATION_SETTINGS,
    OUTPUT,
    RUN_DIR,
    STEP,
    Words,
    argument,
    bounded,
    flag,
    verb,
)
from neftune_dist.config import UserError, require, user_path
from neftune_dist.distributed import environment, outcome
from neftune_dist.distributed.signals import StopSignal
from neftune_dist.system import garbage


@verb(
    RUN_DIR,
    flag("--once", "print one screen, as without a terminal"),
    argument(
        "--every",
        type=bounded(float, 0.1, 2**20),
        default=5.0,
        metavar="SECONDS",
        help="between two screens; default: %(default)s",
    ),
)
def _watch(run_dir: Path, once: bool, every: float) -> int:
    """Show a run on one screen: its steps, loss, speed, time left, attempts, last warning."""
    from neftune_dist.cluster.watch import watch

    watch(run_dir, every, once)
    return outcome.EXIT_DONE


@verb(
    RUN_DIR,
    flag("--verify", "read all files and compare checksums"),
    flag("--contents", "say what the newest one holds, and how to read it with torch alone"),
)
def _checkpoints(run_dir: Path, verify: bool, contents: bool) -> int:
    """List a run's checkpoints and what they can resume. With --verify, damage ends with exit code
    2."""
    from neftune_dist.checkpoint import listing

    rows = listing.rows(run_dir, verify=verify)
    lines = listing.table(rows) if rows else [f"{run_dir} holds no checkpoints yet."]
    for line in [*lines, *(listing.contents(run_dir) if contents else [])]:
        print(line)
    if verify and (damaged := [row.step for row in rows if row.is_damaged]):
        raise UserError(
            f"{run_dir} holds damaged checkpoints, of step {', '.join(damaged)}: a resumed run "
            "takes the newest complete one."
        )
    return outcome.EXIT_DONE


_BEST = flag("--best", "the checkpoint with the lowest held-out loss")


def _chosen(step: int | None, best: bool) -> int | Literal["best"] | None:
    if best and step is not None:
        raise UserError("--best and --step name a checkpoint each: give one of them.")
    return "best" if best else step


@verb(
    RUN_DIR,
    STEP,
    _BEST,
    OUTPUT(help="default: RUN_DIR/export, or RUN_DIR/adapter with --adapter"),
    flag("--adapter", "the adapter alone in PEFT's format, not merged"),
    argument(
        "--dtype",
        choices=("original", "fp32", "bf16", "fp16"),
        default="original",
        help="dtype of the weights; original: that of the base model, of an adapter fp32",
    ),
    argument(
        "--push-to-hub",
        metavar="ORG/NAME",
        help="also upload it; a missing repository is created, private",
    ),
)
def _export(
    run_dir: Path, step: int | None, best: bool, push_to_hub: str | None, **options: Any
) -> int:
    """Write a checkpoint as a Hugging Face model directory."""
    chosen = _chosen(step, best)
    from neftune_dist.checkpoint import hub
    from neftune_dist.checkpoint.export import export

    garbage.keep_imports()

    def reserve() -> None:
        if push_to_hub is not None:
            hub.reserve(push_to_hub)

    made = export(run_dir, step=chosen, before_writing=reserve, **options)
    if push_to_hub is not None:
        hub.push(made, push_to_hub)
    return outcome.EXIT_DONE


@verb(
    argument(
        "target",
        help="a run directory, a checkpoint (RUN_DIR/checkpoints/step_00000020), a model directory "
        "or a hub id",
    ),
    EVALUATION_SETTINGS,
    STEP,
    _BEST,
    argument(
        "--config",
        dest="config_file",
        help="YAML file of settings, for a model that was not trained here",
    ),
    argument(
        "--model",
        help="evaluate this model, such as the base, with the configuration of the run TARGET",
    ),
    OUTPUT(help="default: RUN_DIR/evaluations/step_00000020 or similar"),
)
def _evaluate(target: str, step: int | None, best: bool, model: str | None, **options: Any) -> int:
    """Measure losses without noise, answers and their statistics, tasks and judged quality;
    alone or under torchrun.

    Sections evaluate and judge of the configuration say what is measured. The same command
    continues an evaluation that was stopped. Every rank holds the whole model.
    """
    if model:
        if given := options["config_file"]:
            raise UserError(f"--config={given} has no effect with --model, which takes the run's.")
        run_dir = user_path(target, "RUN_DIR")
        options["config_file"] = run_dir / "config.yaml"
        options["output"] = (
            options["output"] or run_dir / "evaluations" / Path(os.path.abspath(model)).name
        )
    stop = StopSignal()
    environment.find_place()
    from neftune_dist.evaluation.evaluate import evaluate

    garbage.keep_imports()

    return evaluate(model or target, stop=stop, step=_chosen(step, best), **options)


@verb(
    argument(
        "settings",
        nargs="+",
        metavar="TARGET | key=value",
        help="one or two run directories, checkpoints, model directories or hub ids, and settings "
        "for them, such as evaluate.max_new_tokens=200",
    ),
    argument(
        "--temperature",
        type=bounded(float, 0, 1000),
        default=0.0,
        help="temperature of sampling; default: 0, greedy decoding",
    ),
)
def _chat(settings: Words, temperature: float) -> int:
    """Talk to a model in the terminal, or to two side by side."""
    names = [word for word in settings if "=" not in word or os.path.exists(word)]
    if not names:
        raise UserError("chat needs a model: a run, a checkpoint, a model directory or a hub id.")
    from neftune_dist.evaluation.chat import chat

    garbage.keep_imports()

    words = [word for word in settings if word not in names]
    return chat(names, words, temperature=temperature)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentTypeError(f"{text} is not of the form 0,5,10,15") from None


@verb(
    *CONFIG,
    argument(
        "--alphas",
        type=_numbers,
        default="0,5,10,15",
        help="distinct values, in place of noise.alpha; default: %(default)s",
    ),
    argument(
        "--seeds",
        dest="num_seeds",
        type=bounded(int, 1, 1000),
        default=1,
        help="number of seeds, from train.seed on; default: %(default)s",
    ),
    argument(
        "--ranks",
        dest="num_ranks",
        type=bounded(int, 1, 2**12),
        default=1,
        help="processes per run, by torchrun",
    ),
    argument(
        "--only",
        type=int,
        metavar="K",
        help="make only run K, counted from 0, without a report (for a task of a Slurm array)",
    ),
    flag("--report-only", "train and evaluate nothing; report on the runs that are there"),
)
def _study(config: str, settings: Words, **options: Any) -> int:
    """Train and evaluate pairs of runs that differ in alpha alone, and report on them.

    Runs go to run_dir/alpha_A_seed_S; each is trained, then evaluated as sections evaluate and
    judge say. The report goes to run_dir/report.md and report.html. data.num_held_out must be set.
    The same command continues a study that was stopped.
    """
    if options["only"] is not None and options["report_only"]:
        raise UserError("--only makes a run and --report-only none: give one of them.")
    for package in ("matplotlib", "markdown"):
        require(package, "A study's report", "neftune-dist[reports]")
    from neftune_dist.study.run import study

    return study(config, settings, **options)

"""The words of the command line: every verb, its arguments and its help. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

from neftune_dist.config import UserError

# Least and greatest number, by the option's name: what is more was mistyped, and would never end.
_RANGES: dict[str, tuple[float, float]] = {
    "max_restarts": (0, 2**20),
    "processes": (0, 2**12),
    "ranks": (1, 2**12),
    "rendezvous_minutes": (0.01, 2**20),
    "seeds": (1, 1000),
    "show": (0, 2**20),
    "step": (0, 2**32),
    "world_size": (1, 2**12),
}


def check_ranges(arguments: argparse.Namespace) -> None:
    """Refuse numbers of the command line that are out of range. Raises `UserError`."""
    for name, (least, greatest) in _RANGES.items():
        value = getattr(arguments, name, None)
        if value is not None and not least <= value <= greatest:  # written so that NaN is refused
            raise UserError(
                f"--{name.replace('_', '-')}={value} is out of range: it must be at least {least} "
                f"and at most {greatest}."
            )


def make_parser(runs: Mapping[str, object]) -> argparse.ArgumentParser:
    """The parser of all verbs; what it parses has as `run` what `runs` gives for its verb."""
    parser = argparse.ArgumentParser(
        prog="neftune-dist",
        description="Fine-tune causal language models with exact NEFTune noise over FSDP2 or "
        "DeepSpeed ZeRO.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        added.set_defaults(run=runs[name])
        return added

    def takes_config(added: argparse.ArgumentParser) -> None:
        added.add_argument("config", help="YAML file; see configs/")
        _takes_settings(added)

    takes_config(verb("train", "Fine-tune, under torchrun or alone; resumes by itself."))
    _add_launch(verb, takes_config)
    _add_plan(verb, takes_config)
    added = verb("prepare", "Read and tokenise the data, fill the cache, report.")
    takes_config(added)
    added.add_argument(
        "--show",
        type=int,
        default=0,
        metavar="N",
        help="print N documents, what is learned of them in colour or in brackets",
    )
    added = verb("checkpoints", "List a run's checkpoints and what they can resume.")
    added.add_argument("run_dir")
    added.add_argument("--verify", action="store_true", help="read all files, compare checksums")
    added = verb("export", "Write a checkpoint as a Hugging Face model directory.")
    added.add_argument("run_dir")
    added.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
    added.add_argument("--output", help="default: RUN_DIR/export, or RUN_DIR/adapter")
    added.add_argument(
        "--adapter", action="store_true", help="the adapter alone, as PEFT loads it, not merged"
    )
    added.add_argument("--dtype", choices=("original", "fp32", "bf16", "fp16"), default="original")
    _add_evaluate(verb)
    added = verb("chat", "Talk to a model in the terminal, or to two side by side.")
    added.add_argument(
        "words",
        nargs="+",
        metavar="SUBJECT | key=value",
        help="one or two of: a run directory, a checkpoint, a model directory, a hub id; and "
        "settings for them, such as evaluate.max_new_tokens=200",
    )
    added.add_argument(
        "--temperature", type=float, default=0.0, help="of sampling; default: 0, greedy"
    )
    added.set_defaults(settings=[])
    _add_study(verb, takes_config)
    added = verb(
        "doctor",
        "Check this machine: versions, conflicts, GPUs, memory, disk, hub; under torchrun or srun "
        "all machines, and what they share: the run directory, clocks, collectives.",
    )
    added.add_argument("--run-dir", default=".", help="where runs are to be written")
    added.add_argument("--model", help="a model directory or hub id: can it be had here?")
    return parser


def _add_study(
    verb: Callable[..., argparse.ArgumentParser],
    takes_config: Callable[[argparse.ArgumentParser], None],
) -> None:
    added = verb("study", "Paired runs that differ in alpha alone, and their report.")
    added.add_argument(
        "--alphas",
        default="0,5,10,15",
        help="distinct values, in place of the configuration's noise.alpha; default: %(default)s",
    )
    added.add_argument("--seeds", type=int, default=1, help="number of seeds, from train.seed on")
    added.add_argument(
        "--ranks", type=int, default=1, help="processes a run; study starts torchrun"
    )
    part = added.add_mutually_exclusive_group()
    part.add_argument(
        "--only",
        type=int,
        metavar="K",
        help="make run K alone, counted from 0, without a report: a task of a Slurm array",
    )
    part.add_argument("--report-only", action="store_true", help="of runs that have been made")
    added.epilog = (
        "Runs go to run_dir/alpha_A_seed_S; each is trained, then evaluated as `evaluate.` and "
        "`judge.` say. The report goes to run_dir/report.md and report.html. data.num_held_out "
        "must be set. The same command continues a study that was stopped."
    )
    takes_config(added)


def _add_evaluate(verb: Callable[..., argparse.ArgumentParser]) -> None:
    added = verb(
        "evaluate",
        "Losses with the noise off, answers and their statistics, abilities, judged quality; alone "
        "or under torchrun.",
    )
    added.epilog = (
        "What is measured: sections evaluate and judge of the configuration, a run's own. The same "
        "command continues what was stopped and keeps what is there. Every rank holds the whole "
        "model."
    )
    added.add_argument(
        "subject",
        help="a run directory, a checkpoint (RUN_DIR/checkpoints/step_00000020), a model directory "
        "or a hub id",
    )
    added.add_argument("--step", type=int, help="of the run's checkpoint; default: the newest")
    added.add_argument("--config", help="YAML file, for a model that is no run's")
    added.add_argument("--model", help="another model, under the configuration of the run SUBJECT")
    added.add_argument("--output", help="default: RUN_DIR/evaluations/step_00000020, or so")
    _takes_settings(added)


def _add_plan(
    verb: Callable[..., argparse.ArgumentParser],
    takes_config: Callable[[argparse.ArgumentParser], None],
) -> None:
    added = verb(
        "plan",
        "Validate and resolve a run; memory of a rank by what it is for, steps, disk, FLOPs and "
        "hours. Needs no GPU and no weights.",
    )
    added.epilog = (
        "Memory is that of the real training step, run on tensors without content as one of so "
        "many ranks. With --gpu, where the run does not fit: settings that make it fit are looked "
        "for, and the exit code is 2."
    )
    takes_config(added)
    added.add_argument("--world-size", type=int, default=1, help="ranks to plan for")
    added.add_argument("--gpu", help="of each rank, such as H100; default: all that are known")
    added.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        help="share of the GPU's rate that is assumed for the time; default: %(default)s",
    )
    added.add_argument(
        "--without-data",
        action="store_true",
        help="read no data: full micro-batches are assumed; steps and time stay unknown",
    )


def _add_launch(
    verb: Callable[..., argparse.ArgumentParser],
    takes_config: Callable[[argparse.ArgumentParser], None],
) -> None:
    added = verb(
        "launch",
        "Train with all GPUs of this node, or of all nodes of the Slurm job whose batch script "
        "this is; start again after failures.",
    )
    added.epilog = (
        "Ctrl-C, SIGTERM or SIGUSR1 save and stop; a second Ctrl-C ends at once. Output of all "
        "ranks and how they ended: RUN_DIR/logs/attempt_NNNN. See slurm/README.md."
    )
    takes_config(added)
    _takes_processes(added)
    added.add_argument(
        "--max-restarts",
        type=int,
        default=3,
        help="attempts in a row without a new checkpoint before giving up; default: %(default)s",
    )
    added = verb("node", "What launch starts on every node; nobody need type it.")
    _takes_processes(added)
    added.add_argument("folder")
    added.add_argument("words", nargs="*")


def _takes_processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--processes",
        type=int,
        default=0,
        help="on each node; default: one a GPU",
    )
    parser.add_argument(
        "--rendezvous-minutes",
        type=float,
        default=15.0,
        help="how long nodes wait for each other; default: %(default)s",
    )


def _takes_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("settings", nargs="*", metavar="key=value", help="such as noise.alpha=5")

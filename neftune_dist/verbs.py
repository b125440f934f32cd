"""The verbs of the command line, each beside its arguments.

Imports nothing heavy: a verb imports its own module only when it runs, so that `--help` and a
mistake in a configuration are answered before torch is loaded.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from neftune_dist.config import UserError, load_config, user_path
from neftune_dist.distributed import environment, outcome

Run = Callable[[argparse.Namespace], int]
Argument = tuple[tuple[str, ...], dict[str, Any]]


@dataclass(frozen=True)
class Verb:
    """A verb of the command line.

    Attributes:
        run: runs it; returns the exit code.
        summary: its help in one sentence; empty for an internal verb, which help does not list.
        arguments: names and options, as `add_argument` takes them.
        notes: shown below its arguments.
    """

    run: Run
    summary: str
    arguments: tuple[Argument, ...]
    notes: str


VERBS: dict[str, Verb] = {}


def _verb(summary: str, *arguments: Argument, notes: str = "") -> Callable[[Run], Run]:
    """Make the decorated function a verb, which has its name without the underscore."""

    def register(run: Run) -> Run:
        VERBS[run.__name__.removeprefix("_")] = Verb(run, summary, arguments, notes)
        return run

    return register


def _argument(*names: str, **options: Any) -> Argument:
    return names, options


def bounded(kind: type[int] | type[float], least: float, greatest: float) -> Callable[[str], float]:
    """An argument's type: a number from `least` to `greatest`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text[:60]!r} is not {wanted}") from None
        if not least <= value <= greatest:  # written so that NaN is refused
            raise argparse.ArgumentTypeError(
                f"{value} is out of range: it must be at least {least} and at most {greatest}"
            )
        return value

    return parse


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help).")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of a command line, with `verb`. Raises `UserError`."""
    codes = f"{outcome.EXIT_DONE} done, {outcome.EXIT_MISTAKE} a mistake in configuration or input"
    parser = _Parser(
        prog="neftune-dist",
        description="Fine-tune causal language models with exact NEFTune noise over FSDP2 or "
        "DeepSpeed ZeRO.",
        epilog=f"Exit codes: {codes}, {outcome.EXIT_STOPPED} stopped at a checkpoint to be "
        "continued, anything else a failure.",
    )
    parsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        listed: dict[str, Any] = {"help": verb.summary} if verb.summary else {}
        added = parsers.add_parser(name, description=verb.summary, epilog=verb.notes, **listed)
        for names, options in verb.arguments:
            added.add_argument(*names, **options)
    # argparse takes key=value words in one place only; here they may stand behind options, too.
    arguments, rest = parser.parse_known_args(words)
    late = [word for word in rest if "=" in word and not word.startswith("-")]
    if late != rest or (late and not hasattr(arguments, "settings")):
        parser.error(f"unknown words: {' '.join(rest)}")
    if late:
        arguments.settings = [*arguments.settings, *late]
    return arguments


_NEWEST = "default: the newest"
_WHOLE = bounded(int, 0, 2**20)
_PROCESSES = bounded(int, 0, 2**12)
MAX_RESTARTS, RENDEZVOUS_MINUTES = _WHOLE, bounded(float, 0.01, 2**20)

_SETTINGS = _argument("settings", nargs="*", metavar="key=value", help="such as noise.alpha=5")
_CONFIG = (_argument("config", help="YAML file; see configs/"), _SETTINGS)
_RUN_DIR = _argument("run_dir", help="directory of a run")
_STEP = _argument(
    "--step", type=bounded(int, 0, 2**32), help=f"step of the run's checkpoint; {_NEWEST}"
)
_LAUNCH = (
    _argument("--processes", type=_PROCESSES, default=0, help="per node; default: one per GPU"),
    _argument(
        "--rendezvous-minutes",
        type=RENDEZVOUS_MINUTES,
        default=15.0,
        help="how long nodes wait for each other; default: %(default)s",
    ),
)


@_verb("Fine-tune, alone or under torchrun; continues from the newest checkpoint.", *_CONFIG)
def _train(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.settings)
    with outcome.reported() as report:
        environment.find_place()  # a mistake in it is reported before torch is loaded
        from neftune_dist.training.train import train

        code = train(config)
        report(outcome.DONE if code == outcome.EXIT_DONE else outcome.STOPPED)
    # A launcher reads the report; torchrun would make any code but 0 a failure.
    return code if outcome.VARIABLE not in os.environ else outcome.EXIT_DONE


@_verb(
    "Train with all GPUs of this node, or of all nodes of the Slurm job whose batch script this "
    "is; start again after failures.",
    *_CONFIG,
    *_LAUNCH,
    _argument(
        "--max-restarts",
        type=MAX_RESTARTS,
        default=3,
        help="attempts in a row without a new checkpoint before giving up; default: %(default)s",
    ),
    notes="Ctrl-C, SIGTERM or SIGUSR1 save and stop; a second Ctrl-C ends at once. "
    "RUN_DIR/logs/attempt_NNNN has the output of all ranks and how they ended. See "
    "slurm/README.md.",
)
def _launch(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.settings)
    from neftune_dist.cluster.launch.supervisor import launch

    return launch(
        config,
        [arguments.config, *arguments.settings],
        num_processes=arguments.processes,
        max_restarts=arguments.max_restarts,
        minutes=arguments.rendezvous_minutes,
    )


@_verb("", *_LAUNCH, _argument("folder"), _argument("words", nargs="*"))
def _node(arguments: argparse.Namespace) -> int:
    """Internal: started by `launch` on every node."""
    from neftune_dist.cluster.launch.node import node

    return node(
        user_path(arguments.folder, "FOLDER"),
        arguments.words,
        num_processes=arguments.processes,
        minutes=arguments.rendezvous_minutes,
    )


@_verb(
    "Check a run and estimate memory per rank, steps, disk, FLOPs and hours. Needs no GPU and no "
    "weights.",
    *_CONFIG,
    _argument("--world-size", type=bounded(int, 1, 2**12), default=1, help="number of ranks"),
    _argument("--gpu", help="GPU of each rank, such as H100; default: all known ones"),
    _argument(
        "--mfu",
        type=float,
        default=0.4,
        help="share of the GPU's peak rate to assume for the time; default: %(default)s",
    ),
    _argument(
        "--without-data",
        action="store_true",
        help="read no data and assume full micro-batches; steps and time stay unknown",
    ),
    notes="Memory is that of the real training step, run on tensors without content as one rank of "
    "the world. With --gpu, a run that does not fit ends with exit code 2 and settings that make "
    "it fit.",
)
def _plan(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.settings)
    # A machine with GPUs plans as one without.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from neftune_dist.planning.report import plan

    plan(
        config,
        arguments.world_size,
        gpu=arguments.gpu,
        mfu=arguments.mfu,
        with_data=not arguments.without_data,
        log=_flushed,
    )
    return outcome.EXIT_DONE


@_verb(
    "Tokenise the data into the cache and report on it.",
    *_CONFIG,
    _argument(
        "--show",
        type=_WHOLE,
        default=0,
        metavar="N",
        help="print N documents, supervised tokens in colour or in brackets",
    ),
)
def _prepare(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.settings)
    from neftune_dist.data.dataset import prepare
    from neftune_dist.data.mask_preview import preview
    from neftune_dist.model.load import find, load_tokenizer

    tokenizer = load_tokenizer(find(config.model), config.model)
    dataset = prepare(config.data, tokenizer, _flushed)
    for line in dataset.report.lines():
        print(line)
    names = [source.name for source in dataset.report.sources]
    for text in preview(dataset.train, names, tokenizer, arguments.show, _is_colourful()):
        print(f"\n{text}")
    return outcome.EXIT_DONE


def _is_colourful() -> bool:
    """Whether output may hold the colour codes of a terminal (no-color.org)."""
    if os.environ.get("FORCE_COLOR"):
        return True
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


@_verb(
    "List a run's checkpoints and what they can resume.",
    _RUN_DIR,
    _argument("--verify", action="store_true", help="read all files and compare checksums"),
)
def _checkpoints(arguments: argparse.Namespace) -> int:
    from neftune_dist.checkpoint.listing import listing

    for line in listing(user_path(arguments.run_dir, "RUN_DIR"), verify=arguments.verify):
        print(line)
    return outcome.EXIT_DONE


@_verb(
    "Write a checkpoint as a Hugging Face model directory.",
    _RUN_DIR,
    _STEP,
    _argument("--output", help="default: RUN_DIR/export, or RUN_DIR/adapter with --adapter"),
    _argument(
        "--adapter", action="store_true", help="the adapter alone in PEFT's format, not merged"
    ),
    _argument(
        "--dtype",
        choices=("original", "fp32", "bf16", "fp16"),
        default="original",
        help="of the weights; original: as in the model that was fine-tuned",
    ),
)
def _export(arguments: argparse.Namespace) -> int:
    from neftune_dist.checkpoint.export import export

    export(
        user_path(arguments.run_dir, "RUN_DIR"),
        _output(arguments),
        step=arguments.step,
        dtype=arguments.dtype,
        adapter=arguments.adapter,
    )
    return outcome.EXIT_DONE


@_verb(
    "Measure losses without noise, answers and their statistics, tasks and judged quality; alone "
    "or under torchrun.",
    _argument(
        "subject",
        help="a run directory, a checkpoint (RUN_DIR/checkpoints/step_00000020), a model directory "
        "or a hub id",
    ),
    _SETTINGS,
    _STEP,
    _argument("--config", help="YAML file, for a model that no run here has trained"),
    _argument("--model", help="another model, under the configuration of the run SUBJECT"),
    _argument("--output", help="default: RUN_DIR/evaluations/step_00000020 or similar"),
    notes="Sections evaluate and judge of the configuration say what is measured. The same command "
    "continues an evaluation that was stopped. Every rank holds the whole model.",
)
def _evaluate(arguments: argparse.Namespace) -> int:
    name, config_file = arguments.subject, arguments.config
    output = _output(arguments)
    if arguments.model:
        if config_file:
            raise UserError(
                f"--config={config_file} has no effect with --model, which takes the run's."
            )
        run_dir, name = user_path(name, "RUN_DIR"), arguments.model
        config_file = run_dir / "config.yaml"
        output = output or run_dir / "evaluations" / Path(name).name
    environment.find_place()
    from neftune_dist.evaluation.evaluate import evaluate

    return evaluate(
        name,
        step=arguments.step,
        config_file=config_file,
        settings=arguments.settings,
        output=output,
    )


def _output(arguments: argparse.Namespace) -> Path | None:
    return None if arguments.output is None else user_path(arguments.output, "--output")


@_verb(
    "Talk to a model in the terminal, or to two side by side.",
    _argument(
        "settings",
        nargs="+",
        metavar="SUBJECT | key=value",
        help="one or two run directories, checkpoints, model directories or hub ids, and settings "
        "for them, such as evaluate.max_new_tokens=200",
    ),
    _argument(
        "--temperature", type=float, default=0.0, help="of sampling; default: 0, greedy decoding"
    ),
)
def _chat(arguments: argparse.Namespace) -> int:
    settings = [word for word in arguments.settings if "=" in word and not os.path.exists(word)]
    names = [word for word in arguments.settings if word not in settings]
    if not names:
        raise UserError("chat needs a subject: a run, a checkpoint, a model directory or a hub id.")
    from neftune_dist.evaluation.chat import chat

    return chat(names, settings, temperature=arguments.temperature)


@_verb(
    "Train and evaluate pairs of runs that differ in alpha alone, and report on them.",
    *_CONFIG,
    _argument(
        "--alphas",
        default="0,5,10,15",
        help="distinct values, in place of noise.alpha; default: %(default)s",
    ),
    _argument(
        "--seeds", type=bounded(int, 1, 1000), default=1, help="number of seeds from train.seed on"
    ),
    _argument(
        "--ranks", type=bounded(int, 1, 2**12), default=1, help="processes per run, by torchrun"
    ),
    _argument(
        "--only",
        type=int,
        metavar="K",
        help="make run K alone, counted from 0, without a report: a task of a Slurm array",
    ),
    _argument("--report-only", action="store_true", help="report on runs that have been made"),
    notes="Runs go to run_dir/alpha_A_seed_S; each is trained, then evaluated as sections evaluate "
    "and judge say. The report goes to run_dir/report.md and report.html. data.num_held_out must "
    "be set. The same command continues a study that was stopped.",
)
def _study(arguments: argparse.Namespace) -> int:
    if arguments.only is not None and arguments.report_only:
        raise UserError("--only makes a run and --report-only none: give one of them.")
    from neftune_dist.study.run import study

    return study(
        arguments.config,
        arguments.settings,
        alphas=_numbers(arguments.alphas),
        num_seeds=arguments.seeds,
        num_ranks=arguments.ranks,
        only=arguments.only,
        report_only=arguments.report_only,
    )


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--alphas={text} is not of the form 0,5,10,15.") from None


@_verb(
    "Check this machine: versions, known conflicts, GPUs, memory, disk, hub. Under torchrun or "
    "srun: all machines, and the run directory, clocks and collectives that they share.",
    _argument("--run-dir", default=".", help="where runs will be written"),
    _argument("--model", help="also check that this model directory or hub id can be read here"),
)
def _doctor(arguments: argparse.Namespace) -> int:
    from neftune_dist.cluster.doctor.run import doctor

    return doctor(user_path(arguments.run_dir, "--run-dir"), arguments.model)


def _flushed(line: str) -> None:
    print(line, flush=True)

"""The command line: `neftune-dist VERB`. Exit codes: 0 done, 2 a user's mistake, 75 stopped at a
checkpoint to be continued, anything else a failure."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from neftune_dist import attempt
from neftune_dist.config import UserError, load_config

_RANK_0_SPEAKS_FIRST_SECONDS = 5.0


def main(words: Sequence[str] | None = None) -> None:
    """Parse, run the verb, exit."""
    parser = _parser()
    # argparse takes key=value words in one place only; here they may stand behind options, too.
    arguments, rest = parser.parse_known_args(words)
    late = [word for word in rest if "=" in word and not word.startswith("-")]
    if late != rest or (late and not hasattr(arguments, "settings")):
        parser.error(f"unknown words: {' '.join(rest)}")
    if late:
        arguments.settings = [*arguments.settings, *late]
    try:
        code: int = arguments.run(arguments)
    except (UserError, attempt.Final) as error:
        code = attempt.EXIT_MISTAKE if isinstance(error, UserError) else attempt.EXIT_FAILED
        shared = not isinstance(error, UserError) or error.shared
        _say(error, shared)
        # All ranks leave by it, and a launcher reads the word they left: no failure for torchrun.
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        if attempt.VARIABLE in os.environ and (shared or alone):
            code = attempt.EXIT_DONE
    sys.exit(code)


def _say(error: Exception, shared: bool) -> None:
    """One sentence on one rank's standard error."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        # The launcher ends all ranks as soon as one has ended. Let that one be rank 0, which says
        # the same; if it lives on, the mistake is this rank's alone and is said here.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_RANK_0_SPEAKS_FIRST_SECONDS)
        if shared:
            return
    prefix = "neftune-dist" if rank == "0" else f"neftune-dist (rank {rank})"
    print(f"{prefix}: {error}", file=sys.stderr, flush=True)


# The verbs import what they need themselves: a mistake in a configuration is told before torch
# has been loaded, and `--help` needs none of it.


def _train(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.settings)
    with attempt.reported() as told:
        from neftune_dist.train import train

        code = train(config)
        told(attempt.DONE if code == attempt.EXIT_DONE else attempt.STOPPED)
    # A launcher reads the word that was left; torchrun would make any code but 0 a failure.
    return code if attempt.VARIABLE not in os.environ else attempt.EXIT_DONE


def _launch(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.settings)
    from neftune_dist.launch.supervisor import launch

    return launch(
        config,
        [arguments.config, *arguments.settings],
        num_processes=arguments.processes,
        max_restarts=arguments.max_restarts,
        minutes=arguments.rendezvous_minutes,
    )


def _node(arguments: argparse.Namespace) -> int:
    from neftune_dist.launch.node import node

    return node(
        Path(arguments.folder),
        arguments.words,
        num_processes=arguments.processes,
        minutes=arguments.rendezvous_minutes,
    )


def _plan(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.settings)
    # A machine with GPUs plans as one without.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from neftune_dist.plan.report import plan

    plan(
        config,
        arguments.world_size,
        gpu=arguments.gpu,
        mfu=arguments.mfu,
        with_data=not arguments.without_data,
        log=_flushed,
    )
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.settings)
    from neftune_dist.data.audit import shown
    from neftune_dist.data.corpus import prepare
    from neftune_dist.model.load import find, load_tokenizer

    tokenizer = load_tokenizer(find(config.model), config.model)
    corpus = prepare(config.data, tokenizer, _flushed)
    for line in corpus.report.lines():
        print(line)
    names = [source.name for source in corpus.report.sources]
    for text in shown(corpus.train, names, tokenizer, arguments.show, _is_colourful()):
        print(f"\n{text}")
    return 0


def _is_colourful() -> bool:
    """Whether what is printed may hold the colour codes of a terminal (no-color.org)."""
    if os.environ.get("FORCE_COLOR"):
        return True
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _checkpoints(arguments: argparse.Namespace) -> int:
    from neftune_dist.checkpoint.listing import listing

    for line in listing(Path(arguments.run_dir), verify=arguments.verify):
        print(line)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from neftune_dist.export import export

    output = Path(arguments.output) if arguments.output else None
    export(
        Path(arguments.run_dir),
        output,
        step=arguments.step,
        dtype=arguments.dtype,
        adapter=arguments.adapter,
    )
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    name, config_file = arguments.subject, arguments.config
    output = Path(arguments.output) if arguments.output else None
    if arguments.model:
        if config_file:
            raise UserError("--config has no effect with --model: the run's configuration counts.")
        run_dir, name = Path(name), arguments.model
        config_file = run_dir / "config.yaml"
        output = output or run_dir / "evaluations" / Path(name).name
    from neftune_dist.evaluate.evaluation import evaluate

    return evaluate(
        name,
        step=arguments.step,
        config_file=config_file,
        settings=arguments.settings,
        output=output,
    )


def _chat(arguments: argparse.Namespace) -> int:
    settings = [w for w in arguments.words if "=" in w and not Path(w).exists()]
    names = [word for word in arguments.words if word not in settings]
    if not names:
        raise UserError("chat needs a subject: a run, a checkpoint, a model directory or a hub id.")
    from neftune_dist.chat import chat

    return chat(names, [*settings, *arguments.settings], temperature=arguments.temperature)


def _flushed(line: str) -> None:
    print(line, flush=True)


def _study(arguments: argparse.Namespace) -> int:
    from neftune_dist.study import study

    return study(
        arguments.config,
        arguments.settings,
        alphas=_numbers(arguments.alphas),
        num_seeds=arguments.seeds,
        num_ranks=arguments.ranks,
    )


def _doctor(arguments: argparse.Namespace) -> int:
    from neftune_dist.doctor.visit import doctor

    return doctor(Path(arguments.run_dir), arguments.model)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--alphas={text} is not of the form 0,5,10,15.") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="neftune-dist",
        description="Fine-tune causal language models with exact NEFTune noise over FSDP2 or "
        "DeepSpeed ZeRO.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: object, text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    def takes_config(added: argparse.ArgumentParser) -> None:
        added.add_argument("config", help="YAML file; see configs/")
        _takes_settings(added)

    takes_config(verb("train", _train, "Fine-tune, under torchrun or alone; resumes by itself."))
    _add_launch(verb, takes_config)
    _add_plan(verb, takes_config)
    added = verb("prepare", _prepare, "Read and tokenise the data, fill the cache, report.")
    takes_config(added)
    added.add_argument(
        "--show",
        type=int,
        default=0,
        metavar="N",
        help="print N documents, what is learned of them in colour or in brackets",
    )
    added = verb("checkpoints", _checkpoints, "List a run's checkpoints and what they can resume.")
    added.add_argument("run_dir")
    added.add_argument("--verify", action="store_true", help="read all files, compare checksums")
    added = verb("export", _export, "Write a checkpoint as a Hugging Face model directory.")
    added.add_argument("run_dir")
    added.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
    added.add_argument("--output", help="default: RUN_DIR/export, or RUN_DIR/adapter")
    added.add_argument(
        "--adapter", action="store_true", help="the adapter alone, as PEFT loads it, not merged"
    )
    added.add_argument("--dtype", choices=("original", "fp32", "bf16", "fp16"), default="original")
    _add_evaluate(verb)
    added = verb("chat", _chat, "Talk to a model in the terminal, or to two side by side.")
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
    added = verb("study", _study, "Paired runs that differ in alpha alone, and their report.")
    added.add_argument(
        "--alphas",
        default="0,5,10,15",
        help="distinct values, in place of the configuration's noise.alpha; default: %(default)s",
    )
    added.add_argument("--seeds", type=int, default=1, help="number of seeds, from train.seed on")
    added.add_argument(
        "--ranks", type=int, default=1, help="processes a run; study starts torchrun"
    )
    added.epilog = (
        "Runs go to run_dir/alpha_A_seed_S, the report to run_dir/report.md. data.num_held_out "
        "must be set. The same command continues a study that was stopped."
    )
    takes_config(added)
    added = verb(
        "doctor",
        _doctor,
        "Check this machine: versions, conflicts, GPUs, memory, disk, hub; under torchrun or srun "
        "all machines, and what they share: the run directory, clocks, collectives.",
    )
    added.add_argument("--run-dir", default=".", help="where runs are to be written")
    added.add_argument("--model", help="a model directory or hub id: can it be had here?")
    return parser


def _add_evaluate(verb: Callable[..., argparse.ArgumentParser]) -> None:
    added = verb(
        "evaluate",
        _evaluate,
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
        _plan,
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
        _launch,
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
    added = verb("node", _node, "What launch starts on every node; nobody need type it.")
    _takes_processes(added)
    added.add_argument("folder")
    added.add_argument("words", nargs="*")


def _takes_processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=int, default=0, help="on each node; default: one a GPU")
    parser.add_argument(
        "--rendezvous-minutes",
        type=float,
        default=15.0,
        help="how long nodes wait for each other; default: %(default)s",
    )


def _takes_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("settings", nargs="*", metavar="key=value", help="such as noise.alpha=5")

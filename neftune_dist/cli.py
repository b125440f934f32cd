"""The command line: `neftune-dist VERB`. Exit codes: 0 done, 2 a user's mistake, 75 stopped at a
checkpoint to be continued, anything else a failure."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from neftune_dist.arguments import check_ranges, make_parser
from neftune_dist.config import UserError, load_config, user_path
from neftune_dist.distributed import environment, outcome
from neftune_dist.system import children, console

_RANK_0_SPEAKS_FIRST_SECONDS = 5.0
# Verbs whose output is what they are for: where it cannot be written, they have failed.
_SHOWING = ("plan", "prepare", "checkpoints", "doctor")
_WRITE_ELSEWHERE = "choose a place that may be written, or change who may"
# What the machine may refuse, and what a user can do. Other errors are this program's own.
_REFUSALS = {
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "make room within the quota",
    errno.EFBIG: "raise the limit of a file's size",
    errno.EACCES: _WRITE_ELSEWHERE,
    errno.EPERM: _WRITE_ELSEWHERE,
    errno.EROFS: _WRITE_ELSEWHERE,
    errno.ENOENT: "it has never been there, or was removed meanwhile",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EISDIR: "a file is needed",
    errno.EEXIST: "choose another name",
    errno.ENOTEMPTY: "something writes into it meanwhile",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its links lead back to themselves",
    errno.EXDEV: "both places must be on one disk",
    errno.ETXTBSY: "something runs it",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "the machine has no more open files to give",
    errno.ENOLCK: "its file system has no locks: choose another place",
    errno.EIO: "the disk, or the network to it, has failed",
    errno.ESTALE: "its file server has restarted, or it was removed there",
}


def main(words: Sequence[str] | None = None) -> None:
    """Parse, run the verb, exit."""
    console.protect()
    parser = make_parser(_VERBS)
    # argparse takes key=value words in one place only; here they may stand behind options, too.
    arguments, rest = parser.parse_known_args(words)
    late = [word for word in rest if "=" in word and not word.startswith("-")]
    if late != rest or (late and not hasattr(arguments, "settings")):
        parser.error(f"unknown words: {' '.join(rest)}")
    if late:
        arguments.settings = [*arguments.settings, *late]
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a rank of torchrun's, which may be killed
        children.end_with_parent()
    try:
        check_ranges(arguments)
        code: int = _run(arguments)
    except (UserError, outcome.Final) as error:
        code = outcome.EXIT_MISTAKE if isinstance(error, UserError) else outcome.EXIT_FAILED
        shared = not isinstance(error, UserError) or error.shared
        _say(error, shared)
        # All ranks leave by it, and a launcher reads the word they left: no failure for torchrun.
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        if outcome.VARIABLE in os.environ and (shared or alone):
            code = outcome.EXIT_DONE
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        code = outcome.EXIT_FAILED if outcome.VARIABLE in os.environ else outcome.EXIT_MISTAKE
        _say(UserError(_refusal(error)), shared=False)
    sys.exit(_with_output(code, arguments.verb))


def _refusal(error: OSError) -> str:
    """One sentence for what the machine refused, wherever it did."""
    reason, advice = error.strerror or str(error), _REFUSALS[error.errno or 0]
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if name is not None]
    return f"{' to '.join(map(str, names)) or 'A file'}: {reason}: {advice}."


def _with_output(code: int, verb: str) -> int:
    """The exit code, where standard output may not have been written whole."""
    error = console.lost()
    if error is None or error.errno == errno.EPIPE:  # its reader had seen enough
        return code
    print(f"neftune-dist: standard output: {error.strerror}; not all is there.", file=sys.stderr)
    return code or (outcome.EXIT_MISTAKE if verb in _SHOWING else outcome.EXIT_DONE)


def _run(arguments: argparse.Namespace) -> int:
    """Run the verb; its exit code."""
    try:
        code: int = arguments.run(arguments)
    except RecursionError as error:
        if "a JSON" not in str(error):
            raise
        raise UserError("A JSON file nests thousands of brackets: it is damaged.") from error
    return code


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
    with outcome.reported() as told:
        environment.find_place()  # what is wrong with it is said before torch has been loaded
        from neftune_dist.training.train import train

        code = train(config)
        told(outcome.DONE if code == outcome.EXIT_DONE else outcome.STOPPED)
    # A launcher reads the word that was left; torchrun would make any code but 0 a failure.
    return code if outcome.VARIABLE not in os.environ else outcome.EXIT_DONE


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


def _node(arguments: argparse.Namespace) -> int:
    from neftune_dist.cluster.launch.node import node

    return node(
        user_path(arguments.folder, "FOLDER"),
        arguments.words,
        num_processes=arguments.processes,
        minutes=arguments.rendezvous_minutes,
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
    return 0


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
    return 0


def _is_colourful() -> bool:
    """Whether what is printed may hold the colour codes of a terminal (no-color.org)."""
    if os.environ.get("FORCE_COLOR"):
        return True
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _checkpoints(arguments: argparse.Namespace) -> int:
    from neftune_dist.checkpoint.listing import listing

    for line in listing(user_path(arguments.run_dir, "RUN_DIR"), verify=arguments.verify):
        print(line)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from neftune_dist.checkpoint.export import export

    export(
        user_path(arguments.run_dir, "RUN_DIR"),
        _output(arguments),
        step=arguments.step,
        dtype=arguments.dtype,
        adapter=arguments.adapter,
    )
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    name, config_file = arguments.subject, arguments.config
    output = _output(arguments)
    if arguments.model:
        if config_file:
            raise UserError("--config has no effect with --model: the run's configuration counts.")
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


def _chat(arguments: argparse.Namespace) -> int:
    settings = [w for w in arguments.words if "=" in w and not os.path.exists(w)]
    names = [word for word in arguments.words if word not in settings]
    if not names:
        raise UserError("chat needs a subject: a run, a checkpoint, a model directory or a hub id.")
    from neftune_dist.evaluation.chat import chat

    return chat(names, [*settings, *arguments.settings], temperature=arguments.temperature)


def _flushed(line: str) -> None:
    print(line, flush=True)


def _study(arguments: argparse.Namespace) -> int:
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


def _doctor(arguments: argparse.Namespace) -> int:
    from neftune_dist.cluster.doctor.run import doctor

    return doctor(user_path(arguments.run_dir, "--run-dir"), arguments.model)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--alphas={text} is not of the form 0,5,10,15.") from None


_VERBS = {
    "train": _train,
    "prepare": _prepare,
    "checkpoints": _checkpoints,
    "export": _export,
    "chat": _chat,
    "study": _study,
    "doctor": _doctor,
    "evaluate": _evaluate,
    "plan": _plan,
    "launch": _launch,
    "node": _node,
}

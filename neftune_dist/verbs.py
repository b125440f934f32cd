"""The verbs of the command line, each beside its arguments.

A verb imports its own module only when it runs, so that `--help` and a mistake in a configuration
are answered before torch is loaded.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentTypeError
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from neftune_dist.arguments import (
    MAX_RESTARTS,
    RENDEZVOUS_MINUTES,
    argument,
    bounded,
    completion,
    verb,
)
from neftune_dist.config import (
    UserError,
    copy_batch_scripts,
    json_schema,
    load_config,
    reference,
    user_path,
)
from neftune_dist.distributed import environment, outcome

Words = Sequence[str]
_WHOLE = bounded(int, 0, 2**20)

_SETTINGS = argument("settings", nargs="*", metavar="key=value", help="such as noise.alpha=5")
_CONFIG = (
    argument("config", help="YAML file, or the name of a shipped one, such as alpaca-7b"),
    _SETTINGS,
)
_RUN_DIR = argument("run_dir", type=partial(user_path, key="RUN_DIR"), help="directory of a run")
_OUTPUT = partial(argument, "--output", type=partial(user_path, key="--output"))
_STEP = argument(
    "--step", type=bounded(int, 0, 2**32), help="step of the run's checkpoint; default: the newest"
)
_LAUNCH = (
    argument(
        "--processes", type=bounded(int, 0, 2**12), default=0, help="per node; default: one per GPU"
    ),
    argument(
        "--rendezvous-minutes",
        type=RENDEZVOUS_MINUTES,
        default=15.0,
        help="how long nodes wait for each other; default: %(default)s",
    ),
)


@verb(*_CONFIG)
def _train(config: str, settings: Words) -> int:
    """Fine-tune, alone or under torchrun; continues from the newest checkpoint."""
    loaded = load_config(config, settings)
    with outcome.reported() as report:
        environment.find_place()  # a mistake in it is reported before torch is loaded
        from neftune_dist.training.train import train

        code = train(loaded)
        report(outcome.DONE if code == outcome.EXIT_DONE else outcome.STOPPED)
    # A launcher reads the report; torchrun would make any code but 0 a failure.
    return code if outcome.VARIABLE not in os.environ else outcome.EXIT_DONE


@verb(
    *_CONFIG,
    *_LAUNCH,
    argument(
        "--max-restarts",
        type=MAX_RESTARTS,
        default=3,
        help="attempts in a row without a new checkpoint before giving up; default: %(default)s",
    ),
)
def _launch(
    config: str, settings: Words, processes: int, rendezvous_minutes: float, max_restarts: int
) -> int:
    """Train with all GPUs of this node, or of all nodes of the Slurm job whose batch script this
    is; start again after failures.

    Ctrl-C, SIGTERM or SIGUSR1 save and stop; a second Ctrl-C ends at once.
    RUN_DIR/logs/attempt_NNNN has the output of all ranks and how they ended. See slurm/README.md.
    """
    loaded = load_config(config, settings)
    from neftune_dist.cluster.launch.supervisor import launch

    return launch(
        loaded,
        [config, *settings],
        num_processes=processes,
        max_restarts=max_restarts,
        minutes=rendezvous_minutes,
    )


@verb(
    *_LAUNCH,
    argument("folder", type=partial(user_path, key="FOLDER")),
    argument("words", nargs="*"),
)
def _node(folder: Path, words: list[str], processes: int, rendezvous_minutes: float) -> int:
    """Internal: started by `launch` on every node."""
    from neftune_dist.cluster.launch.node import node

    return node(folder, words, num_processes=processes, minutes=rendezvous_minutes)


@verb(
    *_CONFIG,
    argument("--world-size", type=bounded(int, 1, 2**12), default=1, help="number of ranks"),
    argument("--gpu", help="GPU of each rank, such as H100; default: all known ones"),
    argument(
        "--mfu",
        type=float,
        default=0.4,
        help="share of the GPU's peak rate to assume for the time; default: %(default)s",
    ),
    argument(
        "--without-data",
        action="store_true",
        help="read no data and assume full micro-batches; steps and time stay unknown",
    ),
    argument("--verbose", action="store_true", help="print the whole resolved configuration, too"),
)
def _plan(
    config: str,
    settings: Words,
    world_size: int,
    gpu: str | None,
    mfu: float,
    without_data: bool,
    verbose: bool,
) -> int:
    """Check a run and estimate memory per rank, steps, disk, FLOPs and hours. Needs no GPU and
    no weights.

    Memory is that of the real training step, run on tensors without content as one rank of the
    world. With --gpu, a run that does not fit ends with exit code 2 and settings that make it fit.
    """
    loaded = load_config(config, settings)
    # A machine with GPUs plans as one without.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from neftune_dist.planning.report import plan

    plan(
        loaded,
        world_size,
        gpu=gpu,
        mfu=mfu,
        with_data=not without_data,
        verbose=verbose,
        log=_flushed,
    )
    return outcome.EXIT_DONE


@verb(
    *_CONFIG,
    argument(
        "--show",
        type=_WHOLE,
        default=0,
        metavar="N",
        help="print N documents, supervised tokens in colour or in brackets",
    ),
)
def _prepare(config: str, settings: Words, show: int) -> int:
    """Tokenise the data into the cache and report on it."""
    loaded = load_config(config, settings)
    from neftune_dist.data.dataset import prepare
    from neftune_dist.data.mask_preview import preview
    from neftune_dist.model.load import load_tokenizer
    from neftune_dist.model.locate import find

    tokenizer = load_tokenizer(find(loaded.model), loaded.model)
    dataset = prepare(loaded.data, tokenizer, _flushed)
    for line in dataset.report.lines():
        print(line)
    names = [source.name for source in dataset.report.sources]
    for text in preview(dataset.train, names, tokenizer, show, _is_colourful()):
        print(f"\n{text}")
    return outcome.EXIT_DONE


def _is_colourful() -> bool:
    """Whether output may hold the colour codes of a terminal (no-color.org)."""
    if os.environ.get("FORCE_COLOR"):
        return True
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


@verb(
    _RUN_DIR, argument("--verify", action="store_true", help="read all files and compare checksums")
)
def _checkpoints(run_dir: Path, verify: bool) -> int:
    """List a run's checkpoints and what they can resume."""
    from neftune_dist.checkpoint.listing import listing

    for line in listing(run_dir, verify=verify):
        print(line)
    return outcome.EXIT_DONE


@verb(
    _RUN_DIR,
    _STEP,
    _OUTPUT(help="default: RUN_DIR/export, or RUN_DIR/adapter with --adapter"),
    argument(
        "--adapter", action="store_true", help="the adapter alone in PEFT's format, not merged"
    ),
    argument(
        "--dtype",
        choices=("original", "fp32", "bf16", "fp16"),
        default="original",
        help="of the weights; original: as in the model that was fine-tuned",
    ),
)
def _export(run_dir: Path, step: int | None, output: Path | None, adapter: bool, dtype: str) -> int:
    """Write a checkpoint as a Hugging Face model directory."""
    from neftune_dist.checkpoint.export import export

    export(run_dir, output, step=step, dtype=dtype, adapter=adapter)
    return outcome.EXIT_DONE


@verb(
    argument(
        "target",
        help="a run directory, a checkpoint (RUN_DIR/checkpoints/step_00000020), a model directory "
        "or a hub id",
    ),
    _SETTINGS,
    _STEP,
    argument("--config", help="YAML file, for a model that no run here has trained"),
    argument("--model", help="another model, under the configuration of the run TARGET"),
    _OUTPUT(help="default: RUN_DIR/evaluations/step_00000020 or similar"),
)
def _evaluate(
    target: str,
    settings: Words,
    step: int | None,
    config: str | Path | None,
    model: str | None,
    output: Path | None,
) -> int:
    """Measure losses without noise, answers and their statistics, tasks and judged quality;
    alone or under torchrun.

    Sections evaluate and judge of the configuration say what is measured. The same command
    continues an evaluation that was stopped. Every rank holds the whole model.
    """
    name = model or target
    if model:
        if config:
            raise UserError(f"--config={config} has no effect with --model, which takes the run's.")
        run_dir = user_path(target, "RUN_DIR")
        config = run_dir / "config.yaml"
        output = output or run_dir / "evaluations" / Path(model).name
    environment.find_place()
    from neftune_dist.evaluation.evaluate import evaluate

    return evaluate(name, step=step, config_file=config, settings=settings, output=output)


@verb(
    argument(
        "settings",
        nargs="+",
        metavar="TARGET | key=value",
        help="one or two run directories, checkpoints, model directories or hub ids, and settings "
        "for them, such as evaluate.max_new_tokens=200",
    ),
    argument(
        "--temperature", type=float, default=0.0, help="of sampling; default: 0, greedy decoding"
    ),
)
def _chat(settings: Words, temperature: float) -> int:
    """Talk to a model in the terminal, or to two side by side."""
    names = [word for word in settings if "=" not in word or os.path.exists(word)]
    if not names:
        raise UserError("chat needs a model: a run, a checkpoint, a model directory or a hub id.")
    from neftune_dist.evaluation.chat import chat

    words = [word for word in settings if word not in names]
    return chat(names, words, temperature=temperature)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentTypeError(f"{text} is not of the form 0,5,10,15") from None


@verb(
    *_CONFIG,
    argument(
        "--alphas",
        type=_numbers,
        default="0,5,10,15",
        help="distinct values, in place of noise.alpha; default: %(default)s",
    ),
    argument(
        "--seeds", type=bounded(int, 1, 1000), default=1, help="number of seeds from train.seed on"
    ),
    argument(
        "--ranks", type=bounded(int, 1, 2**12), default=1, help="processes per run, by torchrun"
    ),
    argument(
        "--only",
        type=int,
        metavar="K",
        help="make run K alone, counted from 0, without a report: a task of a Slurm array",
    ),
    argument("--report-only", action="store_true", help="report on runs that have been made"),
)
def _study(
    config: str,
    settings: Words,
    alphas: list[float],
    seeds: int,
    ranks: int,
    only: int | None,
    report_only: bool,
) -> int:
    """Train and evaluate pairs of runs that differ in alpha alone, and report on them.

    Runs go to run_dir/alpha_A_seed_S; each is trained, then evaluated as sections evaluate and
    judge say. The report goes to run_dir/report.md and report.html. data.num_held_out must be set.
    The same command continues a study that was stopped.
    """
    if only is not None and report_only:
        raise UserError("--only makes a run and --report-only none: give one of them.")
    from neftune_dist.study.run import study

    return study(
        config,
        settings,
        alphas=alphas,
        num_seeds=seeds,
        num_ranks=ranks,
        only=only,
        report_only=report_only,
    )


@verb(
    argument("key", nargs="?", default="", metavar="KEY", help="such as noise or noise.alpha"),
    argument("--schema", action="store_true", help="print a JSON schema, for editors, of them all"),
)
def _config(key: str, schema: bool) -> int:
    """Print every setting, or those of a section, with default, type, range and meaning."""
    if schema and key:
        raise UserError("--schema is of all settings: leave KEY out.")
    print(json.dumps(json_schema(), indent=2) if schema else reference(key))
    return outcome.EXIT_DONE


@verb(
    argument(
        "name",
        nargs="?",
        metavar="NAME",
        help="of the run, or a shipped configuration to begin from; see configs/README.md",
    ),
    _SETTINGS,
    _OUTPUT(help="default: NAME.yaml, or the folder slurm with --slurm"),
    argument(
        "--slurm", action="store_true", help="write the batch scripts for Slurm and site.sh instead"
    ),
)
def _init(name: str | None, settings: Words, output: Path | None, slurm: bool) -> int:
    """Write a configuration to begin with: the settings that a run decides, each with its meaning,
    and the memory that they need."""
    if (name is None) != slurm:
        raise UserError("init needs the NAME of a run, or --slurm alone for the batch scripts.")
    if name is None:
        made = copy_batch_scripts(output)
    else:
        from neftune_dist.planning.starter import write_configuration

        made = [write_configuration(name, settings, output)]
    for path in made:
        print(f"made {path}")
    if name is not None:
        print(f"next: neftune-dist plan {made[0]}; neftune-dist launch {made[0]}")
    return outcome.EXIT_DONE


@verb(argument("shell", choices=("bash", "zsh"), help="zsh: by its bashcompinit"))
def _completion(shell: str) -> int:
    """Print a script that completes verbs, options and settings in a shell: in ~/.bashrc,
    eval "$(neftune-dist completion bash)"."""
    print(completion(shell))
    return outcome.EXIT_DONE


@verb(
    argument(
        "--run-dir",
        type=partial(user_path, key="--run-dir"),
        default=".",
        help="where runs will be written",
    ),
    argument("--model", help="also check that this model directory or hub id can be read here"),
)
def _doctor(run_dir: Path, model: str | None) -> int:
    """Check this machine: versions, known conflicts, GPUs, memory, disk, hub. Under torchrun or
    srun: all machines, and the run directory, clocks and collectives that they share."""
    from neftune_dist.cluster.doctor.run import doctor

    return doctor(run_dir, model)


def _flushed(line: str) -> None:
    print(line, flush=True)

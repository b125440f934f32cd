"""Verbs that prepare a run and train: its configuration, data, memory and machine."""

from __future__ import annotations

import json
import os
import shlex
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

from neftune_dist.arguments import (
    CONFIG,
    MAX_RESTARTS,
    OUTPUT,
    RENDEZVOUS_MINUTES,
    SETTINGS,
    WHOLE,
    Words,
    argument,
    bounded,
    flag,
    verb,
)
from neftune_dist.cluster.submit import slurm
from neftune_dist.config import (
    UserError,
    copy_batch_scripts,
    json_schema,
    load_config,
    reference,
    user_path,
)
from neftune_dist.distributed import environment, outcome
from neftune_dist.distributed.signals import StopSignal
from neftune_dist.system import garbage
from neftune_dist.system.imports import imports_reported

_flushed = partial(print, flush=True)
_PROCESSES = argument(
    "--processes",
    dest="num_processes",
    type=bounded(int, 0, 2**12),
    default=0,
    help="ranks on each node; default: one per GPU",
)


@verb(*CONFIG)
def _train(config: str, settings: Words) -> int:
    """Fine-tune, alone or under torchrun; continues from the newest checkpoint."""
    with outcome.reported() as report, imports_reported():
        stop = StopSignal()
        loaded = load_config(config, settings)
        environment.find_place()  # a mistake in it is reported before torch is loaded
        from neftune_dist.training.train import train

        garbage.keep_imports()

        code = train(loaded, stop)
        if report(outcome.DONE if code == outcome.EXIT_DONE else outcome.STOPPED):
            return outcome.EXIT_DONE  # torchrun would make any other code a failure
    return code


@verb(*CONFIG, _PROCESSES, RENDEZVOUS_MINUTES, MAX_RESTARTS)
def _launch(config: str, settings: Words, **options: Any) -> int:
    """Train with all GPUs of this node, or of all nodes of the Slurm job whose batch script this
    is; start again after failures.

    Ctrl-C, SIGTERM or SIGUSR1 save and stop; a second Ctrl-C ends at once.
    RUN_DIR/logs/attempt_NNNN has the output of all ranks and how they ended. See slurm/README.md.
    """
    loaded = load_config(config, settings)
    from neftune_dist.cluster.launch.supervisor import launch

    return launch(loaded, [config, *settings], **options)


@verb(*CONFIG, *slurm.OPTIONS)
def _submit(**given: Any) -> int:
    """Submit a training run to Slurm, after every check that a login node can make."""
    slurm.adopt_site()
    from neftune_dist.cluster.submit.submit import submit

    return submit(Namespace(**given))


@verb(
    _PROCESSES,
    RENDEZVOUS_MINUTES,
    argument("folder", type=partial(user_path, key="FOLDER")),
    argument("words", nargs="*"),
)
def _node(folder: Path, words: list[str], **options: Any) -> int:
    """Internal: started by `launch` on every node."""
    from neftune_dist.cluster.launch.node import node

    return node(folder, words, **options)


@verb(
    argument("key", nargs="?", metavar="KEY", help="such as noise or noise.alpha"),
    flag("--schema", "print a JSON schema of all settings, for editors"),
)
def _config(key: str | None, schema: bool) -> int:
    """Print every setting, or those of a section, with default, type, range and meaning."""
    if schema and key:
        raise UserError("--schema is of all settings: leave KEY out.")
    print(json.dumps(json_schema(), indent=2) if schema else reference(key or ""))
    return outcome.EXIT_DONE


@verb(
    argument(
        "name",
        nargs="?",
        metavar="NAME",
        help="name of the run, or a shipped configuration to begin from, such as sharegpt-7b",
    ),
    SETTINGS,
    OUTPUT(help="default: NAME.yaml; with --slurm the folder slurm"),
    flag("--slurm", "write the batch scripts for Slurm and site.sh instead"),
)
def _init(name: str | None, settings: Words, output: Path | None, slurm: bool) -> int:
    """Write a configuration to begin with: the settings that most runs change, each with its
    meaning, and the memory that the run needs."""
    name = name and name.removesuffix(".yaml")
    has_name = bool(name and Path(name).name.strip("."))
    if has_name == slurm or (name and not has_name):
        raise UserError("init needs the NAME of a run, or --slurm alone for the batch scripts.")
    if not name:
        for path in copy_batch_scripts(output):
            print(f"made {path}")
        return outcome.EXIT_DONE
    from neftune_dist.planning.starter import write_configuration

    made = write_configuration(name, settings, output)
    file = shlex.quote(str(made))
    print(f"made {made}\nnext: neftune-dist plan {file}; neftune-dist launch {file}")
    return outcome.EXIT_DONE


@verb(
    *CONFIG,
    argument("--world-size", type=bounded(int, 1, 2**12), default=1, help="number of ranks"),
    argument("--gpu", help="GPU of each rank, such as H100; default: all known ones"),
    argument(
        "--mfu",
        type=bounded(float, 0.001, 1),
        default=0.4,
        help="share of the GPU's peak rate to assume for the time; default: %(default)s",
    ),
    argument(
        "--without-data",
        dest="with_data",
        action="store_false",
        help="read no data and assume full micro-batches; steps and time stay unknown",
    ),
    flag("--verbose", "print the whole resolved configuration, too"),
)
def _plan(config: str, settings: Words, **options: Any) -> int:
    """Check a run and estimate memory per rank, steps, disk, FLOPs and hours. Needs no GPU and
    no weights.

    Memory is measured on the real training step of one rank, run on fake tensors. With --gpu, a
    run that does not fit ends with exit code 2 and names settings with which it fits.
    """
    loaded = load_config(config, settings)
    # A machine with GPUs plans as one without.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from neftune_dist.planning.report import plan

    plan(loaded, log=_flushed, **options)
    return outcome.EXIT_DONE


@verb(
    *CONFIG,
    argument(
        "--show",
        type=WHOLE,
        default=0,
        metavar="N",
        help="print N documents, supervised tokens in colour or in brackets",
    ),
)
def _prepare(config: str, settings: Words, show: int) -> int:
    """Tokenise the data into the cache and report on it."""
    loaded = load_config(config, settings)
    from neftune_dist.data.dataset import prepare
    from neftune_dist.data.report import preview
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
    argument(
        "--run-dir",
        type=partial(user_path, key="--run-dir"),
        default=".",
        help="where runs will be written",
    ),
    argument("--model", help="also check that this model directory or hub id can be read here"),
)
def _doctor(run_dir: Path, model: str | None) -> int:
    """Check this machine: versions, known conflicts, GPUs, memory, disk. Under torchrun or
    srun: all machines, and the run directory, clocks and collectives that they share."""
    from neftune_dist.cluster.doctor.run import doctor

    return doctor(run_dir, model)

"""Verbs that train."""

from __future__ import annotations

import os
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

from neftune_dist.arguments import (
    CONFIG,
    MAX_RESTARTS,
    RENDEZVOUS_MINUTES,
    Words,
    argument,
    bounded,
    verb,
)
from neftune_dist.cluster.submit.slurm import OPTIONS
from neftune_dist.config import load_config, user_path
from neftune_dist.distributed import environment, outcome
from neftune_dist.system import garbage

_PROCESSES = argument(
    "--processes",
    dest="num_processes",
    type=bounded(int, 0, 2**12),
    default=0,
    help="per node; default: one per GPU",
)


@verb(*CONFIG)
def _train(config: str, settings: Words) -> int:
    """Fine-tune, alone or under torchrun; continues from the newest checkpoint."""
    with outcome.reported() as report:
        loaded = load_config(config, settings)
        environment.find_place()  # a mistake in it is reported before torch is loaded
        from neftune_dist.training.train import train

        garbage.keep_imports()

        code = train(loaded)
        report(outcome.DONE if code == outcome.EXIT_DONE else outcome.STOPPED)
    # A launcher reads the report; torchrun would make any code but 0 a failure.
    return code if outcome.VARIABLE not in os.environ else outcome.EXIT_DONE


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


@verb(*CONFIG, *OPTIONS)
def _submit(**given: Any) -> int:
    """Submit a training run to Slurm, after every check that a login node can make."""
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

"""The options of a submission: those of sbatch that are passed on, and those of the run."""

from __future__ import annotations

import argparse
import re

from neftune_dist.arguments import MAX_RESTARTS, RENDEZVOUS_MINUTES, argument, bounded
from neftune_dist.cluster.submit import slurm
from neftune_dist.config import UserError

PASSED_ON = ("cpus-per-task", "mem", "partition", "account", "qos", "constraint", "exclude")


_NUMBER = bounded(int, 1, 2**16)
OPTIONS = (
    argument("--nodes", type=_NUMBER, required=True, metavar="N", help="number of nodes"),
    argument("--gpus-per-node", metavar="[TYPE:]G", help="one rank a GPU"),
    argument("--processes", type=_NUMBER, metavar="P", help="or so many CPU ranks on each node"),
    argument("--time", required=True, metavar="HH:MM:SS", help="the limit, at which the run saves"),
    *(argument(f"--{name}", help="as sbatch has it") for name in PASSED_ON),
    argument("--job-name", help="default: the run directory's name"),
    argument(
        "--mail", metavar="ADDRESS", help="gets mail when the job begins, ends, fails, is requeued"
    ),
    argument(
        "--array", metavar="SPEC", help="one run an index (0-3, 1,5, 0-9%%2), put in place of {}"
    ),
    argument("--dependency", metavar="LIST", help="afterok:123 and so on"),
    argument(
        "--chain", type=_NUMBER, default=1, metavar="N", help="N jobs, each after the one before"
    ),
    argument("--signal-seconds", type=int, default=300, help="to save in; default: %(default)s"),
    MAX_RESTARTS,
    RENDEZVOUS_MINUTES,
    argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="any other: exclusive, a=b"
    ),
    argument("--dry-run", action="store_true", help="check and print; write and queue nothing"),
)


def check_options(given: argparse.Namespace) -> None:
    """Refuse values that make no sense; adds `per_node`, the ranks on each node."""
    gpus = given.gpus_per_node
    if (gpus is None) == (given.processes is None):
        raise UserError("--gpus-per-node or --processes is needed, and only one of them.")
    if gpus is not None and not re.fullmatch(r"([\w.-]+:)?[1-9]\d{0,3}", gpus, re.ASCII):
        raise UserError(f"--gpus-per-node={gpus} is not of the form 8 or h100:8.")
    for name in (*PASSED_ON, "job-name", "mail", "array", "dependency"):
        if getattr(given, name.replace("-", "_")) == "":
            raise UserError(f"--{name} is empty: give it a value, or leave it out.")
    given.per_node = given.processes or int(given.gpus_per_node.rpartition(":")[2])
    if not 1 <= given.signal_seconds < slurm.seconds("--time", given.time):
        raise UserError(
            f"--signal-seconds={given.signal_seconds}, in which the run saves before its limit, "
            f"must be 1 or more and less than --time={given.time}."
        )
    own = {name.replace("_", "-") for name in vars(given)}
    own |= {"ntasks-per-node", "signal", "open-mode", "output", "chdir", "mail-user"}
    for option in given.sbatch:
        match = re.fullmatch(r"(?:--)?([a-z][a-z-]*)(=.*)?", option)
        if not match:
            raise UserError(f"--sbatch={option} is no long option such as exclusive or mem=0.")
        if match[1] in own:
            raise UserError(f"--sbatch={option}: --{match[1]} is an option of submit.py itself.")

"""Submit a training run to Slurm, after every check that a login node can make.

    ./launcher/submit.py CONFIG --nodes N --gpus-per-node G --time HH:MM:SS [...] [key=value ...]

The job trains the snapshot in RUN_DIR/submit/0001/, whatever is edited later: the configuration,
beside the command, the code's version and the script (slurm/train.sbatch under another header).
Imports no torch. A mistake is one sentence and exit code 2, and nothing is queued or written.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from neftune_dist import __version__
from neftune_dist.cluster.submit import slurm, snapshot
from neftune_dist.cluster.submit.preflight import Outlook, anchor, check_space, preflight
from neftune_dist.config import Config, UserError, load_config

INDEX = "{}"  # in a word: an array task's index
MARK = "index-of-the-task"


@dataclass(frozen=True)
class Task:
    """One run: the whole job's, or that of an array's task.

    Attributes:
        index: of the array's task; None where there is no array.
        config: with absolute paths.
        outlook: its predictions.
        log: the file that Slurm writes, with Slurm's symbols for job and index.
    """

    index: int | None
    config: Config
    outlook: Outlook
    log: str

    @property
    def run_dir(self) -> Path:
        """Absolute."""
        return Path(self.config.run_dir)


def submit(given: argparse.Namespace) -> int:
    """Check, submit, say how to watch and to stop; the exit code."""
    slurm.check_options(given)
    tasks = _tasks(given)
    check_space((task.run_dir, task.outlook.num_bytes) for task in tasks)
    waits_for, unavailable = [], ""
    try:
        waits_for = _check_cluster(given, tasks)
    except slurm.SlurmUnavailable as error:
        if not given.dry_run:
            raise
        unavailable = str(error)
    lines = _outlook(given, tasks)
    if given.dry_run:
        lines += _dry_run(given, tasks, unavailable)
    else:
        kept = snapshot.next_folder(tasks[0].run_dir)
        ids = _submit(given, tasks, waits_for)
        lines = [f"job: {' '.join(ids)}, as kept in {kept}", *lines, *_handles(tasks, ids)]
    print("\n".join(lines))
    return 0


def _tasks(given: argparse.Namespace) -> list[Task]:
    """Every run of the job, checked: one, or one for each index of the array."""
    world_size = given.nodes * given.per_node
    indices = slurm.indices(given.array) if given.array else [None]
    # Slurm takes one pattern for the output of all.
    place, job = _config(given, indices[0], MARK).run_dir, "%A_%a" if given.array else "%j"
    log = f"{place.replace('%', '%%').replace(MARK, '%a')}/logs/slurm-{job}.out"
    tasks: dict[str, Task] = {}
    for index in indices:
        config = _config(given, index, str(index))
        run_dir = config.run_dir
        if run_dir in tasks:
            raise UserError(
                f"--array: tasks share run_dir={run_dir}; give run_dir=... with {INDEX} in it, "
                "which becomes the task's index."
            )
        if run_dir != place.replace(MARK, str(index)):
            raise UserError(f"--array: run_dir={run_dir} may differ in the task's index alone.")
        tasks[run_dir] = Task(index, config, preflight(config, world_size), log)
    return list(tasks.values())


def _config(given: argparse.Namespace, index: int | None, in_run_dir: str) -> Config:
    """The configuration of a task, checked, with absolute paths. `index` takes the place of `INDEX`
    in its words, in that of run_dir `in_run_dir`."""
    words = given.settings
    if index is not None:
        words = [
            word.replace(INDEX, in_run_dir if word.startswith("run_dir=") else str(index))
            for word in words
        ]
    config = load_config(given.config, words)
    anchor(config)
    if "\\" in config.run_dir:
        raise UserError(f"run_dir={config.run_dir}: Slurm cannot log to a backslash.")
    return config


def _check_cluster(given: argparse.Namespace, tasks: list[Task]) -> list[str]:
    """Refuse what no partition has, and run directories in use; the jobs that a chain waits for."""
    slurm.check_partition(given.partition, given.nodes, given.gpus_per_node, given.time)
    jobs = slurm.queued([number for task in tasks for number in snapshot.jobs(task.run_dir)])
    whole = sorted({number.partition("_")[0] for number, _ in jobs}, key=int)  # arrays
    if jobs and not given.dependency and given.chain == 1:
        shown = ", ".join(f"{number} ({state})" for number, state in jobs[:3])
        where = tasks[0].run_dir if len(tasks) == 1 else "A run directory"
        raise UserError(
            f"{where} is in use by job {shown}{' and others' if len(jobs) > 3 else ''}: cancel it, "
            f"or queue after it with --dependency={slurm.after(whole)}."
        )
    return whole


def _outlook(given: argparse.Namespace, tasks: list[Task]) -> list[str]:
    ranks = given.nodes * given.per_node
    lines = [f"ranks: {ranks}, {given.per_node} on each of {given.nodes} nodes"]
    if given.chain > 1:
        lines.append(f"chain: {given.chain} jobs, each of which goes on where the last one ended")
    lines += tasks[0].outlook.notes
    for task in tasks[1:]:
        other = [note for note in task.outlook.notes if note not in tasks[0].outlook.notes]
        lines += [f"task {task.index}: {note}" for note in other]
    left = max(task.outlook.seconds or 0 for task in tasks)
    slots = math.ceil(left / (slurm.seconds("--time", given.time) - given.signal_seconds))
    if slots > max(1, given.chain):
        how = f"--chain={given.chain} is too short" if given.chain > 1 else "it requeues itself"
        lines.append(f"time: that is about {slots} times --time={given.time}: {how}")
    return lines


def _options(given: argparse.Namespace, tasks: list[Task]) -> list[str]:
    """For sbatch."""
    name = Path(slurm.filled(tasks[0].log, a=INDEX)).parents[1].name
    options = {
        "job-name": given.job_name or name,
        "nodes": given.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": given.gpus_per_node,
        **{name: getattr(given, name.replace("-", "_")) for name in slurm.PASSED_ON},
        "time": given.time,
        "array": given.array,
        "signal": f"B:USR1@{given.signal_seconds}",
        "open-mode": "append",
        "output": tasks[0].log,
        "chdir": slurm.ROOT,  # which the nodes have; where the user stands, they may not
        "mail-user": given.mail,
        "mail-type": "BEGIN,END,FAIL,REQUEUE" if given.mail else None,
    }
    found = [f"--{name}={value}" for name, value in options.items() if value is not None]
    # In a chain, the next job goes on.
    found.append("--requeue" if given.chain == 1 else "--no-requeue")
    found += ["--" + option.lstrip("-") for option in given.sbatch]
    for option in found:
        if not option.isprintable():
            raise UserError(f"{option!a} contains control characters.")
    return found


def _script(given: argparse.Namespace, tasks: list[Task], folders: list[Path]) -> str:
    """slurm/train.sbatch under another header, its words fixed: the snapshots' configurations."""
    options = [option.partition("=") for option in _options(given, tasks)]
    header = [f"#SBATCH {n}={shlex.quote(v)}" if e else f"#SBATCH {n}" for n, e, v in options]
    words = f"--processes {given.per_node} --max-restarts {given.max_restarts}"
    words += f" --rendezvous-minutes {given.minutes:g}"
    configs = [shlex.quote(str(folder / "config.yaml")) for folder in folders]
    fixed = [f"set -- {configs[0]} {words}"]
    if given.array:
        cases = [f"  {t.index}) set -- {c} {words} ;;" for t, c in zip(tasks, configs, strict=True)]
        fixed = ['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"]
    body = (slurm.ROOT / "slurm" / "train.sbatch").read_text().splitlines()
    while body[0].startswith("#"):
        del body[0]
    made = f"# Made by launcher/submit.py {__version__} from slurm/train.sbatch."
    # The repository's root, wherever it is submitted from.
    fixed.append(f"SLURM_SUBMIT_DIR={shlex.quote(str(slurm.ROOT))}")
    return "\n".join(["#!/usr/bin/env bash", made, *header, *fixed, *body, ""])


def _dry_run(given: argparse.Namespace, tasks: list[Task], unavailable: str) -> list[str]:
    """The script, and what Slurm says of it.

    Args:
        unavailable: why it was not asked; empty: it answers.
    """
    script = _script(given, tasks, [snapshot.next_folder(task.run_dir) for task in tasks])
    lines = ["", script]
    if unavailable:
        lines.append(f"Slurm: {unavailable} Nodes, limits and queue were not looked at.")
    else:
        waits = [f"--dependency={given.dependency}"] if given.dependency else []
        options = _options(given, tasks) + waits
        tried = slurm.run("sbatch", "--test-only", *options, script=script)
        answer = slurm.reason(tried)
        if tried.returncode and "allocation failure" not in answer:  # of sbatch's own reading
            raise UserError(f"sbatch refuses these options: {answer}.")
        # That of the controller is no refusal: it may also be that nodes are down at present.
        refused = f"would not start it now: {answer}."
        lines.append(f"Slurm: {refused if tried.returncode else answer}")
    return [*lines, "A dry run: nothing was written or queued."]


def _submit(given: argparse.Namespace, tasks: list[Task], waits_for: list[str]) -> list[str]:
    """Write the snapshots, queue the job or the chain of them; its ids. All of it, or nothing."""
    folders = [snapshot.next_folder(task.run_dir) for task in tasks]
    script, options = _script(given, tasks, folders), _options(given, tasks)
    command = shlex.join(["neftune-dist", *sys.argv[1:]])
    files = {"words": command + "\n", "job.sbatch": script, **snapshot.code()}
    ids: list[str] = []
    with ExitStack() as undo:
        for task, folder in zip(tasks, folders, strict=True):
            snapshot.make_folder(task.run_dir / "logs", undo)
            snapshot.write(folder, {**files, "config.yaml": task.config.to_yaml()}, undo)
        waits = given.dependency or (slurm.after(waits_for) if waits_for else None)
        for _ in range(given.chain):
            own = [f"--dependency={waits}"] if waits else []
            # The options also here, where they go before the user's SBATCH_ variables.
            words = ["--parsable", *options, *own, str(folders[0] / "job.sbatch")]
            # Never given up: nobody would know whether the job is in the queue.
            done = slurm.run("sbatch", *words, timeout=None)
            if done.returncode:
                raise UserError(f"Slurm refused the job: {slurm.reason(done)}.")
            print(done.stderr, end="", file=sys.stderr)  # what the site has to say
            number = " ".join(done.stdout.split()[-1:]).partition(";")[0]
            if not number.isdecimal():
                said = done.stdout.strip() or "nothing"
                raise UserError(f"sbatch queued nothing; it says: {said}")
            ids.append(number)
            undo.callback(slurm.run, "scancel", ids[-1])
            waits = slurm.after(ids[-1:])
        for task, folder in zip(tasks, folders, strict=True):
            suffix = "" if task.index is None else f"_{task.index}"
            (folder / "job").write_text("".join(f"{number}{suffix}\n" for number in ids))
        undo.pop_all()
    return ids


def _handles(tasks: list[Task], ids: list[str]) -> list[str]:
    """Commands to watch the jobs and to stop them."""
    first, later = tasks[0], ids[1:]
    log = slurm.filled(first.log, j=ids[0], A=ids[0], a=str(first.index))
    folder = first.run_dir / "tensorboard"
    if len(tasks) > 1:
        folder = Path(os.path.commonpath([task.run_dir for task in tasks]))
    first_of_all = f"scancel {shlex.join(later)}; " if later else ""
    lines = [
        f"watch:    squeue --jobs={','.join(ids)}",
        f"          neftune-dist watch {shlex.quote(str(first.run_dir))}",
        f"          tail -F {shlex.quote(log)}",
        f"          tensorboard --logdir {shlex.quote(str(folder))}",
        f"stop:     {first_of_all}scancel --batch --signal=TERM {ids[0]}",
        "            saves, then ends; the same command goes on from there",
    ]
    if not later:
        lines.append(f"pause:    scancel --batch --signal=USR1 {ids[0]}")
        lines.append("            saves, then goes back into the queue")
    lines.append(f"cancel:   scancel {shlex.join(ids)}")
    lines.append("            ends; saves if the site's KillWait (often 30 s) is long enough")
    return lines

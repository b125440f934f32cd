"""Fault drill and resume matrix of the checkpoints; the suite runs a short sample of both.

usage: python -m tests.distributed.drill [--kills 60] [--seed 0]     both drills whole
       python -m tests.distributed.drill --kills 0                   the matrix alone
       python -m tests.distributed.drill --engine replicated         its kills and its pairs alone

Kills come at the moment of a rank's n-th operation on the checkpoints' files (as Python's audit
events tell them: opening, making, renaming, removing), n at random, so that they fall into saving,
publishing, pruning and loading; one rank alone, or all of them at once. After each, nothing
published may be damaged, and the run goes on; at its end it is compared with one nobody touched.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neftune_dist.checkpoint import store
from tests.support import tiny_model

STEPS = 8
ENGINES = {
    "replicated": ["engine.name=replicated"],
    "fsdp2": ["engine.name=fsdp2"],
    "hsdp": ["engine.name=fsdp2", "engine.num_replicas=2"],
    "zero-1": ["engine.name=deepspeed", "engine.zero_stage=1"],
    "zero-2": ["engine.name=deepspeed", "engine.zero_stage=2"],
    "zero-3": ["engine.name=deepspeed", "engine.zero_stage=3"],
}
# What an operation on a checkpoint's files is part of, by the file's place and the event.
PHASES = ("save", "publish", "prune", "load")


def make_config(folder: Path) -> Path:
    """A run that saves after every step, keeps two, and draws every noise that there is."""
    return tiny_model.make_config(
        folder,
        train={"max_steps": STEPS},
        checkpoint={"every_steps": 1},
        logging={"progress": False, "tensorboard": False},
        noise={"stream": "rank"},
    )


@dataclass(frozen=True)
class Kill:
    """SIGKILL at the `count`-th operation on the checkpoints' files by rank `rank`."""

    rank: int
    count: int
    everyone: bool
    folder: Path  # for the ranks' process numbers, and the phase that was hit

    def __call__(self) -> None:
        mine = int(os.environ.get("RANK", "0"))
        (self.folder / f"pid_{mine}").write_text(str(os.getpid()))
        if mine != self.rank:
            return
        seen = itertools.count(1)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
                return
            path = str(arguments[0])
            if "/checkpoints/" not in path or next(seen) != self.count:
                return
            phase = _phase(event, path, arguments)
            descriptor = os.open(self.folder / "phase", os.O_WRONLY | os.O_CREAT)
            os.write(descriptor, phase.encode())
            for file in self.folder.glob("pid_*"):
                if self.everyone and file.name != f"pid_{mine}":
                    os.kill(int(file.read_text()), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)


def _phase(event: str, path: str, arguments: tuple[Any, ...]) -> str:
    if event in ("os.remove", "os.rmdir") or (event == "os.rename" and ".partial" not in path):
        # `latest` too is renamed; what is published is renamed only to be removed.
        return "prune" if "/step_" in path else "publish"
    if event == "os.rename" or re.search(r"manifest|trainer_state|latest", path):
        reading = event == "open" and arguments[1] in ("r", "rb")
        return "load" if reading else "publish"
    if event == "open" and arguments[1] in ("r", "rb"):
        return "load"
    return "save"


def compare(run_dir: Path, untouched: Path) -> None:
    """Records of all steps, and every weight and moment, bit for bit."""
    assert tiny_model.untimed(tiny_model.steps(run_dir)) == tiny_model.untimed(
        tiny_model.steps(untouched)
    )
    final = [store.find_all(run)[0] for run in (run_dir, untouched)]
    assert final[0].step == final[1].step == STEPS
    ours, theirs = (tiny_model.checkpoint_tensors(checkpoint.folder) for checkpoint in final)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key


def check_published(run_dir: Path, newest: int) -> int:
    """Nothing published is damaged or lost; the newest step."""
    assert store.damaged_folders(run_dir) == []
    found = store.find_all(run_dir)
    for checkpoint in found:
        assert checkpoint.first_flaw() is None, checkpoint
    step = found[0].step if found else 0
    assert step >= newest, f"step {newest} was published and is gone"
    return step


def drill(
    config: Path, folder: Path, engine: str, kills: int, chance: random.Random
) -> collections.Counter[tuple[str, str]]:
    """`kills` kills in as many runs as it takes; how many fell into which phase."""
    words = [*ENGINES[engine], "checkpoint.mode=async"]
    untouched = folder / f"untouched_{engine}"
    tiny_model.train(config, untouched, *words, ranks=2)
    outcome: collections.Counter[tuple[str, str]] = collections.Counter()
    for number in itertools.count():
        if outcome.total() >= kills:
            return outcome
        run_dir, newest = folder / f"{engine}_{number}", 0
        while True:
            marks = Path(tempfile.mkdtemp(dir=folder))
            everyone = chance.random() < 0.5
            # Two saves and a load take a rank about this many operations; rank 0 has the most.
            rank = chance.choice((0, 0, 1))
            count = chance.randint(1, 60 if rank == 0 else 12)
            kill = Kill(rank, count, everyone, marks)
            done = tiny_model.run_forked(
                "train", config, f"run_dir={run_dir}", *words, ranks=2, before=kill
            )
            if newest and "nothing is left" not in done.stdout and "resume:" in done.stdout:
                assert f"step_{newest:08d}, step {newest} of {STEPS}" in done.stdout
            newest = check_published(run_dir, newest)
            if done.returncode == 0:
                compare(run_dir, untouched)
                break
            assert (marks / "phase").exists(), done.stdout + done.stderr
            outcome[(marks / "phase").read_text(), "all" if everyone else "one"] += 1
            if outcome.total() >= kills:
                tiny_model.train(config, run_dir, *words, ranks=2)
                compare(run_dir, untouched)
                break
        shutil.rmtree(run_dir)


@dataclass(frozen=True)
class SmallFiles:
    """A disk that is full: no file may grow past so many bytes."""

    num_bytes: int

    def __call__(self) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.num_bytes, self.num_bytes))


@dataclass(frozen=True)
class SlowDisk:
    """A disk so slow that every save takes until training has made the next step."""

    run_dir: Path

    def __call__(self) -> None:
        from neftune_dist.checkpoint import flat

        write = flat.write

        def slow(folder: Path, *arguments: Any) -> Any:
            step = int(folder.name.removeprefix("step_").partition(".")[0])
            deadline = time.monotonic() + 60
            while step < STEPS and len(tiny_model.steps(self.run_dir)) <= step:
                assert time.monotonic() < deadline, "training waits for the save"
                time.sleep(0.01)
            return write(folder, *arguments)

        flat.write = slow


@dataclass(frozen=True)
class DeadDisk:
    """A disk that never answers one rank: when it writes its shards, or when it publishes."""

    rank: int
    phase: str

    def __call__(self) -> None:
        from neftune_dist.checkpoint import flat

        if int(os.environ.get("RANK", "0")) == self.rank:
            owner, name = {"save": (flat, "write"), "publish": (store, "publish")}[self.phase]
            setattr(owner, name, lambda *_: time.sleep(1000))


@dataclass(frozen=True)
class LittleMemory:
    """One rank's machine whose memory holds no copy of the state; and on no rank can a save go on
    beside training."""

    rank: int

    def __call__(self) -> None:
        from neftune_dist.checkpoint import saver

        saver.Thread = None  # type: ignore[assignment,misc]
        little = int(os.environ.get("RANK", "0")) == self.rank
        saver.cgroups.memory_bytes = lambda: (1000 if little else 1 << 40, 1 << 40, 1 << 40)


@dataclass(frozen=True)
class Nobody:
    """Without root's right to write where nobody may."""

    def __call__(self) -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)


@dataclass(frozen=True)
class Layout:
    """An engine at a world size."""

    engine: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.engine} x{self.ranks}"


LAYOUTS = [
    Layout(engine, ranks)
    for engine in ENGINES
    for ranks in (1, 2, 3, 4)
    if engine != "hsdp" or ranks % 2 == 0
]


@dataclass(frozen=True)
class Observe:
    """Write down what the engine holds when training begins, and the documents of every step."""

    folder: Path

    def __call__(self) -> None:
        from neftune_dist.training.loop import Trainer

        rank = int(os.environ.get("RANK", "0"))
        run, train_step = Trainer.run, Trainer.train_step

        def observed_run(trainer: Trainer) -> bool:
            state = [(s.key, s.start, s.tensor.clone()) for s in trainer.engine.flat_state()]
            torch.save(state, self.folder / f"state_{rank}.pt")
            return run(trainer)

        def observed_step(trainer: Trainer, batch: Any, num_steps: int) -> bool:
            documents = [
                pair
                for b in batch.micro_batches
                for pair in zip(b.documents.tolist(), b.epochs.tolist(), strict=True)
            ]
            with (self.folder / f"documents_{rank}.jsonl").open("a") as file:
                file.write(json.dumps([batch.step, documents]) + "\n")
            return train_step(trainer, batch, num_steps)

        Trainer.run, Trainer.train_step = observed_run, observed_step  # type: ignore[method-assign]

    def documents(self) -> dict[int, list[list[int]]]:
        """Of every step, over all ranks, in order."""
        found: dict[int, list[list[int]]] = collections.defaultdict(list)
        for file in self.folder.glob("documents_*.jsonl"):
            for step, documents in map(json.loads, file.read_text().splitlines()):
                found[step] += documents
        return {step: sorted(documents) for step, documents in found.items()}


MATRIX_WORDS = ["noise.stream=sample", "train.max_steps=4", "checkpoint.every_steps=2"]


def save_at_two(config: Path, folder: Path, layout: Layout) -> Path:
    """A run of four steps under the layout, saved after two; its directory."""
    run_dir = folder / f"{layout.engine}_{layout.ranks}"
    observe = Observe(run_dir / "seen")
    observe.folder.mkdir(parents=True)
    words = [*ENGINES[layout.engine], *MATRIX_WORDS, "checkpoint.keep=0"]
    done = tiny_model.run_forked(
        "train", config, f"run_dir={run_dir}", *words, ranks=layout.ranks, before=observe
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir


def continue_from(config: Path, source: Path, layout: Layout, folder: Path) -> None:
    """Resume the source's checkpoint of step two under the layout: what is loaded is what was
    saved, bit for bit, and what follows is what followed there."""
    run_dir, observe = folder / "run", Observe(folder / "seen")
    observe.folder.mkdir(parents=True)
    step_two = Path("checkpoints") / "step_00000002"
    shutil.copytree(source / step_two, run_dir / step_two)
    shutil.copyfile(source / "metrics.jsonl", run_dir / "metrics.jsonl")
    words = [*ENGINES[layout.engine], *MATRIX_WORDS]
    done = tiny_model.run_forked(
        "train", config, f"run_dir={run_dir}", *words, ranks=layout.ranks, before=observe
    )
    assert done.returncode == 0, done.stdout + done.stderr
    saved = tiny_model.checkpoint_tensors(source / step_two)
    covered = dict.fromkeys(saved, 0)
    for file in observe.folder.glob("state_*.pt"):
        for key, start, tensor in torch.load(file):
            assert torch.equal(tensor, saved[key][start : start + tensor.numel()]), key
            covered[key] += tensor.numel()
    copies = {"hsdp": 2, "replicated": layout.ranks}.get(layout.engine, 1)
    assert covered == {key: copies * tensor.numel() for key, tensor in saved.items()}
    documents = Observe(source / "seen").documents()
    assert observe.documents() == {step: documents[step] for step in (2, 3)}
    for one, other in zip(tiny_model.steps(run_dir), tiny_model.steps(source), strict=True):
        assert abs(one["loss"] / other["loss"] - 1) < 1e-6, (one["step"], one["loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60, help="for each engine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=ENGINES)
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = make_config(folder)
        killed = [arguments.engine] if arguments.engine else ["replicated", "fsdp2", "zero-3"]
        for engine in killed if arguments.kills else ():
            outcome = drill(config, folder, engine, arguments.kills, random.Random(arguments.seed))
            print(f"{engine}: {outcome.total()} kills, every run ended bit-identical", flush=True)
            for phase in PHASES:
                hit = [f"{outcome[phase, who]} of {who} rank(s)" for who in ("one", "all")]
                print(f"  while {phase:8} {', '.join(hit)}", flush=True)
        num_pairs = 0
        for one in LAYOUTS:
            source = save_at_two(config, folder / "sources", one)
            chosen = [x for x in LAYOUTS if arguments.engine in (None, one.engine, x.engine)]
            for other in chosen:
                continue_from(config, source, other, folder / "pair")
                shutil.rmtree(folder / "pair")
            num_pairs += len(chosen)
            print(f"saved by {one}: continued by {', '.join(map(str, chosen))}", flush=True)
    print(f"{num_pairs} pairs; {(time.monotonic() - began) / 60:.0f} minutes in all")


if __name__ == "__main__":
    main()

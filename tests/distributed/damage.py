"""Damage drill: every file of a run directory and of the data cache, damaged in twenty ways.

usage: python -m tests.distributed.damage [--jobs 2] [--files PATTERN …]  the whole corpus
       python -m tests.distributed.damage --types                         odd values in JSON
       python -m tests.distributed.damage --sample 12                     as the suite does

After each damage come `train`, `evaluate`, `export`, `checkpoints --verify` and `launch`, each of
which must end within its deadline: with what an untouched run gives (losses of every step, figures
of the evaluation, every file of the export), or with one sentence and exit code 2. A traceback, a
hang, or another result with exit code 0 is a failure. A record that metrics.jsonl or
evaluations.jsonl has lost is right where it is said to be lost. A line has no checksum: one that is
still a record, but another one, is accepted. With `--types`, one value after another of each JSON
file of the run directory is of another type, checksums made to fit; then come the verbs that read
the file, and another result may be right. The verbs run in processes that are forked from one which
has imported everything.
"""

from __future__ import annotations

import argparse
import collections
import fnmatch
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neftune_dist.config import with_checksum
from neftune_dist.distributed.outcome import Outcome
from tests.support import tiny_model

STEPS, STOPPED_AT = 4, 2
VERBS = ("train", "evaluate", "export", "checkpoints", "launch")
_VERB_SECONDS = 90
_ODD: tuple[Any, ...] = (None, True, -1, 2.5, "x", [], {}, [[]], {"a": 1}, 10**30)


def _flip(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


def _digit(content: bytes) -> bytes:
    """One digit in the middle half made another: the damage that is hardest to see."""
    middle = range(len(content) // 4, len(content))
    at = next((i for i in middle if chr(content[i]).isdecimal()), None)
    if at is None:
        return _flip(content, len(content) // 3)
    return content[:at] + b"%d" % ((content[at] - 48 + 1) % 10) + content[at + 1 :]


def _lines(content: bytes) -> bytes:
    return b"".join(reversed(content.splitlines(keepends=True)))


# Name: what becomes of a file's content.
CONTENTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "last byte missing": lambda content: content[:-1],
    "first byte missing": lambda content: content[1:],
    "twice": lambda content: content + content,
    "zeros": lambda content: bytes(len(content)),
    "noise": lambda content: random.Random(0).randbytes(len(content)),
    "bit at the beginning": lambda content: _flip(content, min(3, len(content) - 1)),
    "bit in the middle": lambda content: _flip(content, len(content) // 2),
    "bit at the end": lambda content: _flip(content, len(content) - 2),
    "a digit": _digit,
    "lines reversed": _lines,
    "no text": lambda content: b"\xff\xfe" + content,
    "null": lambda content: b"null\n",
    "a list": lambda content: b"[1, null]\n",
    "an object": lambda content: b"{}\n",
    "brackets": lambda content: b"[" * 100_000,
}
# Name: what stands in a file's place.
PLACES: dict[str, Callable[[Path], object]] = {
    "removed": lambda path: None,
    "a directory": lambda path: path.mkdir(),
    "a link to itself": lambda path: path.symlink_to(path.name),
}
WAYS = (*CONTENTS, *PLACES)
assert len(WAYS) == 20


def damage(path: Path, way: str) -> bool:
    """Damage a file; whether that changed it."""
    if way.startswith("["):
        _set_odd(path, json.loads(way))
        return True
    before = path.read_bytes()
    if way in CONTENTS:
        after = CONTENTS[way](before) if before else b"x"
        path.unlink()
        path.write_bytes(after)
        return after != before
    path.unlink()
    PLACES[way](path)
    return True


def _set_odd(path: Path, place: list[Any]) -> None:
    """Put an odd value at a place in a JSON file (keys, then the number of the value), as if that
    had been written there."""
    *keys, last, number = place
    content = owner = json.loads(path.read_bytes())
    for key in keys:
        owner = owner[key]
    owner[last] = _ODD[number]
    if isinstance(content, dict) and content.pop("checksum", None):
        content = with_checksum(content)
    path.write_text(json.dumps(content))
    if path.parent.name == "model":  # as a run of an earlier version, without checksums of these
        (path.parent.parent / "files.json").unlink()


def _places(content: Any, depth: int = 3) -> Iterator[list[Any]]:
    """Where values are: keys of objects, the first of each list."""
    keys = content if isinstance(content, dict) else range(min(1, len(content)))
    for key in keys:
        yield [key]
        if isinstance(content[key], dict | list) and depth > 1 and len(content[key]) < 100:
            yield from ([key, *rest] for rest in _places(content[key], depth - 1))


READERS = {
    "run/evaluations/*": ("evaluate",),
    "run/logs/*": ("launch",),
    "run/checkpoints/*": ("checkpoints", "export", "train"),
    "run/model/*": ("export", "evaluate"),
    "run/files.json": ("export",),
}
RECORDS = ("metrics.jsonl", "evaluations.jsonl")


@dataclass(frozen=True)
class Ended:
    """How a verb ended: exit code (None: it hung) and what it said."""

    code: int | None
    text: str

    @property
    def flaw(self) -> str:
        """What is wrong with the end itself; empty where nothing is."""
        if self.code is None:
            return "hang"
        if "Traceback (most recent call last)" in self.text or self.code < 0:
            return "traceback"
        said = "neftune-dist" in self.text
        return "" if self.code in (0, 75) or (self.code in (1, 2) and said) else "no sentence"


def call(words: list[str], **variables: str) -> Ended:
    """Run a verb in a process forked from this one."""
    with tempfile.TemporaryFile() as output:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            _child(words, variables, output.fileno())
        deadline, code = time.monotonic() + _VERB_SECONDS, None
        while code is None and time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if done else None
            time.sleep(0.005)
        if code is None:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        output.seek(0)
        return Ended(code, output.read().decode(errors="replace"))


def _child(words: list[str], variables: dict[str, str], output: int) -> None:
    code = 1
    try:
        os.setsid()
        for stream in (1, 2):
            os.dup2(output, stream)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
        os.environ.update(variables)
        from neftune_dist.cli import main

        main(words)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@dataclass(frozen=True)
class Ground:
    """A run that was stopped and evaluated, and what each verb makes of it untouched."""

    folder: Path
    config: Path

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @staticmethod
    def make(folder: Path) -> Ground:
        config = tiny_model.make_config(
            folder,
            data={"max_length": 64},
            train={"max_steps": STEPS, "global_batch_size": 6},
            checkpoint={"every_steps": 1, "keep": 0},
            logging={"progress": False, "tensorboard": False},
            evaluate={
                "every_steps": 2,
                "max_instructions": 2,
                "max_new_tokens": 3,
                "train_documents": 3,
            },
        )
        ground = Ground(folder, config)
        _must(call(["train", str(config), f"run_dir={ground.run_dir}"]))
        for step in range(STOPPED_AT + 1, STEPS + 1):
            shutil.rmtree(ground.run_dir / f"checkpoints/step_{step:08d}")
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            path = ground.run_dir / name
            lines = path.read_text().splitlines(keepends=True)
            path.write_text("".join(x for x in lines if json.loads(x)["step"] <= STOPPED_AT))
        (ground.run_dir / "checkpoints/latest").write_text(f"step_{STOPPED_AT:08d}\n")
        _must(call(["evaluate", str(ground.run_dir)]))
        ended = call(
            ["launch", str(config), f"run_dir={ground.run_dir}"], NEFTUNE_DIST_PYTHON="false"
        )
        assert not ended.flaw, ended.text
        rank = ground.run_dir / "logs/attempt_0001/rank_0.json"
        rank.write_text(json.dumps(asdict(Outcome("failed", 1, "x", 0, time.time()))))
        return ground

    def files(self) -> list[Path]:
        """Every file that is damaged: of the run directory, then of the cache's entry."""
        found = [p for p in sorted(self.run_dir.rglob("*")) if p.is_file()]
        return found + [p for p in sorted(self.cache.rglob("*")) if p.is_file()]

    def copy(self, folder: Path) -> Ground:
        for name in ("run", "cache"):
            shutil.copytree(self.folder / name, folder / name, symlinks=True)
        return Ground(folder, self.config)

    def act(self, verb: str) -> tuple[Ended, Any]:
        """Call a verb on the run: how it ended, and what came out, to be compared."""
        cache = f"data.cache_dir={self.cache}"
        train = [str(self.config), f"run_dir={self.run_dir}", cache]
        words = {
            "train": ["train", *train],
            "evaluate": ["evaluate", str(self.run_dir), cache],
            "export": ["export", str(self.run_dir)],
            "checkpoints": ["checkpoints", str(self.run_dir), "--verify"],
            "launch": ["launch", *train],
        }[verb]
        # The launcher's own part: what its ranks do is what `train` does.
        ended = call(words, **({"NEFTUNE_DIST_PYTHON": "false"} if verb == "launch" else {}))
        return ended, _result(self, verb) if ended.code == 0 else None


def _must(ended: Ended) -> None:
    assert ended.code == 0, ended.text


def _result(ground: Ground, verb: str) -> Any:
    if verb == "train":
        return {name: tiny_model.untimed(_rows(ground.run_dir / name)) for name in RECORDS}
    if verb == "evaluate":
        return _figures(ground.run_dir / f"evaluations/step_{STOPPED_AT:08d}")
    if verb == "export":
        files = sorted(p for p in (ground.run_dir / "export").rglob("*") if p.is_file())
        return [(p.name, p.read_bytes()) for p in files if p.name != "README.md"]
    return None


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _records(found: Any, right: Any, text: str) -> str:
    """What is to be said of a training's records: those of earlier steps may be lost if that is
    told, those that were made after the damage must be as they are without it."""
    altered = False
    for name in RECORDS:
        rows, steps = found[name], [row["step"] for row in found[name]]
        if steps != sorted(set(steps)):
            return "silent change"
        if [r for r in rows if r["step"] > STOPPED_AT] != [
            r for r in right[name] if r["step"] > STOPPED_AT
        ]:
            return "silent change"
        lost = sum(row["step"] not in steps for row in right[name])
        told = re.search(rf"{name} is damaged: (all|\d+) of its records", text)
        if lost and not (told and (told[1] == "all" or int(told[1]) >= lost)):
            return "silent change"
        altered = altered or any(row not in right[name] for row in rows)
    return "accepted" if altered else "right"


def _figures(folder: Path) -> Any:
    try:
        summary = json.loads((folder / "summary.json").read_bytes())
        summary.pop("checksum", None)
        return summary, json.loads((folder / "answers.json").read_bytes())
    except (OSError, ValueError, AttributeError) as error:
        return f"unreadable: {error}"


def _fresh(ground: Ground, verb: str, damaged: Path) -> None:
    """Take away what would keep the verb from looking at the damaged file."""
    if verb == "evaluate" and "evaluations" not in damaged.parts:
        shutil.rmtree(ground.run_dir / "evaluations")


@dataclass(frozen=True)
class Case:
    """One file, damaged in one way."""

    file: str  # relative to the ground's folder
    way: str

    def __str__(self) -> str:
        return f"{self.file} [{self.way}]"


def expected(ground: Ground, folder: Path) -> dict[str, Any]:
    """What each verb makes of the untouched run, with and without the evaluation from before."""
    found = {}
    for verb in VERBS:
        place = folder / f"untouched {verb}"
        place.mkdir(parents=True)
        own = ground.copy(place)
        _fresh(own, verb, Path("x"))
        ended, found[verb] = own.act(verb)
        assert not ended.flaw, ended.text
        shutil.rmtree(place)
    return found


def cases(ground: Ground, patterns: Sequence[str]) -> list[Case]:
    files = [str(path.relative_to(ground.folder)) for path in ground.files()]
    chosen = [f for f in files if any(fnmatch.fnmatch(f, pattern) for pattern in patterns)]
    return [Case(f, way) for f in chosen for way in WAYS]


def odd_cases(ground: Ground) -> list[Case]:
    """Two odd values at each place of each JSON file of the run directory."""
    found = []
    for path in sorted(ground.run_dir.rglob("*.json")):
        for i, place in enumerate(_places(json.loads(path.read_bytes()))):
            for number in (i % len(_ODD), (i * 3 + 5) % len(_ODD)):
                way = json.dumps([*place, number])
                found.append(Case(str(path.relative_to(ground.folder)), way))
    return found


def _verbs(case: Case) -> Sequence[str]:
    if not case.way.startswith("["):
        return VERBS
    return next(verbs for pattern, verbs in READERS.items() if fnmatch.fnmatch(case.file, pattern))


def try_case(
    ground: Ground, case: Case, folder: Path, untouched: dict[str, Any]
) -> Iterator[tuple[str, str, str]]:
    """Each verb after the damage: its name, what came of it (right, refused or a flaw), what it
    said."""
    for verb in _verbs(case):
        own = ground.copy(folder / verb)
        path = own.folder / case.file
        _fresh(own, verb, path)
        if not damage(path, case.way):
            continue
        ended, result = own.act(verb)
        outcome = ended.flaw
        if not outcome:
            # The launcher's ranks fail here at once: it is to say so, as it does untouched.
            outcome = "right" if ended.code == (1 if verb == "launch" else 0) else "refused"
        if outcome == "right" and verb == "train" and path.name in RECORDS:
            outcome = _records(result, untouched[verb], ended.text)
        elif outcome == "right" and result != untouched[verb]:
            outcome = "accepted" if case.way.startswith("[") else "silent change"
        is_entry = case.file.startswith("cache/") and path.suffix != ".lock"
        if path.name == "checksums.json" and case.way == "last byte missing":
            is_entry = False  # its last line's end: it lists the same
        if verb == "train" and is_entry and outcome == "right":
            outcome = "right" if "damaged and is made again" in ended.text else "silent change"
        is_damage = "checkpoints/step_" in case.file and not case.way.startswith("[")
        if verb == "checkpoints" and is_damage and outcome == "right":
            outcome = "right" if "damaged" in ended.text else "silent change"
        yield verb, outcome, ended.text
        shutil.rmtree(own.folder, ignore_errors=True)


FLAWS = ("traceback", "hang", "silent change", "no sentence")


def sweep(
    ground: Ground, chosen: list[Case], folder: Path, log: Callable[[str], None] = print
) -> collections.Counter[tuple[str, str]]:
    """All cases, one after the other: how often each verb ended how; flaws are told as found."""
    untouched = expected(ground, folder)
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for number, case in enumerate(chosen):
        place = folder / str(number)
        for verb, outcome, text in try_case(ground, case, place, untouched):
            counts[verb, outcome] += 1
            if outcome in FLAWS:
                log(f"{outcome}: {verb} after {case}: {text.strip()[-600:]}")
        shutil.rmtree(place, ignore_errors=True)
    return counts


def preload() -> None:
    """Import what the verbs import, so that a forked process need not."""
    import neftune_dist.checkpoint.export
    import neftune_dist.checkpoint.listing
    import neftune_dist.cluster.launch.supervisor
    import neftune_dist.engine.fsdp2
    import neftune_dist.evaluation.evaluate
    import neftune_dist.training.train  # noqa: F401


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--files", nargs="+", default=["*"], help="by pattern: 'run/logs/*'")
    parser.add_argument("--types", action="store_true", help="odd values in JSON files")
    parser.add_argument("--sample", type=int, default=0, help="so many cases, spread over all")
    arguments = parser.parse_args()
    os.environ.update(tiny_model.environment())
    preload()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ground = Ground.make(folder)
        chosen = odd_cases(ground) if arguments.types else cases(ground, arguments.files)
        if arguments.sample:  # the way moves on with the file, since 20 is no multiple of the step
            chosen = chosen[:: max(1, len(chosen) // arguments.sample)]
        num_files = len({case.file for case in chosen})
        print(f"{num_files} files, {len(WAYS)} ways: {len(chosen)} cases", flush=True)
        children = []
        for job in range(arguments.jobs):
            counted = folder / f"counts_{job}.json"
            pid = os.fork()
            if pid == 0:
                counts = sweep(
                    ground,
                    chosen[job :: arguments.jobs],
                    folder / f"job_{job}",
                    lambda line: print(line, flush=True),
                )
                counted.write_text(json.dumps([[*key, n] for key, n in counts.items()]))
                os._exit(0)
            children.append((pid, counted))
        total: collections.Counter[tuple[str, str]] = collections.Counter()
        for pid, counted in children:
            assert os.waitpid(pid, 0)[1] == 0
            for verb, outcome, number in json.loads(counted.read_text()):
                total[verb, outcome] += number
    outcomes = ("right", "refused", "accepted", *FLAWS)
    print(f"{'':12}" + "".join(f"{outcome:>15}" for outcome in outcomes))
    for verb in VERBS:
        print(f"{verb:12}" + "".join(f"{total[verb, outcome]:15}" for outcome in outcomes))
    print(f"{total.total()} calls; {(time.monotonic() - began) / 60:.0f} minutes in all")
    sys.exit(any(number for (_, outcome), number in total.items() if outcome in FLAWS))


if __name__ == "__main__":
    main()

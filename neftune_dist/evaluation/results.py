"""The folder of an evaluation's results, written part by part and kept by a second call.

    summary.json    all figures; null for a part that was not evaluated
    items.json      values by document, item or answer, to be compared between models
    answers.json    the answers, in AlpacaEval's form
    settings.json   which weights were evaluated, and the settings of each part

Files are replaced whole after each part, so that a part which fails leaves the others intact. A
part that was made with the same settings is kept. Refused: a folder of another model, a folder with
files of these names that no evaluation wrote, a folder that another process is writing, and other
settings for existing answers, which may have taken hours.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from neftune_dist.config import Nullable, UserError, read_json, with_checksum
from neftune_dist.distributed.world import World
from neftune_dist.evaluation import text_statistics
from neftune_dist.evaluation.target import EvaluationTarget
from neftune_dist.system import storage

# What an evaluation writes, by pattern.
_OURS = (
    *("summary.json", "items.json", "answers.json", "answers.jsonl", "answers[0-9]*.jsonl"),
    *("tasks.jsonl", "judgements.jsonl", "requests.jsonl"),
    *("alpaca_eval.json", "annotations_cache.json"),
)
LABELS = {  # of figures in summary.json, in tables and logs
    **text_statistics.LABELS,
    "held_out_loss": "held-out loss",
    "num_documents": "held-out documents",
    "num_supervised_tokens": "their supervised tokens",
    "num_train_documents": "training documents",
    "train_loss": "training loss, noise off",
    "train_loss_noisy": "training loss, noise on",
}
PARTS = ("losses", "answers", "tasks", "judge")
_FIX = "choose another --output, or remove that directory to start again"
# Schemas of the files, as `config.json_files` reads them; checksums guard the figures.
FORMS = {
    "summary.json": {
        "subject": {"name": str, "step": int | None, "alpha": float | None},
        "losses?": Nullable({str: float | None}),
        "answers?": Nullable({str: float | None}),
        "tasks?": Nullable({str: {"accuracy": float, "standard_error": float, "num_items": int}}),
        "judge?": Nullable(dict),
    },
    "items.json": {
        **{f"{name}?": [[float]] for name in ("held_out", "train", "train_noisy")},
        "answers?": {str: [float | bool | None]},
        "tasks?": {str: [float | bool]},
        "judge?": [float | None],
    },
    "answers.json": [
        {
            **{"instruction": str, "output": str, "generator": str},
            **{"num_tokens?": int, "finished?": bool, "sample?": int},
        }
    ],
    "settings.json": {"subject": str, "answers_sha256?": str, **{f"{p}?": dict for p in PARTS}},
}


Settings = Mapping[str, Any]  # that a part depends on, by name
Found = tuple[dict[str, Any], dict[str, Any]]  # figures for summary.json, items for items.json


class Results:
    """The results of one model. A collective of all ranks, of which rank 0 reads and writes.

    Raises:
        UserError: the folder cannot be written, is damaged, in use, or another model's.
    """

    def __init__(self, folder: Path, target: EvaluationTarget, world: World) -> None:
        self.folder, self._world = folder, world
        about = {"name": target.name, "step": target.step, "alpha": target.alpha}
        self.summary: dict[str, Any] = {"subject": about, **dict.fromkeys(PARTS)}
        self.items: dict[str, Any] = {}
        self._settings: dict[str, Any] = {"subject": target.identity}
        with world.agree(), ExitStack() as held:  # released where this fails
            if world.is_first:
                self._open(target, held)
            self._held = held.pop_all()

    def _open(self, target: EvaluationTarget, held: ExitStack) -> None:
        storage.refuse_foreign(self.folder, _OURS, "settings.json", f"--output={self.folder}")
        busy = f"Another evaluation is writing into {self.folder}: wait for it."
        with storage.writing(str(self.folder)):
            self.folder.mkdir(parents=True, exist_ok=True)
        held.enter_context(storage.hold(self.folder / ".lock", busy))
        stored = read_results(self.folder)
        if stored:
            self._settings = stored.pop("settings")
            if self._settings["subject"] != target.identity:
                raise UserError(
                    f"{self.folder} holds the evaluation of another model than {target.name}, or "
                    f"its weights have changed since: {_FIX}."
                )
            self.summary |= stored.get("summary", {})
            self.items = stored.get("items", {})
        else:
            self._write("settings.json", self._settings)

    def close(self) -> None:
        """Release the folder for another process."""
        self._held.close()

    def begin_answers(self, settings: Settings) -> None:
        """Write the settings of the answers before the first of them. Raises `UserError` where
        there are answers with other settings."""
        with self._world.agree():
            if self._world.is_first:
                stored = self._settings.setdefault("answers", dict(settings))
                other = [key for key in settings if stored.get(key) != settings[key]]
                if other:
                    both = {k: f"{k} (then {stored.get(k)}, now {settings[k]})" for k in other}
                    shown = ", ".join(k if k == "prompts" else both[k] for k in other)
                    raise UserError(f"{self.folder} holds answers made with other {shown}: {_FIX}.")
                self._write("settings.json", self._settings)

    def make(
        self, part: str, settings: Settings, compute: Callable[[], Found], keep: bool = True
    ) -> None:
        """Compute a part and write it, unless it is there; log its figures. All ranks call it.

        Args:
            part: one of `PARTS`.
            settings: that it depends on.
            compute: a collective of all ranks; what rank 0 returns is written.
            keep: whether a part that was made before with these settings is kept.
        """
        same = self.summary[part] is not None and self._settings.get(part) == settings
        if self._world.from_first("kept" if keep and self._world.is_first and same else ""):
            self._world.log(f"{part}: kept from an earlier evaluation")
        else:
            figures, items = compute()
            with self._world.agree():
                if self._world.is_first:
                    self.summary[part], self._settings[part] = figures, dict(settings)
                    self.items |= items
                    self._write("items.json", self.items)
                    self._write("summary.json", self.summary)
                    self._write("settings.json", self._settings)
        for line in lines(part, self.summary[part]) if self._world.is_first else ():
            self._world.log(line)

    def put_answers(self, rows: list[dict[str, Any]]) -> None:
        """Write answers.json, and its digest before a summary that vouches for it. Rank 0."""
        self._write("answers.json", rows)
        self._settings["answers_sha256"] = _digest(self.folder)
        self._write("settings.json", self._settings)

    def _write(self, name: str, content: Any) -> None:
        content = with_checksum(content) if isinstance(content, dict) else content
        with storage.writing(str(self.folder)):
            storage.write(self.folder / name, json.dumps(content, indent=1) + "\n")


def read_results(folder: Path, fix: str = _FIX) -> dict[str, Any]:
    """What an evaluation has written into a folder so far: settings, summary, items, and answers
    where the summary has some. Raises `UserError` where a file is damaged or missing."""

    def read(name: str) -> Any:
        file, is_object = f"{name}.json", name != "answers"
        return read_json(folder / file, FORMS[file], fix=fix, has_checksum=is_object)

    names = ["settings"] if (folder / "settings.json").exists() else []
    if (folder / "summary.json").exists():
        names = ["settings", "summary", "items"]
    found = {name: read(name) for name in names}
    if found.get("summary", {}).get("answers"):
        found["answers"] = read("answers")
        if _digest(folder) != found["settings"].get("answers_sha256"):
            raise UserError(f"{folder / 'answers.json'} has changed since it was written: {fix}.")
    return found


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / "answers.json").read_bytes()).hexdigest()


def lines(part: str, figures: Mapping[str, Any]) -> list[str]:
    """A part's figures as lines for the log."""
    if part == "tasks":
        return [_task_line(name, task) for name, task in figures.items()]
    if part == "judge":
        return [_judge_line(figures)]
    shown = {LABELS.get(k, k): value for k, value in figures.items() if value is not None}
    numbers = {k: f"{v:.4f}" if isinstance(v, float) else str(v) for k, v in shown.items()}
    text = "; ".join(f"{label} {number}" for label, number in numbers.items())
    return textwrap.wrap(text, 98, subsequent_indent="  ")


def _task_line(name: str, task: Mapping[str, Any]) -> str:
    details = [f"{task['num_items']} items"]
    if "metric" in task:
        details += [task["metric"], f"{task['num_shots']}-shot"]
    if cut := task.get("num_truncated"):
        details.append(f"{cut} prompts cut on the left")
    error = f"{task['accuracy']:.1%} +- {task['standard_error']:.1%}"
    return f"{name}: {error} ({', '.join(details)})"


def _judge_line(figures: Mapping[str, Any]) -> str:
    if figures["win_rate"] is None:
        return f"judge: none of {figures['num']} comparisons could be decided"
    rates = []
    for label, rate, interval in (
        ("win rate", "win_rate", "interval"),
        ("win rate at equal lengths", "length_controlled", "length_controlled_interval"),
        ("over pairs of like lengths", "length_matched", ""),
    ):
        if figures.get(rate) is not None:
            ends = figures.get(interval)
            bounds = f" ({ends[0]:.1f} to {ends[1]:.1f})" if ends else ""
            rates.append(f"{label} {figures[rate]:.1f} %{bounds}")
    unclear = figures["num_unparsed"] + figures["num_failed"]
    return f"{', '.join(rates)} of {figures['num']} comparisons, {unclear} of them undecided"

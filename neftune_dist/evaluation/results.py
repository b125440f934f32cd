"""The folder that an evaluation fills, part by part, and what a second call finds in it.

    summary.json    all figures; a part that nobody asked for is null
    items.json      values by document, item or answer, to be compared between models
    answers.json    the answers, in AlpacaEval's form
    settings.json   whose results these are, and the settings that each part was made with

Files are replaced whole, after each part, so that one which fails takes none of the others with it.
A part that is there already, made with the same settings, is kept. Refused: a folder of another
subject, a folder with files of these names that no evaluation wrote, one that another process is
filling, and other settings for answers that are there, which may have taken hours.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from neftune_dist.config import Nullable, UserError, read_json, with_checksum
from neftune_dist.distributed.world import World
from neftune_dist.evaluation.target import Subject
from neftune_dist.system import storage

# What an evaluation writes, by pattern.
_OURS = (
    *("summary.json", "items.json", "answers.json", "answers.jsonl", "answers[0-9]*.jsonl"),
    *("judgements.jsonl", "requests.jsonl", "alpaca_eval.json", "annotations_cache.json"),
)
PARTS = ("losses", "answers", "tasks", "judge")
_MEND = "choose another --output, or remove that directory to begin anew."
_FIX = _MEND.rstrip(".")
_LOSSES = {
    "held_out_loss": float | None,
    "perplexity": float | None,
    "num_documents": int,
    "num_supervised_tokens": int,
    "train_loss": float | None,
    "train_loss_noisy": float | None,
    "num_train_documents": int,
}
_TASK = {"accuracy": float, "standard_error": float, "num_items": int}
_JUDGED = {
    "win_rate": float | None,
    "interval": list | None,
    "length_controlled": float | None,
    "length_controlled_interval": list | None,
    "num": int,
    "num_unparsed": int,
    "num_failed": int,
}
_SUMMARY = {
    "subject": {"name": str, "step": int | None, "alpha": float | None},
    "losses?": Nullable(_LOSSES),
    "answers?": Nullable({str: float | None}),
    "tasks?": Nullable({str: _TASK}),
    "judge?": Nullable(_JUDGED),
}
_ITEMS = {
    "held_out?": [[float]],
    "train?": [[float]],
    "train_noisy?": [[float]],
    "answers?": {str: [float | bool | None]},
    "tasks?": {str: [float | bool]},
    "judge?": [float | None],
}
ANSWERS = [
    {"instruction": str, "output": str, "generator": str, "num_tokens?": int, "finished?": bool}
]
_SETTINGS = {"subject": str, "answers_sha256?": str, **{f"{part}?": dict for part in PARTS}}
FORMS = {
    "summary.json": _SUMMARY,
    "items.json": _ITEMS,
    "answers.json": ANSWERS,
    "settings.json": _SETTINGS,
}


class Results:
    """The results of one subject. All ranks make it and ask it together; rank 0 reads and writes.

    Raises:
        UserError: the folder cannot be written, is damaged, in use, or not this subject's.
    """

    def __init__(self, folder: Path, subject: Subject, world: World) -> None:
        self.folder, self._world = folder, world
        about = {"name": subject.name, "step": subject.step, "alpha": subject.alpha}
        self.summary: dict[str, Any] = {"subject": about, **dict.fromkeys(PARTS)}
        self.items: dict[str, Any] = {}
        self._settings: dict[str, Any] = {"subject": subject.identity}
        with world.agree(), ExitStack() as held:  # let go where this fails
            if world.is_first:
                self._open(subject, held)
            self._held = held.pop_all()

    def _open(self, subject: Subject, held: ExitStack) -> None:
        storage.refuse_foreign(self.folder, _OURS, "settings.json", f"--output={self.folder}")
        busy = f"{self.folder} is being filled by another evaluation: wait for it."
        with storage.writing(str(self.folder)):
            self.folder.mkdir(parents=True, exist_ok=True)
        held.enter_context(storage.hold(self.folder / ".lock", busy))
        if not (self.folder / "settings.json").exists():
            self._write("settings.json", self._settings)
            return
        stored = self.read("settings.json")
        if stored.get("subject") != subject.identity:
            raise UserError(
                f"{self.folder} holds the evaluation of another subject than {subject.name}, or "
                f"its weights have changed since: {_MEND}"
            )
        self._settings = stored
        if (self.folder / "summary.json").exists():
            self.summary |= self.read("summary.json")
            self.items = self.read("items.json")
            written = stored.get("answers_sha256")
            if written and self.summary["answers"] and self._answers_digest() != written:
                raise UserError(
                    f"{self.folder / 'answers.json'} has changed since it was written: {_MEND}"
                )

    def close(self) -> None:
        """Let another process fill the folder."""
        self._held.close()

    def begin_answers(self, settings: Mapping[str, Any]) -> None:
        """Say what the answers are made with, before the first of them. Raises `UserError` where
        there are some that were made otherwise."""
        with self._world.agree():
            if self._world.is_first:
                stored = self._settings.setdefault("answers", dict(settings))
                other = [key for key in settings if stored.get(key) != settings[key]]
                if other:
                    shown = ", ".join(
                        key
                        if key == "prompts"
                        else f"{key} (then {stored.get(key)}, now {settings[key]})"
                        for key in other
                    )
                    raise UserError(f"{self.folder} holds answers made with other {shown}: {_MEND}")
                self._write("settings.json", self._settings)

    def has(self, part: str, settings: Mapping[str, Any]) -> bool:
        """Whether that part is there, made with these settings."""
        same = self.summary[part] is not None and self._settings.get(part) == settings
        told = self._world.from_first("kept" if self._world.is_first and same else "")
        return bool(told)

    def put(
        self,
        part: str,
        settings: Mapping[str, Any],
        figures: Mapping[str, Any],
        items: Mapping[str, Any],
    ) -> None:
        """Write a part's figures for summary.json, and its values for items.json. Other ranks than
        0 may call it as well."""
        if not self._world.is_first:
            return
        self.summary[part], self._settings[part] = dict(figures), dict(settings)
        self.items |= items
        self._write("items.json", self.items)
        self._write("summary.json", self.summary)
        self._write("settings.json", self._settings)

    def put_answers(self, rows: list[dict[str, Any]]) -> None:
        """Write answers.json. Rank 0."""
        self._write("answers.json", rows)
        self._settings["answers_sha256"] = self._answers_digest()

    def _answers_digest(self) -> str:
        try:
            return hashlib.sha256((self.folder / "answers.json").read_bytes()).hexdigest()
        except OSError:  # it has been removed
            return ""

    def read(self, name: str) -> Any:
        """One of the files. Raises `UserError` where it is damaged."""
        return read_json(self.folder / name, FORMS[name], fix=_FIX)

    def _write(self, name: str, content: Any) -> None:
        content = with_checksum(content) if isinstance(content, dict) else content
        with storage.writing(str(self.folder)):
            storage.write(self.folder / name, json.dumps(content, indent=1) + "\n")


def told(part: str, figures: Mapping[str, Any]) -> list[str]:
    """A part's figures, to be read by people."""
    return {"losses": _losses, "answers": _answers, "tasks": _tasks, "judge": _judge}[part](figures)


def _losses(figures: Mapping[str, Any]) -> list[str]:
    lines = []
    if figures["held_out_loss"] is not None:
        lines.append(
            f"held-out loss {figures['held_out_loss']:.4f}, perplexity "
            f"{figures['perplexity']:.2f} ({figures['num_documents']} documents, "
            f"{figures['num_supervised_tokens']} supervised tokens)"
        )
    if figures["train_loss"] is not None:
        lines.append(
            f"training loss {figures['train_loss']:.4f}, with noise "
            f"{figures['train_loss_noisy']:.4f} ({figures['num_train_documents']} documents)"
        )
    return lines


def _answers(figures: Mapping[str, Any]) -> list[str]:
    right = figures["exact_match"]
    lines = [
        f"{figures['num']} answers" + (f", exact match {right:.1%}" if right is not None else "")
    ]
    others = {k: v for k, v in figures.items() if k not in ("num", "exact_match")}
    shown = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in others.items())
    return lines + textwrap.wrap(shown, 98, initial_indent="  ", subsequent_indent="  ")


def _tasks(figures: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} {each['accuracy']:.1%} +- {each['standard_error']:.1%} ({each['num_items']} items)"
        for name, each in figures.items()
    ]


def _judge(figures: Mapping[str, Any]) -> list[str]:
    if figures["win_rate"] is None:
        return [f"judge: none of {figures['num']} comparisons could be decided"]
    rates = []
    for name, rate in (("", "win_rate"), (" at equal lengths", "length_controlled")):
        if figures[rate] is not None:
            interval = figures["interval" if rate == "win_rate" else f"{rate}_interval"]
            bounds = f" ({interval[0]:.1f} to {interval[1]:.1f})" if interval else ""
            rates.append(f"win rate{name} {figures[rate]:.1f} %{bounds}")
    unclear = figures["num_unparsed"] + figures["num_failed"]
    return [f"{', '.join(rates)} of {figures['num']} comparisons, {unclear} of them undecided"]

"""`neftune-dist chat`: talk to one model in the terminal, or to two side by side.

Each model has its own conversation, in its run's template, and answers as `neftune-dist evaluate`
has it answer: greedily, with the same repetition penalty. From a pipe, every line is a question.
Answers are not trusted: control characters, which a terminal would obey, are not printed.
"""

from __future__ import annotations

import io
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import zip_longest
from typing import Any

import torch

from neftune_dist.config import UserError
from neftune_dist.data.conversation import Turn
from neftune_dist.data.errors import BadRow
from neftune_dist.evaluation.target import EvaluationTarget, open_target
from neftune_dist.model.families import context_length
from neftune_dist.system.text import printable

with suppress(ImportError):  # of systems without it; it gives `input` a history and its keys
    import readline  # noqa: F401

_HELP = (
    "/reset forgets the conversation, /system TEXT begins one with a system prompt, /quit ends. "
    "Ctrl-C stops an answer, Ctrl-D ends."
)
STOPPED = "[stopped]"
_LEAST_COLUMN = 32  # characters; in narrower terminals one answer follows the other
_GAP = " | "
_INTERRUPTED = 130  # as shells have it
# Scores divided by less may be more than a float holds; the greatest would win anyway.
_LEAST_TEMPERATURE = 1e-6


def chat(names: Sequence[str], settings: Sequence[str], *, temperature: float = 0.0) -> int:
    """Chat until the input ends; return the exit code.

    Args:
        names: one or two that `open_target` opens.
        settings: `key=value` words, for both.
        temperature: of sampling; 0: greedy.

    Raises:
        UserError: there is no such model, or it has no chat template.
    """
    if len(names) > 2:
        raise UserError(f"chat takes one model or two, not {len(names)}: {', '.join(names)}.")
    at_terminal = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are no text are refused line by line; strictly, all that was read with them
        # would be lost.
        sys.stdin.reconfigure(errors="surrogateescape")
    speakers = []
    try:
        for target in [open_target(n, settings=settings, is_measured=False) for n in names]:
            if at_terminal:
                print(f"loading {target.name}", flush=True)
            speakers.append(Speaker(target, temperature))
    except KeyboardInterrupt:
        return _INTERRUPTED
    if at_terminal:
        print(_HELP, flush=True)
    for speaker in speakers:
        if not speaker.remembers:
            _mistake(f"The template of {speaker.name} takes one question: it forgets earlier ones.")
    return _talk(speakers)


class Speaker:
    """A model and its conversation. Loads the model. Raises `UserError` where its template cannot
    express a question.

    Attributes:
        name: printed above its answers.
        target: the model.
        temperature: of sampling; 0: greedy.
        remembers: whether its template takes earlier questions and answers.
        system: the system prompt, if any.
        turns: earlier questions and answers.
    """

    def __init__(self, target: EvaluationTarget, temperature: float) -> None:
        self.target, self.temperature = target, temperature
        self.system: list[Turn] = []
        self.turns: list[Turn] = []
        alpha = "" if target.alpha is None else f" (alpha {target.alpha:g})"
        self.name = target.name + alpha
        question, self.remembers = Turn("user", "And?"), True
        try:
            target.template.reply_ids([question])
        except BadRow as error:
            raise UserError(f"{target.name} cannot be asked: {error}.") from error
        try:
            target.template.reply_ids([question, Turn("assistant", "Yes."), question])
        except BadRow:
            self.remembers = False
        target.model  # noqa: B018 (loaded before the first question)

    def system_turn(self, text: str) -> list[Turn]:
        """Make a system prompt of the text; none if empty. Raises `BadRow` where the template takes
        none."""
        system = [Turn("system", text)] if text else []
        self.target.template.reply_ids([*system, Turn("user", "And?")])
        return system

    def answer(self, question: str, show: Callable[[str], None]) -> tuple[str, str]:
        """Answer a question, showing the text as it comes, and keep both as turns.

        Returns:
            The answer as it is shown, stripped, and a remark on why it is incomplete; empty where
            it is not.

        Raises:
            BadRow: the template cannot express the conversation, or the model has no room for it.
        """
        earlier = self.turns if self.remembers else []
        turns = [*earlier, Turn("user", question)]
        ids = self.target.template.reply_ids([*self.system, *turns])
        asked, limit = self.target.config.evaluate.max_new_tokens, "evaluate.max_new_tokens"
        longest = context_length(self.target.model.config) or len(ids) + asked
        if len(ids) >= longest:
            raise BadRow(
                f"the conversation has {len(ids)} tokens, and the model takes {longest} with "
                "the answer: /reset forgets it"
            )
        most = min(asked, longest - len(ids))
        pieces, remark = _Pieces(self.target.tokenizer, set(self.target.end_tokens), show), ""
        sampling = None
        if self.temperature >= _LEAST_TEMPERATURE:
            sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0}
        try:
            self.target.generator.run([ids], most, streamer=pieces, sampling=sampling)
            if not pieces.ended:
                limit = limit if most == asked else "the model takes no more"
                remark = f"[cut after {pieces.num_tokens} tokens: {limit}]"
        except KeyboardInterrupt:
            pieces.end()
            remark = STOPPED
        said = pieces.said.strip()
        self.turns = [*turns, Turn("assistant", said)] if said else earlier
        return pieces.shown.strip(), remark


class _Pieces:
    """Show whole words as soon as their tokens are there, as a streamer of transformers. All tokens
    are read together: those of a line alone have another text, without the space they begin with.

    Attributes:
        said: the answer so far.
        shown: the same, without what a terminal would obey.
        num_tokens: of the answer.
        ended: whether the model ended the answer itself.
    """

    def __init__(self, tokenizer: Any, ends: set[int], show: Callable[[str], None]) -> None:
        self._tokenizer, self._ends, self._show = tokenizer, ends, show
        self._ids: list[int] = []
        self._num_shown = 0  # characters
        self.said = self.shown = ""
        self.num_tokens, self.ended = -1, False  # the prompt comes first

    def put(self, value: torch.Tensor) -> None:
        self.num_tokens += 1
        if self.num_tokens == 0:
            return
        token = int(value.flatten()[-1])
        self.ended = token in self._ends
        if not self.ended:
            self._ids.append(token)
            self.said = self._tokenizer.decode(self._ids, skip_special_tokens=True).lstrip()
            self.shown = printable(self.said.replace("\r\n", "\n"))
            # The last word may go on; a wide character (Chinese, an emoji) is whole.
            is_wide = unicodedata.east_asian_width(self.shown[-1:] or " ") in "WF"
            self._show_until(None if is_wide else self.shown.rfind(" ") + 1)
            self._show_until(self.shown.rfind("\n") + 1)

    def end(self) -> None:
        self._show_until(None)

    def _show_until(self, stop: int | None) -> None:
        if new := self.shown[self._num_shown : stop]:
            self._num_shown += len(new)
            self._show(new)


def _talk(speakers: list[Speaker]) -> int:
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
            line.encode()
        except EOFError:
            if sys.stdin.isatty():
                print(flush=True)
            return 0
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit ends.)", flush=True)
            continue
        except UnicodeError:
            _mistake(f"This line is not text in {sys.stdin.encoding}.")
            continue
        command, _, rest = line.partition(" ")
        try:
            if command == "/quit":
                return 0
            if command in ("/reset", "/system"):
                changed = command == "/system"
                systems = [s.system_turn(rest.strip()) if changed else s.system for s in speakers]
                for speaker, system in zip(speakers, systems, strict=True):
                    speaker.system, speaker.turns = system, []
            elif command.startswith("/"):
                _mistake(f"There is no command {command}. {_HELP}")
            elif line:
                _ask(speakers, line)
        except BadRow as error:
            _mistake(f"That cannot be said: {error}.")


def _ask(speakers: list[Speaker], question: str) -> None:
    if len(speakers) == 1:
        _, remark = speakers[0].answer(question, _show)
        _show(f"\n{remark}\n" if remark else "\n")
        return
    texts: list[str] = []
    remark = ""
    for speaker in speakers:
        said = ""
        try:
            if remark != STOPPED:  # one Ctrl-C stops both
                said, remark = speaker.answer(question, lambda _: None)
        except BadRow as error:
            remark = f"[{error}]"
        texts.append("\n".join(filter(None, (said, remark))))
    names = [speaker.name for speaker in speakers]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    for line in side_by_side(names, texts, width):
        _show(f"{line}\n")


def side_by_side(names: Sequence[str], texts: Sequence[str], width: int) -> list[str]:
    """Texts under their names, in columns if `width` characters have room, else one after the
    other."""
    column = (width - len(_GAP) * (len(names) - 1)) // len(names)
    under = list(zip(names, texts, strict=True))
    if column < _LEAST_COLUMN:
        return [line for name, text in under for line in (f"--- {name}", *text.splitlines())]

    def wrapped(text: str) -> list[str]:
        return [part for row in text.splitlines() for part in textwrap.wrap(row, column) or [""]]

    columns = [[*wrapped(name), "-" * column, *wrapped(text)] for name, text in under]
    rows = zip_longest(*columns, fillvalue="")
    return [_GAP.join(f"{part:<{column}}" for part in parts).rstrip() for parts in rows]


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _mistake(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)

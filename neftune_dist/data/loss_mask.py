"""The spans of the turns in the text that a chat template renders, and with them the loss mask.

A template does not say which part of its text belongs to which turn. An answer begins where the
text of the turns before it ends, generation prompt included; it ends where the text of the turns up
to it ends. Both are searched in the text of the whole conversation. Many templates write a turn
differently once others follow (they drop an empty reasoning, or move the system prompt to the last
question): then the template's own `{% generation %}` marks decide, then a search for the answer
together with its question. A turn that is not found makes a bad row: the mask is never a guess.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from neftune_dist.data.chat_template import ChatTemplate, tools_of
from neftune_dist.data.conversation import Conversation
from neftune_dist.data.errors import BadRow
from neftune_dist.data.spans import Chunk, Rendered, Span

_THOUGHT = re.compile(r"</?think>")

_Range = tuple[int, int]  # half-open, of characters


def render(template: ChatTemplate, conversation: Conversation, supervise: str) -> Rendered:
    """The text of a conversation with the spans of its turns.

    Args:
        template: renders the text.
        conversation: with at least one answer.
        supervise: as `data.supervise`. With "all" the caller learns every token, except those of
            answers that are not to be learned.

    Raises:
        BadRow: the template refuses or leaves out a turn, or an answer to learn is changed or
            cannot be told apart.
    """
    text = _RenderedText(template, conversation)
    learned = {i for i in text.answers if conversation.turns[i].learned}
    whole = supervise == "all"
    answers = set(text.answers) - learned if whole else learned
    if supervise == "last":
        answers = {max(learned)} if learned else set()
    found: dict[int, Span] = {}
    marks_end = whole and text.answers[-1] in learned
    marks_end = marks_end and text.text.rstrip().endswith(template.special)
    for i in sorted(answers):
        after = max((span.end for span in found.values()), default=0)
        span, is_marked = text.answer(i, after)
        found[i] = Span(*span[:3], not whole)
        marks_end = marks_end if whole else is_marked
    spans = [Span(*span[:3], whole) for span in text.others(found)]
    return Rendered((Chunk(text.text, (*spans, *found.values())),), marks_end)


@dataclass(frozen=True)
class _AnswerText:
    """The conversation up to an answer, rendered while that is the last turn.

    Attributes:
        text: up to the answer's end, end-of-turn token included.
        prompts: the generation prompts that the text begins with, the longest first.
        content: where the assistant's words begin.
    """

    text: str
    prompts: tuple[str, ...]
    content: int


class _RenderedText:
    """A conversation and its text."""

    def __init__(self, template: ChatTemplate, conversation: Conversation) -> None:
        self.template = template
        self.messages, self.tools = template.messages(conversation), tools_of(conversation)
        self.text = template.apply(self.messages, self.tools)
        self.answers = [i for i, m in enumerate(self.messages) if m["role"] == "assistant"]
        calls = [call for message in self.messages for call in message.get("tool_calls", [])]
        called = [call["function"]["name"] for call in calls]
        for tool in self.tools or []:
            name = tool["function"]["name"]
            # A call names the tool, too: that alone does not show its schema.
            if self.text.count(name) <= called.count(name):
                raise BadRow(f"the chat template leaves out the tools, such as {name}")

    def answer(self, i: int, after: int) -> tuple[Span, bool]:
        """The span of message i, an answer after a place in the text, and whether a token marks
        its end."""
        turn, marked = self._answer_text(i)
        if self.text.startswith(turn.text):
            place: _Range | None = (len(turn.prompts[0]), len(turn.text))
        else:
            place = self._by_marks(i, turn) or self._by_question(i, turn, after)
        if place is None:
            raise BadRow(
                f"the chat template renders turn {i + 1} differently once later turns follow, so "
                "what the assistant said in it cannot be told apart; data.supervise=last learns "
                "the last answer alone"
            )
        return Span(*place, "assistant", learned=True), marked

    def others(self, found: dict[int, Span]) -> list[Span]:
        """The spans of the other turns: between the answers around them, or wherever the template
        has moved them. Raises `BadRow` where a turn is missing."""
        spans: list[Span] = []
        cursor = 0
        for i, message in enumerate(self.messages):
            if i in found:
                cursor = found[i].end
                continue
            role, content = message["role"], message["content"].strip()
            end = min((s.begin for s in found.values() if s.begin >= cursor), default=None)
            place = self._find(content, cursor, end) or self._find(content, 0, None)
            if place is None and role == "assistant":  # its reasoning may be dropped
                place = self._find(_THOUGHT.split(content)[-1].strip(), cursor, end)
            if place is None:
                raise BadRow(
                    f"the chat template leaves out or changes what the {role} says in turn {i + 1}"
                )
            self._check_calls(i, self.text[cursor:end])
            cursor = max(cursor, place[1] if end is None or place[1] <= end else 0)
            spans.append(Span(*place, role))
        return spans

    def _answer_text(self, i: int) -> tuple[_AnswerText, bool]:
        message, is_last = self.messages[i], i == len(self.messages) - 1
        through = self.text if is_last else self._apply(i + 1)
        prompts = self.template.prompts(self.messages[:i], self.tools)
        prompts = [prompt for prompt in prompts if through.startswith(prompt)]
        if not prompts:
            raise BadRow(
                f"the chat template's generation prompt is not what turn {i + 1} begins with, "
                "so what the assistant said in it cannot be told apart"
            )
        place = _content(through, len(prompts[0]), message["content"])
        if place is None:
            raise BadRow(f"the chat template changes the assistant's text in turn {i + 1}")
        reasoning = message.get(self.template.reasoning_field or "", "").strip()
        if reasoning not in through[len(prompts[0]) :]:
            raise BadRow(f"the chat template leaves out the reasoning of turn {i + 1}")
        # The answer ends after the end-of-turn token and before the template's white space that
        # leads to the next turn: no model generates that.
        tail = self._end_of_turn(through[place[1] :].rstrip(), i, through)
        calls = self._check_calls(i, tail)
        marked = tail.endswith(self.template.special) if calls else bool(tail)
        return _AnswerText(through[: place[1]] + tail, tuple(prompts), place[0]), marked

    def _check_calls(self, i: int, said: str) -> bool:
        """Whether message i calls tools. Raises `BadRow` where a call is missing in its text."""
        calls = self.messages[i].get("tool_calls", [])
        if any(call["function"]["name"] not in said for call in calls):
            raise BadRow(f"the chat template leaves out what the assistant calls in turn {i + 1}")
        return bool(calls)

    def _end_of_turn(self, tail: str, i: int, through: str) -> str:
        """The part of the text after an answer that stays when a turn follows: some templates
        (Phi-3's) write the end of the turn, then that of the conversation."""
        last = next((token for token in self.template.special if tail.endswith(token)), "")
        own = tail.removesuffix(last).rstrip()
        if not last or not own.endswith(self.template.special):
            return tail
        followed = self.text
        if i == len(self.messages) - 1:
            next_turn = {"role": "user", "content": "And?"}
            followed = self.template.apply([*self.messages, next_turn], self.tools)
        through = through.rstrip()
        before = through[: len(through) - len(tail)]
        stays = followed.startswith(through) or not followed.startswith(before + own)
        return tail if stays else own

    def _by_marks(self, i: int, turn: _AnswerText) -> _Range | None:
        """The range of an answer by the template's `{% generation %}` marks, without the generation
        prompt and the white space after the turn, which no model generates. Checked against the
        content, because the ranges of marks inside a macro are wrong."""
        marks = self.template.generations(self.messages, self.tools)
        if len(marks) != len(self.answers):
            return None
        begin, end = marks[self.answers.index(i)]
        marked, content = self.text[begin:end], self.messages[i]["content"]
        said = _content(marked, 0, content) or _content(marked, 0, _THOUGHT.split(content)[-1])
        if said is None:
            return None
        for prompt in turn.prompts:
            shared = next(n for n in range(said[0], -1, -1) if prompt.endswith(marked[:n]))
            if marked[:shared].strip():
                begin += shared
                break
        tail = marked[said[1] :]
        return begin, end - len(tail) + len(tail.rstrip())

    def _by_question(self, i: int, turn: _AnswerText, after: int) -> _Range | None:
        """The range of an answer that the template writes in full after its question, although
        something else has changed: the first place with the question, the generation prompt, the
        answer and its end."""
        question = self.messages[i - 1]["content"].strip() if i else ""
        for prompt in turn.prompts:
            asked = prompt.rfind(question) if question else -1
            if asked < 0:
                continue
            for begin in (len(prompt), turn.content):
                place = self.text.find(prompt[asked:] + turn.text[begin:], after)
                if place >= 0:
                    place += len(prompt) - asked
                    return place, place + len(turn.text) - begin
        return None

    def _find(self, content: str, begin: int, end: int | None) -> _Range | None:
        """The range of a content, as it is or as a JSON string, as some templates write results."""
        for said in (content, json.dumps(content, ensure_ascii=False)[1:-1]):
            place = self.text.find(said, begin, end)
            if place >= 0:
                return place, place + len(said)
        return None

    def _apply(self, num_messages: int) -> str:
        return self.template.apply(self.messages[:num_messages], self.tools)


def _content(text: str, start: int, content: str) -> _Range | None:
    """The range of an answer in a text from `start` on: as it is, trimmed, or with other white
    space between its reasoning and the rest."""
    for said in (content, content.strip()):
        place = text.find(said, start)
        if place >= 0:
            return place, place + len(said)
    if "</think>" not in content:
        return None
    parts = [re.escape(part.strip()) for part in _THOUGHT.split(content) if part.strip()]
    pattern = r"(?:<think>\s*)?" + r"\s*</?think>\s*".join(parts)
    found = re.compile(pattern).search(text, start)
    return found.span() if found else None

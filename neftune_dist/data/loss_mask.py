"""The spans of the turns in the text that a chat template renders, and with them the loss mask.

A template does not say which part of its text belongs to which turn. So it renders the conversation
once with a mark in place of everything that is said: letters that occur nowhere else. Where the
marks stand, which of them are missing and what lies between them depends on the shape of the
conversation alone (roles, calls, tools, reasoning), so it is found once a shape and kept. The text
of a row must then be that layout, with the row's words in place of the marks, character by
character; else the row is refused: the mask is never a guess.

An answer is what follows the generation prompt, up to the end of its turn, in the text that ends
with it. Some templates write it differently once turns follow (they drop its reasoning, or end it
with another token). Such an answer is learned in a document that ends with it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from neftune_dist.data.chat_template import OPENED_THOUGHT, ChatTemplate
from neftune_dist.data.conversation import Conversation, Turn
from neftune_dist.data.errors import BadRow
from neftune_dist.data.marks import (
    CALL_MARK,
    END,
    MARK,
    forms,
    marked,
    tool_marks,
    turn_of,
    with_functions,
)
from neftune_dist.data.spans import Chunk, Rendered, Span

_KEPT_SHAPES = 1024  # a few kilobytes each; with calls, those of the row, too


class LossMask:
    """Renders conversations with a chat template.

    Args:
        template: renders the text.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._layout = lru_cache(_KEPT_SHAPES)(self._new_layout)
        self._missing = lru_cache(_KEPT_SHAPES)(lambda shape: _missing_function(template, shape))

    def _new_layout(self, shape: Conversation) -> _Layout:
        return _Layout(self._template, shape, self._layout)

    def documents(
        self, conversation: Conversation, supervise: str, may_split: bool = True
    ) -> list[tuple[Conversation, Rendered]]:
        """The documents that learn the answers of a conversation, in its order: the whole one, and
        beginnings of it for answers that the template writes otherwise once turns follow.

        Args:
            conversation: with at least one answer.
            supervise: as `data.supervise`. With "all" the caller learns every token, except those
                of answers that are not to be learned.
            may_split: False: refuse a conversation that needs several documents.

        Raises:
            BadRow: the template refuses, leaves out, repeats or changes a turn.
        """
        view = self._template.normalised(conversation)
        left = [i for i, turn in enumerate(view.turns) if turn.role == "assistant" and turn.learned]
        if supervise == "last":
            left = left[-1:]
        if supervise == "all":
            return [(conversation, self._fit(view).rendered_whole(left))]
        found = list[tuple[Conversation, Rendered]]()
        while True:
            fitted = self._fit(view)
            here = [i for i in left if i < len(view.turns) and fitted.layout.place(i)]
            left = [i for i in left if i not in here]
            if left and not may_split:
                raise BadRow(
                    f"the chat template renders turn {left[0] + 1} differently once later turns "
                    "follow: data.split_conversations=as_needed trains on it in a document that "
                    "ends with it, data.supervise=last trains on the last answer alone"
                )
            if not left and not found:
                return [(conversation, fitted.rendered(here))]
            if here:
                turns = tuple(
                    turn._replace(learned=turn.role != "assistant" or i in here)
                    for i, turn in enumerate(conversation.turns[: len(view.turns)])
                )
                # The turns that the row left out count once.
                left_out = 0 if found else conversation.num_left_out
                part = replace(conversation, turns=turns, num_left_out=left_out)
                found.append((part, fitted.rendered(here)))
            if not left:
                return found[::-1]
            view = replace(view, turns=view.turns[: left[-1] + 1])

    def _fit(self, view: Conversation) -> _Fitted:
        """The text of a normalised conversation, compared with its layout."""
        functions = view.tools + "".join("".join(turn[2:5]) for turn in view.turns)
        if MARK.search(functions):
            raise BadRow("a tool or a call has words with which chat templates are checked")
        if functions and (missing := self._missing(with_functions(marked(view)[0]))):
            raise BadRow(f"the chat template leaves out {missing}")
        text = self._template.apply(self._template.messages(view), view.functions)
        for fine in (False, True):
            shape, pieces = marked(view, fine)
            layout = self._new_layout(shape) if fine else self._layout(shape)
            edges = layout.edges(text, pieces)
            if len(edges) == len(layout.marks) and (edges or text == layout.text):
                return _Fitted(view, text, layout, edges)
        marks = layout.marks[len(edges) :] or layout.marks[-1:]
        raise _changed(view.turns, turn_of(marks[0]) if marks else 0)


@dataclass(frozen=True)
class _Fitted:
    """A conversation, its text, and where the marks of its layout stand in that."""

    view: Conversation
    text: str
    layout: _Layout
    edges: list[tuple[int, int]]

    def rendered(self, learned: list[int]) -> Rendered:
        """With the spans of the turns, and answers to learn, which must have a place."""
        answers = [self._answer(i, True) for i in learned]
        cuts = tuple(answer.begin for answer in answers)
        return Rendered((Chunk(self.text, (*self._said(False), *answers), cuts=cuts),))

    def rendered_whole(self, learned: list[int]) -> Rendered:
        """As `rendered`, with every turn learned but the other answers."""
        for i in learned:
            self.layout.check_whole(i)
        turns = enumerate(self.view.turns)
        others = [i for i, turn in turns if turn.role == "assistant" and i not in learned]
        spans = (*self._said(True), *(self._answer(i, False) for i in others))
        return Rendered((Chunk(self.text, spans),))

    def _said(self, learned: bool) -> Iterator[Span]:
        for mark, (begin, end) in zip(self.layout.marks, self.edges, strict=True):
            yield Span(begin, end, self.view.turns[turn_of(mark)].role, learned)

    def _answer(self, i: int, learned: bool) -> Span:
        place = self.layout.place(i)
        if place is None:
            raise BadRow(
                f"the chat template renders turn {i + 1} differently once later turns follow, so "
                "what the assistant said in it cannot be told apart"
            )
        begin, end = (self.layout.at(edge, self.edges) for edge in place)
        return Span(begin, end, "assistant", learned)


class _Layout:
    """The text of a conversation of marks.

    Args:
        template: renders the text.
        shape: the conversation.
        layout_of: the layout of another, perhaps a known one.

    Attributes:
        text: with marks.
        marks: in the order in which they stand in the text.
    """

    def __init__(
        self,
        template: ChatTemplate,
        shape: Conversation,
        layout_of: Callable[[Conversation], _Layout],
    ) -> None:
        self._template, self._shape, self._turns = template, shape, shape.turns
        self._layout_of = layout_of
        self._messages, self._tools = template.messages(shape), shape.functions
        self.text = template.apply(self._messages, self._tools)
        parts = MARK.split(self.text)
        self._frames, self.marks = parts[::2], parts[1::2]
        # Where each frame begins in the text with marks.
        self._begins = [0]
        for frame, mark in zip(self._frames, self.marks, strict=False):
            self._begins.append(self._begins[-1] + len(frame) + len(mark))
        self._check_presence()

    def place(self, i: int) -> tuple[int, int] | None:
        """Half-open range of answer i in the text, None where it is not as a model generates it."""
        ending = self
        if i < len(self._turns) - 1:
            ending = self._layout_of(replace(self._shape, turns=self._turns[: i + 1]))
        prompt, said = ending.last_answer
        end = len(prompt + said)
        return (len(prompt), end) if self.text.startswith(prompt + said) else None

    def check_whole(self, i: int) -> None:
        """Raise `BadRow` where the text lacks something of answer i."""
        if any(mark not in self.text for mark in self._marks_of(i)):
            raise BadRow(
                f"the chat template leaves out the reasoning of turn {i + 1} once turns follow: "
                "data.supervise=assistant trains on it as it is generated"
            )

    def edges(self, text: str, pieces: dict[str, str]) -> list[tuple[int, int]]:
        """The ranges in the text of a row that stand in place of the marks, up to the first
        difference from the layout.

        Args:
            text: of a row of this shape.
            pieces: what is said in place of each mark.
        """
        found: list[tuple[int, int]] = []
        place = len(self._frames[0])
        if not text.startswith(self._frames[0]):
            return found
        last = len(self.marks) - 1
        for k, (mark, frame) in enumerate(zip(self.marks, self._frames[1:], strict=True)):
            for said in forms(pieces[mark]):
                end = place + len(said)
                is_here = text.startswith(said, place) and text.startswith(frame, end)
                if is_here and (k < last or end + len(frame) == len(text)):
                    break
            else:
                return found
            found.append((place, end))
            place = end + len(frame)
        return found

    def at(self, place: int, edges: list[tuple[int, int]]) -> int:
        """The place in the text of a row, with its `edges`, for a place outside the marks."""
        frame = bisect_right(self._begins, place) - 1
        return place - self._begins[frame] + (edges[frame - 1][1] if frame else 0)

    def _marks_of(self, i: int) -> list[str]:
        return MARK.findall(self._turns[i].reasoning + self._turns[i].content)

    def _check_presence(self) -> None:
        """Raise `BadRow` where a turn is missing, or is there twice. An earlier answer may lose its
        thoughts: its reasoning, or what stands beside a call."""
        for i, turn in enumerate(self._turns):
            number = {mark: self.text.count(mark) for mark in self._marks_of(i)}
            if any(times > 1 for times in number.values()):
                raise BadRow(
                    f"the chat template writes what the {turn.role} says in turn {i + 1} "
                    f"{max(number.values())} times"
                )
            needed = MARK.findall(turn.content)
            if turn.role == "assistant" and i < len(self._turns) - 1:
                needed = [] if turn.tool_calls else needed[-1:]
            if any(number[mark] == 0 for mark in needed):
                raise _changed(self._turns, i)

    @cached_property
    def last_answer(self) -> tuple[str, str]:
        """The text before the last turn, an answer, and what a model generates of that. Raises
        `BadRow` where its beginning is not found, or something of it is missing."""
        i, through = len(self._turns) - 1, self.text
        prompts = self._template.prompts(self._messages[:-1], self._tools)
        prompt = next((prompt for prompt in prompts if through.startswith(prompt)), None)
        marks = self._marks_of(i)
        if prompt is None:
            # Some prompts open a thought (R1's), and the answer has none.
            prompt = OPENED_THOUGHT.sub("", prompts[-1])
            opens = prompt != prompts[-1]
            if not opens or not marks or not through.startswith(prompt + marks[0]):
                raise BadRow(
                    f"the chat template's generation prompt is not what turn {i + 1} begins with, "
                    "so what the assistant said in it cannot be told apart"
                )
        said = through[len(prompt) :]
        if any(mark not in said for mark in MARK.findall(self._turns[i].content)):
            raise _changed(self._turns, i)
        if any(mark not in said for mark in marks):
            raise BadRow(f"the chat template leaves out the reasoning of turn {i + 1}")
        return prompt, self._without_what_follows(prompt, said.rstrip())

    def _without_what_follows(self, prompt: str, said: str) -> str:
        """The part of an answer that stays when a turn follows: some templates (Phi-3's) write the
        end of the turn, then that of the conversation."""
        last = END.search(said)
        own = said[: last.start()].rstrip() if last else ""
        if not END.search(own):
            return said
        turns = (*self._turns, Turn("user", "And?"))
        followed = self._template.apply(self._template.messages(Conversation(turns)), self._tools)
        stays = followed.startswith(prompt + said) or not followed.startswith(prompt + own)
        return said if stays else own


def _missing_function(template: ChatTemplate, shape: Conversation) -> str:
    """The first function that the text of `with_functions` lacks, in words; "" where it has all."""
    text = template.apply(template.messages(shape), shape.functions)
    for k in range(len(shape.functions or [])):
        if any(mark not in text for mark in tool_marks(k)):
            return f"the tools, such as tool {k + 1}"
    for i, turn in enumerate(shape.turns):
        if any(mark not in text for mark in CALL_MARK.findall(turn.tool_calls)):
            return f"what the assistant calls in turn {i + 1}"
    return ""


def _changed(turns: Sequence[Turn], i: int) -> BadRow:
    return BadRow(
        f"the chat template leaves out or changes what the {turns[i].role} says in turn {i + 1}"
    )

"""What became of every row, and the loss mask as people check it before the first step."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from neftune_dist.config import DataConfig, UserError
from neftune_dist.data.documents import Documents
from neftune_dist.data.spans import SPEAKERS
from neftune_dist.system.text import count_text

NAMED_ROWS = 20  # bad rows that the report names, of one source
_FEW_ENDS = 0.5  # share of documents with a supervised end below which a warning is given
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
# By whether a token is supervised, two for each case, so that neighbouring tokens differ.
_COLOURS = {True: ("\x1b[30;42m", "\x1b[30;102m"), False: ("\x1b[37m", "\x1b[90m")}
_RESET = "\x1b[0m"


@dataclass
class MaskAudit:
    """Tokens of an epoch by speaker, one of `SPEAKERS`.

    Attributes:
        num_tokens, num_supervised: all tokens, and the supervised ones.
        end_of_turn_learned: share of documents in which the end of the last supervised answer is
            supervised.
        end_advice: why no end of turn can be supervised; "" without a reason.
    """

    num_tokens: dict[str, int] = field(default_factory=dict)
    num_supervised: dict[str, int] = field(default_factory=dict)
    end_of_turn_learned: float = 0.0
    end_advice: str = ""

    @staticmethod
    def of(by_speaker: np.ndarray, end_learned: np.ndarray, end_advice: str = "") -> MaskAudit:
        """Sums over documents of these columns of `documents.STATS`."""
        tokens, supervised = by_speaker.sum(axis=0, dtype=np.int64).T.tolist()
        return MaskAudit(
            dict(zip(SPEAKERS, tokens, strict=True)),
            dict(zip(SPEAKERS, supervised, strict=True)),
            float(end_learned.mean()),
            end_advice,
        )

    def lines(self) -> list[str]:
        """The counts as printed lines, with warnings of likely mistakes."""
        total, learned = sum(self.num_tokens.values()), sum(self.num_supervised.values())
        roles = []
        for name, tokens in self.num_tokens.items():
            if tokens:
                share = self.num_supervised[name] / tokens
                part = f"{share:.1%} of them supervised" if share else "none supervised"
                roles.append(f"{name} {tokens / total:.1%} ({part})")
        lines = [f"data: tokens by role: {'; '.join(roles)}"]
        if self.end_of_turn_learned == 0:
            reason = f" ({self.end_advice})" if self.end_advice else ""
            warning = "no end of turn is supervised: the model will not learn to stop"
            lines.append(f"data: warning: {warning}{reason}")
        elif self.end_of_turn_learned < _FEW_ENDS:
            lines.append(
                "data: warning: the end of turn is supervised in "
                f"{self.end_of_turn_learned:.1%} of documents only: the model will hardly "
                "learn to stop"
            )
        for name in ("user", "system", "tool"):
            if self.num_supervised.get(name):
                lines.append(
                    f"data: warning: {self.num_supervised[name] / learned:.1%} of the supervised "
                    f"tokens are said by the {name}: data.supervise=assistant leaves them out"
                )
        return lines


@dataclass
class RowCounts:
    """Counts of rows, and of the documents that were made of them one by one.

    num_added_by_split documents were made of the num_split rows that became several.
    """

    num_rows: int = 0
    num_bad_rows: int = 0
    num_truncated: int = 0
    num_dropped_too_long: int = 0
    num_nothing_to_learn: int = 0
    num_plain_texts: int = 0
    num_turns_left_out: int = 0
    num_split: int = 0
    num_added_by_split: int = 0


_ROW_COUNTS = [counter.name for counter in fields(RowCounts)]


@dataclass
class SourceReport(RowCounts):
    """Counts of one source, or of some rows of one.

    Attributes:
        name: the source's.
        num_documents: documents with a supervised token.
        num_too_long: documents over `data.max_length`, cut or lost; the longest has longest_tokens.
        num_occurrences: documents in an epoch; 0 for the held-out source.
        formats: rows of each format that can be used.
        examples: the place of the first row of what a counter counts.
        bad_rows: the first bad rows, with their place and reason.
        left_out: other files in a directory.
    """

    name: str = ""
    num_documents: int = 0
    num_too_long: int = 0
    longest_tokens: int = 0
    num_occurrences: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    bad_rows: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def count(self, name: str, place: str, number: int = 1) -> None:
        """Add to a counter; the first place stays as its example."""
        setattr(self, name, getattr(self, name) + number)
        self.examples.setdefault(name, place)

    def add(self, more: SourceReport) -> None:
        """Add the counts of further rows; the longest and the first of anything stay."""
        self.longest_tokens = max(self.longest_tokens, more.longest_tokens)
        for name in (*_ROW_COUNTS, "num_documents", "num_too_long"):
            setattr(self, name, getattr(self, name) + getattr(more, name))
        for kind, number in more.formats.items():
            self.formats[kind] = self.formats.get(kind, 0) + number
        self.examples = more.examples | self.examples
        self.bad_rows += more.bad_rows[: NAMED_ROWS - len(self.bad_rows)]

    def refuse_useless(self, key: str, config: DataConfig) -> None:
        """Raise `UserError` where the source has no document, or too large a share of its rows is
        bad or too long.

        Args:
            key: the setting that names it.
            config: the limits.
        """
        name = f"{key}={self.name}"
        if self.num_rows == 0:
            raise UserError(f"{name} is empty.")
        bad = self.num_bad_rows
        rows = count_text(self.num_rows, "row")
        if bad > config.max_bad_fraction * self.num_rows:
            raise UserError(
                f"{name}: {bad} of {rows} cannot be used, more than "
                f"data.max_bad_fraction={config.max_bad_fraction}; the first: {self.bad_rows[0]}."
            )
        if self.num_documents == 0:
            first = f" (the first: {self.bad_rows[0]})" if self.bad_rows else ""
            raise UserError(
                f"{name} holds no document to train on: of {rows}, {bad} cannot "
                f"be used{first}, {self.num_dropped_too_long} are over data.max_length="
                f"{config.max_length}, {self.num_nothing_to_learn} have no supervised token within "
                "it."
            )
        documents = self.num_rows - bad + self.num_added_by_split
        if self.num_too_long > config.max_cut_fraction * documents:
            raise UserError(
                f"{name}: {self.num_too_long} of {count_text(documents, 'document')} would be cut "
                f"or lost by data.max_length={config.max_length}, more than "
                f"data.max_cut_fraction={config.max_cut_fraction}; the longest has "
                f"{self.longest_tokens} tokens: raise the first, or accept it by the second."
            )


@dataclass
class Report(RowCounts):
    """Counts over all sources.

    num_rows, with num_added_by_split documents more, is the sum of the different training
    documents, num_held_out and the rows left out: num_dropped_too_long, num_nothing_to_learn,
    num_bad_rows, num_dropped_duplicates, num_leaked, num_not_chosen. num_documents counts a
    document as often as an epoch has it; tokens and lengths are those of these occurrences.
    examples has the first of what a counter counts: the index of the source, and the place in it.
    """

    sources: list[SourceReport] = field(default_factory=list)
    content: str = ""  # digest of the training tokens and masks
    num_documents: int = 0
    num_held_out: int = 0
    num_tokens: int = 0
    num_supervised_tokens: int = 0
    num_duplicates: int = 0
    num_dropped_duplicates: int = 0
    num_leaked: int = 0
    num_not_chosen: int = 0
    longest_tokens: int = 0
    examples: dict[str, tuple[int, str]] = field(default_factory=dict)
    audit: MaskAudit = field(default_factory=MaskAudit)

    @staticmethod
    def of_stored(stored: dict[str, Any]) -> Report:
        """The report that `asdict` made plain values of."""
        sources = [SourceReport(**source) for source in stored["sources"]]
        return Report(**{**stored, "sources": sources, "audit": MaskAudit(**stored["audit"])})

    def add_up(self) -> None:
        """Take from the sources what is counted row by row."""
        for name in _ROW_COUNTS:
            setattr(self, name, sum(getattr(source, name) for source in self.sources))
        for i, source in enumerate(self.sources):
            for name, place in source.examples.items():
                self.examples.setdefault(name, (i, place))

    def lines(self) -> list[str]:
        """The report as printed lines."""
        supervised = self.num_supervised_tokens / max(1, self.num_tokens)
        several = len(self.sources) > 1
        name = f"{len(self.sources)} sources" if several else self.sources[0].name
        lines = [
            f"data: {name}: {count_text(self.num_rows, 'row')}, "
            f"{count_text(self.num_documents, 'document')} to train on, "
            f"{self.num_held_out} held out",
            f"data: {count_text(self.num_tokens, 'token')}, {supervised:.1%} of them supervised; "
            f"longest document {self.longest_tokens} tokens; end of turn supervised in "
            f"{self.audit.end_of_turn_learned:.1%} of documents",
            *self.audit.lines(),
        ]
        for source in self.sources if several else []:
            times = f"{count_text(source.num_occurrences, 'occurrence')} in an epoch"
            lines.append(
                f"data:   {source.name}: {count_text(source.num_rows, 'row')}, "
                f"{count_text(source.num_documents, 'document')}, "
                f"{times if source.num_occurrences else 'not trained on'}"
            )
        lines += self._counted()
        for source in self.sources:
            if len(source.formats) > 1:
                listed = ", ".join(f"{number} {name}" for name, number in source.formats.items())
                lines.append(f"data: {source.name}: rows of several formats: {listed}")
            if names := source.left_out:
                listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
                lines.append(f"data: {source.name}: not read: {listed}")
        return lines + self._bad_lines()

    def _counted(self) -> list[str]:
        """A line for every reason to leave out documents or parts of them, with an example."""
        dropped = "dropped" if self.num_dropped_duplicates else "kept (data.duplicates)"
        kinds = {
            "num_truncated": "document truncated to data.max_length",
            "num_dropped_too_long": "document over data.max_length dropped",
            "num_nothing_to_learn": "document skipped: no supervised token within data.max_length",
            "num_duplicates": f"duplicate of a conversation {dropped}",
            "num_leaked": "document removed: the prompt is held out",
            "num_not_chosen": "document left out by weight or max_documents",
            "num_plain_texts": "document of plain text, supervised whole, without a template",
            "num_turns_left_out": "turn left out that nothing asks for or answers",
            "num_split": f"row became {self.num_split + self.num_added_by_split} documents: the "
            "chat template renders an earlier answer differently (data.split_conversations)",
        }
        lines = []
        for name, kind in kinds.items():
            noun, _, fate = kind.partition(" ")
            if number := getattr(self, name):
                lines.append(
                    f"data: {count_text(number, noun)} {fate}{self._example(name, number)}"
                )
        return lines

    def _example(self, name: str, number: int) -> str:
        if name not in self.examples:
            return ""
        source, place = self.examples[name]
        file = f"{self.sources[source].name}, " if len(self.sources) > 1 else ""
        return f" ({'the first: ' if number > 1 else ''}{file}{place})"

    def _bad_lines(self) -> list[str]:
        if not self.num_bad_rows:
            return []
        lines = [f"data: {count_text(self.num_bad_rows, 'row')} skipped:"]
        for source in self.sources:
            lines += [f"data:   {source.name}, {row}" for row in source.bad_rows]
            if source.num_bad_rows > len(source.bad_rows):
                lines.append(f"data:   and {source.num_bad_rows - len(source.bad_rows)} more")
        return lines


def preview(
    documents: Documents, names: list[str], tokenizer: Any, number: int, colour: bool
) -> Iterator[str]:
    """Evenly chosen documents as text that shows the tokens, and the supervised ones among them.

    Args:
        documents: of one part.
        names: of the sources.
        tokenizer: decodes the tokens.
        number: of documents, or as many as there are.
        colour: mark supervised tokens by colour, else by ⟦ and ⟧.
    """
    number = min(number, len(documents))
    for k in range(number):
        index = k * len(documents) // number
        ids, supervised = documents[index]
        source, place = documents.origin(index)
        yield (
            f"document {index + 1} of {len(documents)}: {names[source]}, {place}: "
            f"{count_text(len(ids), 'token')}, {int(supervised.sum())} supervised"
        )
        yield _marked(tokenizer, ids.tolist(), supervised.tolist(), colour)


def _marked(tokenizer: Any, ids: list[int], supervised: list[int], colour: bool) -> str:
    pieces = []
    for i, (start, text) in enumerate(_texts(tokenizer, ids)):
        learned = bool(supervised[start])
        # The terminal would obey a control character; a line break is shown as a sign and obeyed.
        text = _CONTROL.sub(_sign, text)
        breaks, text = "\n" * ("\n" in text), text.replace("\n", "↵")
        if colour:
            pieces.append(f"{_COLOURS[learned][i % 2]}{text}{_RESET}{breaks}")
        else:
            pieces.append((f"⟦{text}⟧" if learned else text) + breaks)
    return "".join(pieces)


def _sign(found: re.Match[str]) -> str:
    """A character in place of a control character; U+009B begins commands, too, and has no sign."""
    return chr(0x2400 + ord(found[0])) if found[0] < " " else "\ufffd"


def _texts(tokenizer: Any, ids: list[int]) -> Iterator[tuple[int, str]]:
    """The index of every token and the text that it adds; tokens that form one character together
    count as one."""
    start = 0
    for end in range(1, len(ids) + 1):
        known = max(0, start - 1)  # some decoders drop the first space of their input
        before, through = (
            tokenizer.decode(part, clean_up_tokenization_spaces=False)
            for part in (ids[known:start], ids[known:end])
        )
        text = through[len(before) :]
        if text.endswith("\ufffd") and end < len(ids) and end - start < 4:
            continue
        yield start, text
        start = end

"""The data report: what became of every row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from neftune_dist.config import DataConfig, UserError
from neftune_dist.data.mask_preview import MaskAudit

NAMED_ROWS = 20  # bad rows that the report names, of one source


@dataclass
class SourceReport:
    """Counts of one source.

    Attributes:
        name: the source's.
        num_rows, num_bad_rows: read, and those that cannot be used.
        num_documents: rows that can be learned from.
        num_too_long: rows over `data.max_length`, cut or lost; the longest has longest_tokens.
        num_occurrences: documents in an epoch; 0 for the held-out source.
        formats: rows of each format that can be used.
        bad_rows: the first bad rows, with their place and reason.
        left_out: other files in a directory.
    """

    name: str
    num_rows: int = 0
    num_bad_rows: int = 0
    num_documents: int = 0
    num_too_long: int = 0
    longest_tokens: int = 0
    num_occurrences: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    bad_rows: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


@dataclass
class Report:
    """Counts over all sources.

    num_rows, with num_added_by_split documents more of the num_split rows that became several, is
    the sum of the different training documents, num_held_out and the rows left out:
    num_dropped_too_long, num_nothing_to_learn, num_bad_rows, num_dropped_duplicates, num_leaked,
    num_not_chosen. num_documents counts a document as often as an epoch has it; tokens and lengths
    are those of these occurrences. examples has the first of what a counter counts: the index of
    the source, and the place in it.
    """

    sources: list[SourceReport]
    content: str = ""  # digest of the training tokens and masks
    num_rows: int = 0
    num_documents: int = 0
    num_held_out: int = 0
    num_tokens: int = 0
    num_supervised_tokens: int = 0
    num_truncated: int = 0
    num_dropped_too_long: int = 0
    num_nothing_to_learn: int = 0
    num_bad_rows: int = 0
    num_duplicates: int = 0
    num_dropped_duplicates: int = 0
    num_leaked: int = 0
    num_not_chosen: int = 0
    num_plain_texts: int = 0
    num_turns_left_out: int = 0
    num_split: int = 0
    num_added_by_split: int = 0
    longest_tokens: int = 0
    examples: dict[str, tuple[int, str]] = field(default_factory=dict)
    audit: MaskAudit = field(default_factory=MaskAudit)

    @staticmethod
    def of_stored(stored: dict[str, Any]) -> Report:
        """The report that `asdict` made plain values of."""
        sources = [SourceReport(**source) for source in stored["sources"]]
        return Report(**{**stored, "sources": sources, "audit": MaskAudit(**stored["audit"])})

    def add(self, index: int, more: Report) -> None:
        """Add the counts of further rows of the source `index`, the only one of `more`."""
        _add(self.sources[index], more.sources[0])
        _add(self, more)

    def refuse_useless(self, source: SourceReport, key: str, config: DataConfig) -> None:
        """Raise `UserError` where a source of this report has no document, or too large a share of
        its rows is bad or too long.

        Args:
            source: counts of all its rows.
            key: the setting that names it.
            config: the limits.
        """
        name = f"{key}={source.name}"
        if source.num_rows == 0:
            raise UserError(f"{name} is empty.")
        bad, good = source.num_bad_rows, source.num_rows - source.num_bad_rows
        if bad > config.max_bad_fraction * source.num_rows:
            raise UserError(
                f"{name}: {bad} of {source.num_rows} rows cannot be used, more than "
                f"data.max_bad_fraction={config.max_bad_fraction}; the first: {source.bad_rows[0]}."
            )
        if source.num_documents == 0:
            first = f" (the first: {source.bad_rows[0]})" if source.bad_rows else ""
            raise UserError(
                f"{name} holds no document to learn from: of {source.num_rows} rows, {bad} cannot "
                f"be used{first}, {self.num_dropped_too_long} are over data.max_length="
                f"{config.max_length}, {self.num_nothing_to_learn} have no supervised token within "
                "it."
            )
        if source.num_too_long > config.max_cut_fraction * good:
            raise UserError(
                f"{name}: {source.num_too_long} of {good} documents are longer than "
                f"data.max_length={config.max_length} and are cut or lost, more than "
                f"data.max_cut_fraction={config.max_cut_fraction}; the longest has "
                f"{source.longest_tokens} tokens: raise the first, or accept it by the second."
            )

    def lines(self) -> list[str]:
        """The report as printed lines."""
        supervised = self.num_supervised_tokens / max(1, self.num_tokens)
        several = len(self.sources) > 1
        name = f"{len(self.sources)} sources" if several else self.sources[0].name
        lines = [
            f"data: {name}: {self.num_rows} rows, {self.num_documents} documents to train on, "
            f"{self.num_held_out} held out",
            f"data: {self.num_tokens} tokens, {supervised:.1%} of them supervised; longest "
            f"document {self.longest_tokens} tokens; end of turn learned in "
            f"{self.audit.end_of_turn_learned:.1%} of documents",
            *self.audit.lines(),
        ]
        for source in self.sources if several else []:
            times = f"{source.num_occurrences} times in an epoch"
            lines.append(
                f"data:   {source.name}: {source.num_rows} rows, {source.num_documents} documents, "
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
            "num_truncated": "documents truncated to data.max_length",
            "num_dropped_too_long": "documents over data.max_length dropped",
            "num_nothing_to_learn": "documents skipped: no supervised token within data.max_length",
            "num_duplicates": f"duplicates of a conversation {dropped}",
            "num_leaked": "documents removed: their prompt is held out",
            "num_not_chosen": "documents left out by weight or max_documents",
            "num_plain_texts": "documents of plain text, learned whole, without a template",
            "num_turns_left_out": "turns left out that nothing asks for or answers",
            "num_split": f"rows became {self.num_split + self.num_added_by_split} documents: the "
            "chat template renders an earlier answer differently (data.split_conversations)",
        }
        return [
            f"data: {number} {kind}{self._example(name)}"
            for name, kind in kinds.items()
            if (number := getattr(self, name))
        ]

    def _example(self, name: str) -> str:
        if name not in self.examples:
            return ""
        source, place = self.examples[name]
        file = f"{self.sources[source].name}, " if len(self.sources) > 1 else ""
        return f" (the first: {file}{place})"

    def _bad_lines(self) -> list[str]:
        if not self.num_bad_rows:
            return []
        lines = [f"data: {self.num_bad_rows} rows skipped:"]
        for source in self.sources:
            lines += [f"data:   {source.name}, {row}" for row in source.bad_rows]
            if source.num_bad_rows > len(source.bad_rows):
                lines.append(f"data:   and {source.num_bad_rows - len(source.bad_rows)} more")
        return lines


def _add(total: SourceReport | Report, more: SourceReport | Report) -> None:
    """Add counts; the longest and the first of anything stay."""
    for name, value in vars(more).items():
        known = getattr(total, name)
        if name == "longest_tokens":
            setattr(total, name, max(known, value))
        elif isinstance(value, int):
            setattr(total, name, known + value)
        elif name == "formats":
            known |= {kind: known.get(kind, 0) + number for kind, number in value.items()}
        elif name == "examples":
            known |= {kind: place for kind, place in value.items() if kind not in known}
        elif name == "bad_rows":
            known += value[: NAMED_ROWS - len(known)]

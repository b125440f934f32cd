"""The loss mask as people check it before the first step: counts by speaker, documents by token."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from neftune_dist.data.documents import Documents
from neftune_dist.data.spans import SPEAKERS

_FEW_ENDS = 0.5  # share of documents with a supervised end below which a warning is given
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")
# By whether a token is learned, two for each case, so that neighbouring tokens differ.
_COLOURS = {True: ("\x1b[30;42m", "\x1b[30;102m"), False: ("\x1b[37m", "\x1b[90m")}
_RESET = "\x1b[0m"


@dataclass
class MaskAudit:
    """Tokens of an epoch by speaker, one of `SPEAKERS`.

    Attributes:
        num_tokens, num_supervised: all tokens, and the supervised ones.
        end_of_turn_learned: share of documents in which the end of the last supervised answer is
            supervised.
        end_advice: why no end of turn can be learned; "" without a reason.
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
                part = f"{share:.1%} of them learned" if share else "none learned"
                roles.append(f"{name} {tokens / total:.1%} ({part})")
        lines = [f"data: tokens by role: {'; '.join(roles)}"]
        if self.end_of_turn_learned == 0:
            reason = f" ({self.end_advice})" if self.end_advice else ""
            warning = "no end of turn is learned: the model will not learn to stop"
            lines.append(f"data: warning: {warning}{reason}")
        elif self.end_of_turn_learned < _FEW_ENDS:
            lines.append(
                f"data: warning: the end of turn is learned in {self.end_of_turn_learned:.1%} of "
                "documents only: the model will hardly learn to stop"
            )
        for name in ("user", "system", "tool"):
            if self.num_supervised.get(name):
                lines.append(
                    f"data: warning: {self.num_supervised[name] / learned:.1%} of the learned "
                    f"tokens are said by the {name}: data.supervise=assistant leaves them out"
                )
        return lines


def preview(
    documents: Documents, names: list[str], tokenizer: Any, number: int, colour: bool
) -> Iterator[str]:
    """Evenly chosen documents as text that shows the tokens, and the learned ones among them.

    Args:
        documents: of one part.
        names: of the sources.
        tokenizer: decodes the tokens.
        number: of documents, or as many as there are.
        colour: mark learned tokens by colour, else by ⟦ and ⟧.
    """
    number = min(number, len(documents))
    for k in range(number):
        index = k * len(documents) // number
        ids, supervised = documents[index]
        source, place = documents.origin(index)
        yield (
            f"document {index + 1} of {len(documents)}: {names[source]}, {place}: {len(ids)} "
            f"tokens, {int(supervised.sum())} learned"
        )
        yield _marked(tokenizer, ids.tolist(), supervised.tolist(), colour)


def _marked(tokenizer: Any, ids: list[int], supervised: list[int], colour: bool) -> str:
    pieces = []
    for i, (start, text) in enumerate(_texts(tokenizer, ids)):
        learned = bool(supervised[start])
        # The terminal would obey a control character; a line break is shown as a sign and obeyed.
        text = _CONTROL.sub(lambda found: chr(0x2400 + ord(found[0])), text)
        breaks, text = "\n" * ("\n" in text), text.replace("\n", "↵")
        if colour:
            pieces.append(f"{_COLOURS[learned][i % 2]}{text}{_RESET}{breaks}")
        else:
            pieces.append((f"⟦{text}⟧" if learned else text) + breaks)
    return "".join(pieces)


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

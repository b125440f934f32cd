"""The conclusion in words; no effect is claimed that chance explains."""

from __future__ import annotations

from collections.abc import Sequence

from neftune_dist.study.compare import FEWEST_SEEDS, LEVEL, Difference
from neftune_dist.study.grid import plain
from neftune_dist.study.measures import LENGTH, LENGTH_CONTROLLED, RAW, measure

_GROUPS = {"losses": "Losses", "answers": "Answers", "judged": "Judged", "abilities": "Abilities"}


def conclusion(differences: Sequence[Difference], num_seeds: int) -> str:
    """Markdown: for each alpha a verdict, what it rests on, and warnings."""
    if not differences:
        return "Only one alpha was studied: there is nothing to compare."
    parts = []
    if num_seeds < FEWEST_SEEDS:
        seeds = "1 seed is" if num_seeds == 1 else f"{num_seeds} seeds are"
        parts.append(
            f"**No effect of alpha is claimed: {seeds} too few to tell it from chance.** Intervals "
            "cover items alone (documents, instructions, task items): they hold for the models of "
            "these runs, not for other seeds."
        )
    for alpha in dict.fromkeys(d.alpha for d in differences):
        these = [d for d in differences if d.alpha == alpha]
        lines = [f"**alpha {plain(alpha)}**: {_verdict(these)}", ""]
        for group, title in _GROUPS.items():
            members = [d for d in these if measure(d.measure).group == group]
            if members:
                lines.append(f"- {title}: {'; '.join(map(sentence, members))}.")
        lines += [f"- **Warning:** {text}" for text in warnings(these)]
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, _comparisons(differences)])


def sentence(difference: Difference) -> str:
    """One difference in words, with its interval; without a full stop."""
    kind = measure(difference.measure)
    if difference.low is None or difference.high is None:
        number = len(difference.by_seed)
        seeds = "1 seed is" if number == 1 else f"{number} seeds are"
        return f"no difference seen in {kind.label}: {seeds} too few to tell noise from effect"
    bounds = f"{kind.shown(difference.low, True)} to {kind.shown(difference.high, True)}"
    if not difference.excludes_0:
        ruled_out = ""
        if kind.group == "abilities" and difference.low < 0:
            lost = kind.shown(-difference.low)
            ruled_out = f", a loss of more than {lost}{kind.unit} is ruled out"
        return f"no difference seen in {kind.label} ({bounds}{ruled_out})"
    direction = kind.words[difference.mean > 0]
    amount = f"{kind.shown(abs(difference.mean))}{kind.unit}"
    text = f"{kind.label} {direction} by {amount} ({bounds})"
    if kind.group == "judged":
        side = "above" if difference.mean > 0 else "below"
        ends = (kind.shown(difference.base + end) for end in (difference.low, difference.high))
        text = (
            f"{kind.label} {kind.shown(difference.value)} % ({' to '.join(ends)}), {side} one half"
        )
    if "seeds" not in difference.over:
        return f"{text} in these runs"
    by_chance = (
        "" if difference.is_significant else ", which may be chance among so many comparisons"
    )
    return text + by_chance


def warnings(differences: Sequence[Difference]) -> list[str]:
    """Warnings about one alpha: apparent gains that may be none."""
    by_measure = {d.measure: d for d in differences}
    raw, controlled = by_measure.get(RAW), by_measure.get(LENGTH_CONTROLLED)
    length = by_measure.get(LENGTH)
    found = []
    if raw and controlled and _is_gain(raw) and not _is_gain(controlled):
        kind = measure(RAW)
        place = "below one half" if controlled.excludes_0 else "not distinguishable from one half"
        found.append(
            f"the gain in win rate ({kind.shown(raw.value)} %) disappears once length is "
            f"controlled ({kind.shown(controlled.value)} %, {place})."
        )
    gains = [d for d in differences if _is_gain(d) and d.measure != RAW]
    if length and length.excludes_0 and length.mean > 0 and not gains:
        found.append(
            f"the answers only became longer, by {measure(LENGTH).shown(length.mean)} characters: "
            "nothing else that was measured became better."
        )
    return found


def _is_gain(difference: Difference) -> bool:
    return difference.excludes_0 and difference.mean * measure(difference.measure).better > 0


def _verdict(differences: Sequence[Difference]) -> str:
    """Of one alpha, in a sentence or two."""
    few = not any("seeds" in d.over for d in differences)
    claimed = [d for d in differences if (d.excludes_0 if few else d.is_significant)]
    maybe = [d for d in differences if d.excludes_0 and d not in claimed]
    if not claimed and not maybe:
        return "no difference seen."
    kinds: dict[str, list[str]] = {"better": [], "worse": [], "different": []}
    # A judge's liking is no gain where it is one for length.
    lengthy = not any(_is_gain(e) for e in differences if e.measure == LENGTH_CONTROLLED)
    for d in claimed:
        kind = measure(d.measure)
        worth = d.mean * kind.better * (not (d.measure == RAW and _is_gain(d) and lengthy))
        word = "better" if worth > 0 else "worse" if worth < 0 else "different"
        label = f"{kind.label} {kind.words[d.mean > 0]}" if not worth else kind.label
        kinds[word].append(label)
    parts = [f"{word}: {', '.join(labels)}" for word, labels in kinds.items() if labels]
    parts = parts or ["no significant difference"]
    if maybe:
        parts.append(f"perhaps by chance: {', '.join(measure(e.measure).label for e in maybe)}")
    rest = len(differences) - len(claimed) - len(maybe)
    if rest:
        parts.append(f"no difference seen in the other {rest} of {len(differences)} measures")
    return f"{'in these runs alone, ' if few else ''}{'; '.join(parts)}."


def _comparisons(differences: Sequence[Difference]) -> str:
    known = [d for d in differences if d.p is not None]
    outside = sum(d.excludes_0 for d in known)
    standing = sum(d.is_significant for d in known)
    by_chance = f"{LEVEL * len(known):.1f} of their 95 % intervals would exclude 0 by chance"
    return (
        f"{len(known)} comparisons were made. If the noise had no effect, about {by_chance}. "
        f"{outside} exclude 0, {standing} of them after Holm's correction for the number of "
        "comparisons."
    )

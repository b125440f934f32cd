"""The conclusion in words; no effect is claimed that chance explains."""

from __future__ import annotations

from collections.abc import Sequence

from neftune_dist.study.compare import FEWEST_SEEDS, LEVEL, Difference
from neftune_dist.study.grid import plain
from neftune_dist.study.measures import LENGTH, LENGTH_CONTROLLED, LENGTH_MATCHED, RAW, measure
from neftune_dist.system.text import count_text

# Win rates in which a judge's preference for length may be: like lengths are not equal ones.
_WITH_LENGTH = (RAW, LENGTH_MATCHED)
_GROUPS = {"losses": "Losses", "answers": "Answers", "judged": "Judged", "abilities": "Abilities"}


def conclusion(differences: Sequence[Difference], num_seeds: int) -> str:
    """Markdown: for each alpha a verdict, what it rests on, and warnings."""
    if not differences:
        return "Only one alpha was studied: there is nothing to compare."
    parts = []
    if num_seeds < FEWEST_SEEDS:
        seeds = f"{count_text(num_seeds, 'seed')} {'is' if num_seeds == 1 else 'are'}"
        text = f"**No effect of alpha is claimed: {seeds} too few to tell it from chance.**"
        if any(d.over for d in differences):
            text += (
                " Intervals cover items alone (documents, instructions, task items): they hold for "
                "the models of these runs, not for other seeds."
            )
        parts.append(text)
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
    kind, low, high = measure(difference.measure), difference.low, difference.high
    if why := difference.why_untested:
        return f"{kind.label} not tested: {why}"
    bounds = kind.shown_range(low, high)
    if not difference.excludes_0:
        if kind.group == "abilities" and low < 0:
            bounds += f", a loss of more than {kind.shown(-low)}{kind.unit} is ruled out"
        return f"no difference seen in {kind.label} ({bounds})"
    if kind.group == "judged":
        ends = kind.shown_range(difference.base + low, difference.base + high, sign=False)
        side = "above" if difference.mean > 0 else "below"
        text = f"{kind.label} {kind.shown(difference.value)} % ({ends}), {side} one half"
    else:
        amount = f"{kind.shown(abs(difference.mean))}{kind.unit}"
        text = f"{kind.label} {kind.words[difference.mean > 0]} by {amount} ({bounds})"
    if "seeds" not in difference.over:
        return f"{text} in these runs"
    chance = ", which may be chance among so many comparisons"
    return text if difference.is_significant else text + chance


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
    gains = [d for d in differences if _is_gain(d) and d.measure not in _WITH_LENGTH]
    if length and length.excludes_0 and length.mean > 0 and not gains:
        found.append(
            f"the answers only became longer, by {measure(LENGTH).shown(length.mean)} characters: "
            "nothing else that was measured became better."
        )
    return found


def _is_gain(difference: Difference) -> bool:
    return difference.excludes_0 and difference.mean * measure(difference.measure).better > 0


def _verdict(differences: Sequence[Difference]) -> str:
    """A sentence or two about one alpha."""
    few = not any("seeds" in d.over for d in differences)
    tested = [d for d in differences if d.over]
    seen = [d for d in differences if d.excludes_0]
    if not tested:
        return "nothing could be tested."
    if not seen:
        return "no difference seen."
    claimed = [d for d in seen if few or d.is_significant]
    labels: dict[str, list[str]] = {"better": [], "worse": [], "different": []}
    # A judge's preference for length is no gain.
    only_length = not any(_is_gain(d) for d in differences if d.measure == LENGTH_CONTROLLED)
    for d in claimed:
        kind = measure(d.measure)
        is_length = d.measure in _WITH_LENGTH and _is_gain(d) and only_length
        better = 0 if is_length else kind.better
        if better:
            labels["better" if d.mean * better > 0 else "worse"].append(kind.label)
        else:
            labels["different"].append(f"{kind.label} {kind.words[d.mean > 0]}")
    parts = [f"{word}: {', '.join(names)}" for word, names in labels.items() if names]
    parts = parts or ["no significant difference"]
    if maybe := [measure(d.measure).label for d in seen if d not in claimed]:
        parts.append(f"perhaps by chance: {', '.join(maybe)}")
    if rest := len(tested) - len(seen):
        parts.append(f"no difference seen in the other {rest} of {len(tested)} measures")
    return f"{'in these runs alone, ' if few else ''}{'; '.join(parts)}."


def _comparisons(differences: Sequence[Difference]) -> str:
    known = [d for d in differences if d.over]
    outside = sum(d.excludes_0 for d in known)
    standing = sum(d.is_significant for d in known)
    by_chance = f"{LEVEL * len(known):.1f} of their 95 % intervals would exclude 0 by chance"
    return (
        f"{len(known)} comparisons were made. If the noise had no effect, about {by_chance}. "
        f"{outside} exclude 0, {standing} of them after Holm's correction for the number of "
        "comparisons."
    )

"""What a study of so many seeds and items could see, before its runs begin.

Both kinds of error are in standard deviations of what varies: a difference at one seed from that at
another, and a difference at one item from that at another. The smallest visible difference is
`intervals.smallest_visible` standard errors, and a standard error is 1 / sqrt(n) deviations.
"""

from __future__ import annotations

import math

from neftune_dist.config import HELD_OUT, Config, UserError
from neftune_dist.data.instructions import read_instructions
from neftune_dist.evaluation.intervals import smallest_visible
from neftune_dist.study.compare import FEWEST_ITEMS, FEWEST_SEEDS
from neftune_dist.system.text import count_text


def planned_items(config: Config) -> dict[str, tuple[str, int]]:
    """The settings that choose items: by key what they are and how many; a number that only the
    data tell is left out.

    Raises:
        UserError: the file of instructions is missing, or holds unusable rows.
    """
    evaluate, held_out = config.evaluate, config.data.num_held_out
    found = {
        "data.num_held_out": ("held-out documents", held_out),
        "evaluate.max_documents": ("held-out documents", evaluate.max_documents),
        "evaluate.train_documents": ("training documents", evaluate.train_documents),
        "evaluate.max_task_items": ("items of a task", evaluate.max_task_items),
    }
    if evaluate.instructions == HELD_OUT:
        found["evaluate.max_instructions"] = ("instructions", evaluate.max_instructions)
    elif evaluate.instructions:
        asked, _ = read_instructions(evaluate.instructions, evaluate.max_instructions)
        found["evaluate.instructions"] = ("instructions", len(asked))
    return {key: planned for key, planned in found.items() if planned[1]}


def check_items(config: Config) -> None:
    """Refuse a study with too few items to be compared. Raises `UserError`."""
    if not config.data.holds_out:
        raise UserError("data.num_held_out=0: a study compares held-out losses, set it above 0.")
    for key, (what, number) in planned_items(config).items():
        if number < FEWEST_ITEMS:
            value = config.evaluate.instructions if key == "evaluate.instructions" else number
            raise UserError(
                f"{key}={value}: a study of {count_text(number, 'item')} ({what}) compares "
                f"nothing; at least {FEWEST_ITEMS} are needed."
            )


def power_line(config: Config, num_seeds: int) -> str:
    """The smallest differences that 4 of 5 studies of this design would see, in standard
    deviations."""
    numbers: dict[str, int] = {}
    for what, number in planned_items(config).values():
        numbers[what] = min(number, numbers.get(what, number))
    parts = [f"{_deviations(n):.2f} over {n} {what}" for what, n in numbers.items()]
    if num_seeds >= FEWEST_SEEDS:
        parts.insert(0, f"{_deviations(num_seeds):.2f} over {num_seeds} seeds")
    else:
        parts.append(f"other seeds remain unknown with less than {FEWEST_SEEDS}")
    return (
        "smallest differences that 4 of 5 such studies would see, in standard deviations of the "
        f"differences: {'; '.join(parts)}"
    )


def _deviations(number: int) -> float:
    return smallest_visible(number - 1) / math.sqrt(number)

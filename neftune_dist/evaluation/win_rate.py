"""Win rates from pairwise judgements: raw as AlpacaEval 1 has them, and at equal lengths.

Owns what a judgement is, how files of AlpacaEval are read, which answers belong together, and the
two rates with their intervals. Refuses answers to different instructions. A judgement that could
not be understood has no preference: it is counted and takes part in no rate.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neftune_dist.config import UserError, parse_json
from neftune_dist.config.limits import limited

NUM_RESAMPLES = 2000
_LONGEST_QUOTE = 80
_READING_SECONDS, _READING_GIB = 60.0, 4.0  # what a file of others' answers may take


@dataclass(frozen=True)
class Judgement:
    """Which of two answers to an instruction is better.

    preference: 1 theirs, 2 ours, 1.5 as good, or between; None where the judge could not be
        understood or did not answer.
    our_length, their_length: characters.
    orders: the preference where theirs was shown first, then where ours was; empty where unknown.
    failed: a request came to nothing after all retries.
    """

    instruction: str
    preference: float | None
    our_length: int
    their_length: int
    orders: tuple[float | None, ...] = ()
    failed: bool = False


@dataclass(frozen=True)
class WinRate:
    """Rates, standard errors and intervals in percent; intervals hold 95 % (`win_rate`).

    num: judgements, of which `num_wins + num_losses + num_ties` have a preference; of the others,
        `num_failed` were never answered and `num_unparsed` not understood.
    order_agreement: percent of pairs shown in both orders of which the same answer was preferred
        (or none); first_shown: percent of those showings that the first answer won, 50 without a
        bias for positions. None where no pair was shown in both.
    lengths: mean characters, of the judgements with a preference.
    """

    win_rate: float | None
    standard_error: float | None
    interval: tuple[float, float] | None
    length_controlled: float | None
    length_controlled_interval: tuple[float, float] | None
    num: int
    num_wins: int
    num_losses: int
    num_ties: int
    num_unparsed: int
    num_failed: int
    order_agreement: float | None
    first_shown: float | None
    mean_length: float | None
    mean_reference_length: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def win_rate(judgements: Sequence[Judgement]) -> WinRate:
    """The rates of these judgements; None where no judgement has a preference.

    Raw, as AlpacaEval 1: the mean of `preference - 1`, so that a tie is half a win, and its
    standard error (n - 1). Length-controlled, in the manner of Dubois et al. (arXiv 2404.04475):
    with l the difference of the two lengths in characters and s its standard deviation over the
    judgements,

        P(ours is preferred) = sigmoid(a + b tanh(l / s)),

    fitted to the preferences by logistic regression (a tie counts half for both), and evaluated at
    l = 0: 100 sigmoid(a). AlpacaEval 2 fits a third term, each instruction's difficulty, known from
    all models of its leaderboard, and selects an L1 penalty by cross-validation; here all
    instructions weigh alike, and b has a normal prior of variance 1, which matters for few
    judgements alone. Its figures and these are close, not equal.

    Intervals: percentiles 2.5 and 97.5 of 2,000 bootstrap resamples of the judgements, drawn from a
    fixed seed: the same judgements give the same interval. s is not resampled.
    """
    judged = [each for each in judgements if each.preference is not None]
    num_failed = sum(each.failed for each in judgements if each.preference is None)
    won = np.array([each.preference for each in judged], dtype=float) - 1  # (n,), 0 .. 1
    ours = np.array([each.our_length for each in judged], dtype=float)
    theirs = np.array([each.their_length for each in judged], dtype=float)
    counts = {
        "num": len(judgements),
        "num_wins": int((won > 0.5).sum()),
        "num_losses": int((won < 0.5).sum()),
        "num_ties": int((won == 0.5).sum()),
        "num_unparsed": len(judgements) - len(judged) - num_failed,
        "num_failed": num_failed,
    }
    agreement, first_shown = _orders(judgements)
    if not judged:
        return WinRate(
            None,
            None,
            None,
            None,
            None,
            **counts,
            order_agreement=agreement,
            first_shown=first_shown,
            mean_length=None,
            mean_reference_length=None,
        )
    x = _length_feature(ours - theirs)
    n = len(judged)
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=NUM_RESAMPLES)
    return WinRate(
        win_rate=100 * float(won.mean()),
        standard_error=100 * float(won.std(ddof=1)) / math.sqrt(n) if n > 1 else None,
        interval=_interval(drawn @ won / n),
        length_controlled=100 * float(_at_equal_lengths(np.ones((1, n)), won, x)[0]),
        length_controlled_interval=_interval(_at_equal_lengths(drawn, won, x)),
        **counts,
        order_agreement=agreement,
        first_shown=first_shown,
        mean_length=float(ours.mean()),
        mean_reference_length=float(theirs.mean()),
    )


def _orders(judgements: Sequence[Judgement]) -> tuple[float | None, float | None]:
    both = [
        (each.orders[0], each.orders[1])
        for each in judgements
        if len(each.orders) == 2 and None not in each.orders
    ]
    if not both:
        return None, None
    shown = np.array(both, dtype=float)  # (n, 2)
    same = np.sign(shown[:, 0] - 1.5) == np.sign(shown[:, 1] - 1.5)
    first = np.stack([2 - shown[:, 0], shown[:, 1] - 1])
    return 100 * float(same.mean()), 100 * float(first.mean())


def _length_feature(difference: np.ndarray) -> np.ndarray:
    deviation = difference.std(ddof=1) if len(difference) > 1 else 0.0
    return np.tanh(difference / deviation) if deviation else np.zeros_like(difference)


def _at_equal_lengths(weights: np.ndarray, won: np.ndarray, x: np.ndarray) -> np.ndarray:
    """sigmoid(a) of the regression under each row of `weights` (resamples, n): (resamples,).

    Newton's method on the penalised likelihood, whose maximum exists even where all were won.
    """
    prior_a, prior_b = 1e-3, 1.0  # inverse variances
    a = np.zeros(len(weights))
    b = np.zeros(len(weights))
    for _ in range(50):
        p = 1 / (1 + np.exp(-(a[:, None] + b[:, None] * x)))
        rest = weights * (won - p)
        curve = weights * p * (1 - p)
        slope_a, slope_b = rest.sum(1) - prior_a * a, rest @ x - prior_b * b
        aa, ab, bb = curve.sum(1) + prior_a, curve @ x, curve @ (x * x) + prior_b
        determinant = aa * bb - ab * ab
        step_a = (bb * slope_a - ab * slope_b) / determinant
        step_b = (aa * slope_b - ab * slope_a) / determinant
        # A full step overshoots where nearly all were won.
        a += np.clip(step_a, -2, 2)
        b += np.clip(step_b, -2, 2)
        if max(np.abs(step_a).max(), np.abs(step_b).max()) < 1e-9:
            break
    return 1 / (1 + np.exp(-a))


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(100 * values, [2.5, 97.5])
    return float(low), float(high)


def pair(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Our answers, each with theirs to the same instruction, in our order. They may have answered
    more; of equal instructions, the first goes with the first.

    Raises:
        UserError: naming the first of our instructions that they have no answer to.
    """
    left: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for answer in reversed(theirs):
        left[answer["instruction"]].append(answer)
    pairs = []
    for i, answer in enumerate(ours):
        if not left[answer["instruction"]]:
            raise UserError(
                f"The two sets of answers are over different instructions: of {len(ours)} and "
                f"{len(theirs)} answers, number {i + 1} of the first is to "
                f"{_quoted(answer['instruction'])}, which the second lacks."
            )
        pairs.append((answer, left[answer["instruction"]].pop()))
    return pairs


def read_answers(path: Path) -> list[dict[str, Any]]:
    """Answers in AlpacaEval's form: a JSON list (.gz too) of objects with `instruction` and
    `output`.

    Raises:
        UserError: it cannot be read, or a row lacks a field.
    """
    return _rows(path, ("instruction", "output"))


def read_annotations(path: Path) -> list[Judgement]:
    """Judgements from a file of annotations in AlpacaEval's form: `output_2` is ours, `preference`
    1 .. 2, with 0 for a tie as in its first version, and null where the judge was not understood.

    Raises:
        UserError: it cannot be read, a row lacks a field, or a preference is none.
    """
    return [
        Judgement(
            instruction=row["instruction"],
            preference=_preference(row["preference"], f"{path}, row {i + 1}"),
            our_length=len(row["output_2"]),
            their_length=len(row["output_1"]),
        )
        for i, row in enumerate(
            _rows(path, ("instruction", "output_1", "output_2"), also=("preference",))
        )
    ]


def _preference(value: Any, where: str) -> float | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not (value == 0 or 1 <= value <= 2)
    ):
        raise UserError(f"{where}: preference={value!r} is none: 1 .. 2, 0 for a tie, or null.")
    return 1.5 if value == 0 else float(value)


def _rows(path: Path, texts: tuple[str, ...], also: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    try:
        with limited(_READING_SECONDS, _READING_GIB):
            content = path.read_bytes()
            if content[:2] == b"\x1f\x8b":
                content = gzip.decompress(content)
            rows = parse_json(content, Any)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, EOFError, zlib.error, RecursionError) as error:
        raise UserError(f"{path} is no JSON file, plain or gzipped: {error}.") from error
    except MemoryError as error:
        raise UserError(
            f"{path} takes more than {_READING_GIB:g} GiB of memory: it is not used."
        ) from error
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path} must be a JSON list with at least one row.")
    for i, row in enumerate(rows):
        where = f"{path}, row {i + 1}"
        if not isinstance(row, dict):
            raise UserError(f"{where} is no JSON object.")
        for field in (*texts, *also):
            if field not in row:
                raise UserError(f"{where} lacks the field {field}.")
            if field in texts and not isinstance(row[field], str):
                raise UserError(f"{where}: the field {field} is no text.")
    return rows


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _LONGEST_QUOTE else text[: _LONGEST_QUOTE - 3] + "...")

"""Win rates from pairwise judgements: raw, as in AlpacaEval 1, and at equal lengths, by a model or
by leaving out the pairs of unlike lengths.

Also the judgements themselves, AlpacaEval's files, and the pairing of answers by instruction. A
judgement without a preference is counted, and enters no rate.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from neftune_dist.config import UserError
from neftune_dist.config.errors import brief
from neftune_dist.data.errors import BadRow
from neftune_dist.data.sources import read_row_file
from neftune_dist.evaluation.intervals import student

_MATCHED = 0.1
Answer = Mapping[str, Any]  # a row of answers.json: `instruction`, `output`, and others


@dataclass(frozen=True)
class Judgement:
    """Which of two answers to an instruction is better.

    Attributes:
        instruction: the text.
        preference: 1 theirs, 2 ours, 1.5 a tie, or between; None where the judge's reply could not
            be parsed, or it did not reply.
        our_length: in characters.
        their_length: in characters.
        orders: the preference with theirs shown first, then with ours first; empty where unknown.
        failed: a request failed after all retries.
        sample: number of our answer among those to the instruction, which follow each other.
    """

    instruction: str
    preference: float | None
    our_length: int
    their_length: int
    orders: tuple[float | None, ...] = ()
    failed: bool = False
    sample: int = 0

    @property
    def is_length_matched(self) -> bool:
        """Whether the lengths differ by at most a tenth of the longer one."""
        shorter, longer = sorted((self.our_length, self.their_length))
        return longer - shorter <= _MATCHED * longer

    @classmethod
    def of(cls, ours: Answer, theirs: Answer, preference: float | None, **others: Any) -> Judgement:
        """The judgement of two answers to one instruction."""
        lengths = len(ours["output"]), len(theirs["output"])
        return cls(
            ours["instruction"], preference, *lengths, sample=ours.get("sample", 0), **others
        )


def win_rate(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Figures of pairwise judgements, as summary.json has them; None where there is none.

    Raw, as in AlpacaEval 1: the mean of `preference - 1`, so that a tie is half a win.
    Length-controlled, in the manner of Dubois et al. (arXiv 2404.04475): with l the difference of
    the two lengths in characters and s its standard deviation over the judgements,

        P(ours is preferred) = sigmoid(a + b tanh(l / s)),

    fitted to the preferences by logistic regression (a tie counts half for both), and evaluated at
    l = 0: 100 sigmoid(a). AlpacaEval 2 fits a third term, each instruction's difficulty, known from
    all models of its leaderboard, and selects an L1 penalty by cross-validation; here all
    instructions weigh alike, and b has a normal prior of variance 1, which matters for few
    judgements alone. Its figures and these are close, not equal.

    Intervals are Student's with n - 1 degrees of freedom, over n instructions, since several
    answers to one are not independent: of the mean, clipped to 0 .. 100 %; of a with its sandwich
    variance, s taken as known. None with fewer than two instructions.

    - `win_rate`, its `standard_error` and its 95 % `interval`: raw, in percent, as all rates;
    - `length_controlled` and `length_controlled_interval`: at equal lengths;
    - `length_matched`: over the `num_length_matched` judgements whose answers' lengths differ by at
      most a tenth of the longer one: no model, but fewer pairs;
    - `num`: judgements, of which `num_wins`, `num_losses` and `num_ties` have a preference,
      `num_failed` failed, and the reply of `num_unparsed` holds no verdict;
    - `order_agreement`: percent of pairs shown in both orders where the preference was the same;
    - `first_shown`: percent of those showings that the first answer won; 50 without position bias;
    - `mean_length`, `mean_reference_length`: characters of ours and theirs, where judged.
    """
    judged = [j for j in judgements if j.preference is not None]
    item = _known_items(judgements)
    num_items = len(np.unique(item))
    num_failed = sum(j.failed for j in judgements if j.preference is None)
    n, won = len(judged), _won(judged)
    rate = 100 * float(won.mean()) if n else None
    matched = won[np.array([j.is_length_matched for j in judged], dtype=bool)]
    a, influences = _fit(judged)
    error = interval = controlled_interval = None
    if rate is not None and num_items > 1:
        t, _ = student(0.0, num_items - 1)
        error, of_a = (
            math.sqrt(num_items / (num_items - 1) * (np.bincount(item, by_judgement) ** 2).sum())
            for by_judgement in (100 * (won - won.mean()) / n, influences)
        )
        interval = max(0.0, rate - t * error), min(100.0, rate + t * error)
        controlled_interval = 100 * _sigmoid(a - t * of_a), 100 * _sigmoid(a + t * of_a)
    return {
        "win_rate": rate,
        "standard_error": error,
        "interval": interval,
        "length_controlled": 100 * _sigmoid(a) if n else None,
        "length_controlled_interval": controlled_interval,
        "length_matched": 100 * float(matched.mean()) if len(matched) else None,
        "num_length_matched": len(matched),
        "num": len(judgements),
        "num_wins": int((won > 0.5).sum()),
        "num_losses": int((won < 0.5).sum()),
        "num_ties": int((won == 0.5).sum()),
        "num_unparsed": len(judgements) - n - num_failed,
        "num_failed": num_failed,
        **_order_figures(judgements),
        "mean_length": fmean(j.our_length for j in judged) if n else None,
        "mean_reference_length": fmean(j.their_length for j in judged) if n else None,
    }


def length_controlled_influences(judgements: Sequence[Judgement]) -> np.ndarray:
    """Each instruction's influence on the length-controlled rate in percent, 0 without a
    preference: (num_instructions,)."""
    judged = [j for j in judgements if j.preference is not None]
    a, influences = _fit(judged)
    num_items = sum(j.sample == 0 for j in judgements)
    summed = np.bincount(_known_items(judgements), influences, minlength=num_items)
    return np.asarray(100 * _sigmoid(a) * (1 - _sigmoid(a)) * summed)


def _known_items(judgements: Sequence[Judgement]) -> np.ndarray:
    """Number of the instruction of each judgement with a preference, (num_judged,)."""
    known = [j.preference is not None for j in judgements]
    return (np.cumsum([j.sample == 0 for j in judgements], dtype=int) - 1)[known]


def _won(judged: Sequence[Judgement]) -> np.ndarray:
    """Preferences as 0 (lost) .. 1 (won), (n,)."""
    return np.array([j.preference for j in judged], dtype=float) - 1


def _order_figures(judgements: Sequence[Judgement]) -> dict[str, float | None]:
    both = [j.orders for j in judgements if len(j.orders) == 2 and None not in j.orders]
    if not both:
        return {"order_agreement": None, "first_shown": None}
    shown = np.array(both, dtype=float)  # (n, 2): theirs first, ours first
    same = np.sign(shown[:, 0] - 1.5) == np.sign(shown[:, 1] - 1.5)
    first = np.stack([2 - shown[:, 0], shown[:, 1] - 1])
    return {"order_agreement": 100 * float(same.mean()), "first_shown": 100 * float(first.mean())}


def _fit(judged: Sequence[Judgement]) -> tuple[float, np.ndarray]:
    """The regression's a, and each judgement's influence on it: row a of H^-1 times its score.

    Newton's method on the penalised likelihood, which has a maximum even where all were won.
    """
    won = _won(judged)
    difference = np.array([j.our_length - j.their_length for j in judged], dtype=float)
    deviation = difference.std(ddof=1) if len(difference) > 1 else 0.0
    x = np.tanh(difference / deviation) if deviation else np.zeros_like(difference)
    inverse_variances = np.array([1e-3, 1.0])  # priors of a and b
    design = np.stack([np.ones_like(x), x], axis=1)  # (n, 2)
    weights = np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-(design @ weights)))
        scores = design * (won - p)[:, None]
        hessian = (design * (p * (1 - p))[:, None]).T @ design + np.diag(inverse_variances)
        step = np.linalg.solve(hessian, scores.sum(axis=0) - inverse_variances * weights)
        weights += np.clip(step, -2, 2)  # a full step overshoots where nearly all were won
        if np.abs(step).max() < 1e-9:
            break
    return float(weights[0]), scores @ np.linalg.inv(hessian)[0]


def _sigmoid(a: float) -> float:
    return 1 / (1 + math.exp(-a))


def pair(ours: Sequence[Answer], theirs: Sequence[Answer]) -> list[tuple[Answer, Answer]]:
    """Pair our answers, in order, with theirs to the same instruction. Theirs may have more; equal
    instructions are paired in their order. Samples of ours are all paired with their one answer,
    or with their samples in order.

    Raises:
        UserError: naming the first of our instructions that they have no answer to.
    """
    left: dict[str, list[Answer]] = defaultdict(list)
    for answer in reversed(theirs):
        left[answer["instruction"]].append(answer)
    pairs: list[tuple[Answer, Answer]] = []
    are_samples = any(answer.get("sample") for answer in theirs)
    for i, answer in enumerate(ours):
        if answer.get("sample") and not are_samples:
            pairs.append((answer, pairs[-1][1]))
            continue
        if not left[answer["instruction"]]:
            raise UserError(
                f"The two sets of answers are over different instructions: of {len(ours)} and "
                f"{len(theirs)} answers, number {i + 1} of the first is to "
                f"{brief(answer['instruction'])!r}, which the second lacks."
            )
        pairs.append((answer, left[answer["instruction"]].pop()))
    return pairs


def read_answers(name: str) -> list[dict[str, Any]]:
    """Read the answers that `judge.reference` names: rows with `instruction` and `output`, as
    AlpacaEval's. Raises `UserError`."""

    def checked(row: Answer) -> dict[str, Any]:
        for field in ("instruction", "output"):
            if not isinstance(row.get(field), str):
                raise BadRow(f"the field '{field}' is missing or no text")
        return dict(row)

    return read_row_file(name, "judge.reference", checked)

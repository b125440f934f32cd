"""Statistics of answers' texts: the paper's, and similarity to expected answers.

Repetition and log-diversity follow the paper (arXiv 2310.05914, section 5.2), which takes both from
Kirchenbauer et al. (arXiv 2306.04634) and computes them on the first words of each answer, since
n-grams recur more often in longer texts: 50 words, its choice for Alpaca; shorter answers are left
out. Words are what white space separates, case and punctuation kept. With T_n n-grams in a chunk,
U_n of them distinct:

    repetition_n  = 1 - U_n / T_n                                         (given in percent)
    diversity     = product over n = 2, 3, 4 of (1 - repetition_n / 100)
    log-diversity = -ln(max(1 - diversity, e^-20)),   20 where nothing is repeated

each averaged over answers. The divisor of 100 (of a share, not of a percentage) and the last n-gram
of a chunk, which is not counted, are those of the code released with 2306.04634. The paper's table
has that scale: it gives 8.40 beside 4.82 % of 2-grams in 150 words, where Dolly's answers (5.87 %)
come to 7.64 with the divisor and to 3.13 without. So both stay, and figures compare.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

try:  # the extra `evaluation`
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer
except ImportError:
    sacrebleu = RougeScorer = None

CHUNK_WORDS = 50
SELF_BLEU_ANSWERS = 50
_SELF_BLEU_WORDS = 200  # of each, the first: bounds the cost at about a second
_GREATEST_LOG_DIVERSITY = 20.0
_ROUGE_WORD = re.compile("[a-z0-9]")

# Keys of `statistics` and how people read them.
LABELS = {
    "num": "instructions answered",
    "num_samples": "answers to each",
    "characters": "length (characters)",
    "words": "length (words)",
    "tokens": "length (tokens)",
    "repetition_2_percent": "repetition of 2-grams (%)",
    "repetition_3_percent": "repetition of 3-grams (%)",
    "repetition_4_percent": "repetition of 4-grams (%)",
    "log_diversity": "log-diversity",
    "self_bleu": "self-BLEU",
    "rouge_l": "ROUGE-L",
    "bleu": "BLEU",
    "exact_match": "exact match",
    "empty": "share empty",
    "cut": "share cut at the token limit",
    "num_chunks": f"answers of at least {CHUNK_WORDS} words",
    "num_references": "answers with an expected one",
}

Values = dict[str, list[float | None]]


def statistics(
    answers: Sequence[Mapping[str, Any]], values: Values | None = None
) -> dict[str, float]:
    """Means of `per_answer` over the answers, and three statistics of the whole set.

    Where there are several answers to each instruction, numbered by `sample`, a mean is over the
    instructions' means over their answers. The three are:

    - `num_chunks`: answers of at least 50 words, over which repetition and log-diversity are taken;
    - `num_references`: answers with an expected one, over which ROUGE-L and BLEU are taken;
    - `self_bleu`: mean BLEU of an answer with the others as its references (Zhu et al., arXiv
      1802.01886), on 50 answers evenly spaced over the first to every instruction, the first 200
      words of each; higher is less diverse.

    A statistic without data is left out: `rouge_l` without expected answers, `tokens` where they
    were not counted.

    Args:
        answers: rows of `answers.json`; `output` is needed, `reference`, `num_tokens`,
            `finished` and `correct` are used where present.
        values: of `per_answer`; None: computed here.

    """
    values = per_answer(answers) if values is None else values
    result = {}
    num_samples = 1 + max((answer.get("sample", 0) for answer in answers), default=0)
    for name, of_answers in values.items():
        by_item = [of_answers[i : i + num_samples] for i in range(0, len(answers), num_samples)]
        known = [[value for value in item if value is not None] for item in by_item]
        result[name] = fmean(fmean(item) for item in known if item)
    for name, of in (("num_chunks", "log_diversity"), ("num_references", "bleu")):
        result[name] = sum(value is not None for value in values.get(of, ()))
    texts = [answer["output"] for answer in answers[::num_samples]]
    if len(texts) > 1:
        result["self_bleu"] = _self_bleu(texts)
    return result


def per_answer(answers: Sequence[Mapping[str, Any]]) -> Values:
    """Values of each answer in order, None where an answer has none; names without any value are
    left out.

    - `characters`, `words` (separated by white space), `tokens` (generated);
    - `repetition_2_percent` .. `repetition_4_percent`, `log_diversity`: of the first 50 words (see
      the module), None for shorter answers;
    - `rouge_l`: F1 of the longest common subsequence of words with the expected answer, lower case,
      a to z and digits alone, not stemmed (rouge-score), None where the expected answer has none of
      them (Chinese); `bleu`: of up to 4-grams, smoothed by
      sacrebleu's `exp`, its 13a words, no order above the answer's length. Both 0 .. 1;
    - `empty`: 1 where the answer is white space alone; `cut`: 1 where the answer reached the limit
      of new tokens; `exact_match`: 1 where it was marked right, 0 where wrong.
    """
    rouge = RougeScorer(["rougeL"])
    values: Values = defaultdict(lambda: [None] * len(answers))
    for i, answer in enumerate(answers):
        text, finished = answer["output"], answer.get("finished")
        words = text.split()
        row: dict[str, Any] = {"characters": len(text), "words": len(words), "empty": not words}
        row |= {"tokens": answer.get("num_tokens"), "exact_match": answer.get("correct")}
        row["cut"] = None if finished is None else not finished
        if len(words) >= CHUNK_WORDS:
            row |= _repetition(words[:CHUNK_WORDS])
        if (reference := answer.get("reference")) is not None:
            if _ROUGE_WORD.search(reference.lower()):
                row["rouge_l"] = rouge.score(reference, text)["rougeL"].fmeasure
            row["bleu"] = _bleu(text, [reference])
        for name, value in row.items():
            if value is not None:
                values[name][i] = float(value)
    return {name: values[name] for name in LABELS if name in values}


def _repetition(words: list[str]) -> dict[str, float]:
    shares = []
    for n in (2, 3, 4):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n)]  # not the last
        shares.append(1 - len(set(grams)) / len(grams))
    diversity = math.prod(1 - share / 100 for share in shares)
    return {
        **{f"repetition_{n}_percent": 100 * share for n, share in enumerate(shares, 2)},
        "log_diversity": -math.log(max(1 - diversity, math.exp(-_GREATEST_LOG_DIVERSITY))),
    }


def _bleu(text: str, references: list[str]) -> float:
    return float(sacrebleu.sentence_bleu(text, references).score) / 100


def _self_bleu(texts: list[str]) -> float:
    num = min(SELF_BLEU_ANSWERS, len(texts))
    sample = [" ".join(texts[i * len(texts) // num].split()[:_SELF_BLEU_WORDS]) for i in range(num)]
    return sum(_bleu(text, sample[:i] + sample[i + 1 :]) for i, text in enumerate(sample)) / num

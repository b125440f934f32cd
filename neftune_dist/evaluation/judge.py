"""A judge compares two sets of answers: a model at an endpoint, or an alpaca_eval annotator.

The endpoint's judge is asked about every pair in both orders, since judges prefer positions. A
reply without a verdict is no preference, never a win. Equal answers are a tie and are not sent.

Every reply is added to `requests.jsonl` as it comes, so that a run which was stopped, by Ctrl-C or
by an endpoint that went down, asks only for the rest. Failed requests are not kept.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from multiprocessing.pool import ThreadPool
from pathlib import Path

from neftune_dist.config import JudgeConfig, UserError
from neftune_dist.evaluation import alpaca_annotators
from neftune_dist.evaluation.endpoint import Endpoint, Failure, Reply, check_limits, dollars
from neftune_dist.evaluation.journal import Journal, read_rows
from neftune_dist.evaluation.win_rate import Answer, Judgement, pair
from neftune_dist.system import storage

_PROMPT = Path(__file__).with_name("judge_prompt.txt").read_text(encoding="utf-8").strip()
_VERDICT = re.compile(r"\W*(?:better\W+)?(a|b|tie)\W*", re.IGNORECASE)
_NAMED = re.compile(r"\W*better\W+(a|b|tie)\W*", re.IGNORECASE)
_FIRST_BETTER = {"a": 1.0, "tie": 0.5, "b": 0.0}

# Consecutive failures that end it: before the first reply, and after it.
_LIMIT_AT_FIRST, _LIMIT_LATER = 3, 20


def compare(
    ours: Sequence[Answer],
    theirs: Sequence[Answer],
    config: JudgeConfig,
    folder: Path,
    log: Callable[[str], None],
) -> list[Judgement]:
    """Judge each of our answers, in order, against theirs to the same instruction.

    Args:
        ours: rows of `answers.json`: `instruction` and `output`.
        theirs: the same, of the other model.
        config: which judge, its limits.
        folder: for `requests.jsonl`, the judge's replies as they come, from which another call
            continues, and `judgements.jsonl`.
        log: called with lines of progress.

    Raises:
        UserError: the sets are over different instructions, the judge's key is missing, it is down
            or refuses, the cost is above a limit, or the folder cannot be written.
    """
    pairs = pair(ours, theirs)
    if len(pairs) < len(theirs):
        log(f"judge: {len(pairs):,} of {len(theirs):,} answers of the other side are compared")
    with storage.writing(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
    judge = alpaca_annotators.annotate if config.annotator else _judged
    judgements = judge(pairs, config, folder, log)
    lines = [json.dumps(asdict(judgement)) + "\n" for judgement in judgements]
    with storage.writing(str(folder)):
        storage.write(folder / "judgements.jsonl", "".join(lines))
    return judgements


def _judged(
    pairs: Sequence[tuple[Answer, Answer]],
    config: JudgeConfig,
    folder: Path,
    log: Callable[[str], None],
) -> list[Judgement]:
    prompts = [_prompts(*both) for both in pairs]
    replies = _ask(config, [prompt for both in prompts for prompt in both], folder, log)
    judgements = []
    for (mine, other), both in zip(pairs, prompts, strict=True):
        if not both:
            judgements.append(Judgement.of(mine, other, 1.5))
            continue
        theirs_better, ours_better = (_verdict(replies[prompt]) for prompt in both)
        orders = (
            None if theirs_better is None else 2 - theirs_better,
            None if ours_better is None else 1 + ours_better,
        )
        # One order alone would bring back the preference for a position.
        mean = None if orders[0] is None or orders[1] is None else (orders[0] + orders[1]) / 2
        failed = any(replies[prompt] is None for prompt in both)
        judgements.append(Judgement.of(mine, other, mean, orders=orders, failed=failed))
    _warn(replies, log)
    return judgements


def _prompts(mine: Answer, other: Answer) -> list[str]:
    """The two requests about a pair: theirs shown first, then ours; none for equal answers."""
    shown = (other["output"], mine["output"])
    if shown[0] == shown[1]:
        return []
    return [
        _PROMPT.format(instruction=mine["instruction"], first=first, second=second)
        for first, second in (shown, shown[::-1])
    ]


def _verdict(reply: Reply | None) -> float | None:
    """How much better the first answer shown is, 0 .. 1; None without a clear verdict.

    The last line must be a verdict and nothing else, and no other line may contradict it."""
    if reply is None:
        return None
    lines = [line for line in reply.text.splitlines() if line.strip()]
    last = _VERDICT.fullmatch(lines[-1]) if lines else None
    if last is None:
        return None
    named = {found[1].lower() for line in lines if (found := _NAMED.fullmatch(line))}
    verdict = last[1].lower()
    # Case folding takes other letters for i and s, too.
    return _FIRST_BETTER.get(verdict) if named <= {verdict} else None


def _warn(replies: Mapping[str, Reply | None], log: Callable[[str], None]) -> None:
    answered = [reply for reply in replies.values() if reply is not None]
    unparsed = [reply for reply in answered if _verdict(reply) is None]
    if unparsed:
        cut = sum(reply.cut for reply in unparsed)
        log(
            f"judge: {len(unparsed):,} of {len(answered):,} answers hold no verdict and count as "
            f"undecided" + (f"; {cut:,} were cut at judge.max_answer_tokens" if cut else "")
        )


def _ask(
    config: JudgeConfig, prompts: Sequence[str], folder: Path, log: Callable[[str], None]
) -> dict[str, Reply | None]:
    """Ask the endpoint; return a reply to each prompt, None where all retries failed.

    Args:
        config: the endpoint and its limits.
        prompts: the requests; equal ones are sent once.
        folder: of the cache, requests.jsonl.
        log: called with lines of progress.

    Raises:
        UserError: no key, the endpoint is down or refuses, or a limit is reached. The replies until
            then are in `folder`.
    """
    endpoint, path = Endpoint(config, log), folder / "requests.jsonl"
    rows = read_rows(path, {"request": str, "answer": str, "cut": bool})
    kept = {row["request"]: Reply(row["answer"], row["cut"]) for row in rows}
    journal = Journal(path)

    def name(prompt: str) -> str:
        """What a reply depends on; not on the endpoint that serves the model."""
        asked = [config.model, config.max_answer_tokens, prompt]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    def ask(prompt: str) -> tuple[str, Reply | Failure]:
        try:
            reply = endpoint.reply(prompt)
        except Failure as failure:
            return prompt, failure
        text = endpoint.clean(reply.text)
        journal.append([{"request": name(prompt), "answer": text, "cut": reply.cut}])
        kept[name(prompt)] = reply
        return prompt, reply

    replies: dict[str, Reply | None] = {p: known for p in prompts if (known := kept.get(name(p)))}
    waiting = [prompt for prompt in dict.fromkeys(prompts) if prompt not in replies]
    check_limits(config, waiting, len(replies), log)
    num_failures, answered, step = 0, False, max(1, len(waiting) // 20)
    for number, (prompt, outcome) in enumerate(_outcomes(endpoint, ask, waiting), 1):
        if isinstance(outcome, Reply):
            replies[prompt] = outcome
            num_failures, answered = 0, True
        else:
            replies[prompt] = None
            num_failures += 1
            is_down = outcome.retry and not answered
            limit = _LIMIT_LATER if answered else _LIMIT_AT_FIRST
            if outcome.fatal or is_down or num_failures >= limit:
                raise UserError(f"{outcome}; {len(kept):,} answers are kept in {folder}.")
            log(f"judge: a comparison failed: {outcome}")
        if number % step == 0 or number == len(waiting):
            log(f"judge: {number:,} of {len(waiting):,} requests are done")
    if waiting:
        tokens_in, tokens_out = endpoint.input_tokens, endpoint.output_tokens
        log(
            f"judge: {endpoint.num_requests:,} requests were sent; by the endpoint's count they "
            f"took {tokens_in:,} tokens in and {tokens_out:,} out, "
            f"${dollars(config, tokens_in, tokens_out):.2f}"
        )
    return replies


def _outcomes(
    endpoint: Endpoint, ask: Callable[[str], tuple[str, Reply | Failure]], prompts: Sequence[str]
) -> Iterator[tuple[str, Reply | Failure]]:
    """Outcomes as they come, one at a time until the first reply: not all threads ask an endpoint
    that is down."""
    left = iter(prompts)
    for prompt in left:
        first = ask(prompt)
        yield first
        if isinstance(first[1], Reply):
            break
    # Its threads are daemons: Ctrl-C waits for no request.
    with ThreadPool(endpoint.config.num_parallel) as pool:
        try:
            yield from pool.imap_unordered(ask, left)
        finally:
            endpoint.stop()

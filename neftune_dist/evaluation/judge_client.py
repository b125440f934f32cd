"""Many prompts to one endpoint: cost limits, a cache on disk, threads, and when to give up.

Every reply is added to `requests.jsonl` as it comes, so that a run which was stopped, by Ctrl-C or
by an endpoint that went down, asks only for the rest. Failed requests are not kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

from neftune_dist.config import JudgeConfig, UserError
from neftune_dist.evaluation.endpoint import Endpoint, Failure, Reply, dollars
from neftune_dist.evaluation.journal import Journal, read_rows

_BYTES_PER_TOKEN = 3.5  # English has 4 to 5: the estimate is on the high side
_TOKENS_AROUND = 10  # of a request's message
# Consecutive failures that end it: before the first reply, and after it.
_LIMIT_AT_FIRST, _LIMIT_LATER = 3, 20


def ask(
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
    endpoint, cache = Endpoint(config, log), _Cache(config, folder / "requests.jsonl")
    replies: dict[str, Reply | None] = {p: known for p in prompts if (known := cache.find(p))}
    waiting = [prompt for prompt in dict.fromkeys(prompts) if prompt not in replies]
    check_limits(config, waiting, len(replies), log)
    num_failures, answered, step = 0, False, max(1, len(waiting) // 20)
    for number, (prompt, outcome) in enumerate(_outcomes(endpoint, waiting, cache), 1):
        if isinstance(outcome, Reply):
            replies[prompt] = outcome
            num_failures, answered = 0, True
        else:
            replies[prompt] = None
            num_failures += 1
            is_down = outcome.retry and not answered
            limit = _LIMIT_LATER if answered else _LIMIT_AT_FIRST
            if outcome.fatal or is_down or num_failures >= limit:
                raise UserError(f"{outcome}; {cache.num:,} answers are kept in {folder}.")
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


def check_limits(
    config: JudgeConfig, prompts: Sequence[str], num_cached: int, log: Callable[[str], None]
) -> None:
    """Log the estimated cost of the prompts, and refuse one above the limits.

    Args:
        config: prices and limits.
        prompts: the requests to be sent.
        num_cached: further ones whose replies are known.
        log: called with the estimate.

    Raises:
        UserError: `config.max_requests` or `config.max_dollars` is below it.
    """
    count = len(prompts)
    size = sum(round(len(prompt.encode()) / _BYTES_PER_TOKEN) for prompt in prompts)
    tokens_in, tokens_out = size + count * _TOKENS_AROUND, count * config.max_answer_tokens
    cost = dollars(config, tokens_in, tokens_out)
    priced = config.dollars_per_million_input or config.dollars_per_million_output
    stated = f"at most about ${cost:.2f}" if priced else "prices are not given"
    log(
        f"judge: {count:,} requests to {config.model or config.annotator} ({num_cached:,} more are "
        f"in the cache), about {tokens_in:,} tokens in, at most {tokens_out:,} out; {stated}"
    )
    if count > config.max_requests:
        raise UserError(
            f"{count:,} requests to the judge are needed, and judge.max_requests="
            f"{config.max_requests:,}: raise it, or compare fewer answers."
        )
    if config.max_dollars and cost > config.max_dollars:
        raise UserError(
            f"The judge's answers would cost up to about ${cost:.2f}, and judge.max_dollars="
            f"{config.max_dollars:g}: raise it, or compare fewer answers."
        )


def _outcomes(
    endpoint: Endpoint, prompts: Sequence[str], cache: _Cache
) -> Iterator[tuple[str, Reply | Failure]]:
    """Outcomes as they come, one at a time until the first reply: not all threads ask an endpoint
    that is down."""

    def outcome(prompt: str) -> tuple[str, Reply | Failure]:
        try:
            reply = endpoint.reply(prompt)
        except Failure as failure:
            return prompt, failure
        cache.add(prompt, Reply(endpoint.clean(reply.text), reply.cut))
        return prompt, reply

    left = iter(prompts)
    for prompt in left:
        first = outcome(prompt)
        yield first
        if isinstance(first[1], Reply):
            break
    # Its threads are daemons: Ctrl-C waits for no request.
    with ThreadPool(endpoint.config.num_parallel) as pool:
        try:
            yield from pool.imap_unordered(outcome, left)
        finally:
            endpoint.stop()


class _Cache:
    """Replies by the model's name, the limit of its answer and the prompt; not by the endpoint."""

    def __init__(self, config: JudgeConfig, path: Path) -> None:
        self._config = config
        rows = read_rows(path, {"request": str, "answer": str, "cut": bool})
        self._known = {row["request"]: Reply(row["answer"], row["cut"]) for row in rows}
        self._journal = Journal(path)

    @property
    def num(self) -> int:
        return len(self._known)

    def find(self, prompt: str) -> Reply | None:
        return self._known.get(self._name(prompt))

    def add(self, prompt: str, reply: Reply) -> None:
        name = self._name(prompt)
        self._journal.append([{"request": name, "answer": reply.text, "cut": reply.cut}])
        self._known[name] = reply

    def _name(self, prompt: str) -> str:
        asked = [self._config.model, self._config.max_answer_tokens, prompt]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

"""Many prompts to one endpoint: their cost beforehand, a cache on disk, threads, and when to stop.

Owns `requests.jsonl`, to which every answer is added as it comes: a run that was stopped, by Ctrl-C
or by an endpoint that went down, asks only for the rest. Failed requests are not kept.
"""

from __future__ import annotations

import hashlib
import json
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from neftune_dist.config import JudgeConfig, UserError
from neftune_dist.evaluation.endpoint import Endpoint, Failure, Reply

_BYTES_PER_TOKEN = 3.5  # English has 4 to 5: the estimate leaves room
_TOKENS_AROUND = 10  # a request's message
# Failures one after another that end it: before anything was answered, and after.
_LIMIT_AT_FIRST, _LIMIT_LATER = 3, 20


def check_bounds(
    config: JudgeConfig, prompts: Sequence[str], num_cached: int, log: Callable[[str], None]
) -> None:
    """Say what the prompts will cost, and refuse more than `config.max_requests` of them or
    `config.max_dollars`."""
    count = len(prompts)
    size = sum(round(len(prompt.encode()) / _BYTES_PER_TOKEN) for prompt in prompts)
    tokens_in, tokens_out = size + count * _TOKENS_AROUND, count * config.max_answer_tokens
    million_in, million_out = config.dollars_per_million_input, config.dollars_per_million_output
    dollars = (tokens_in * million_in + tokens_out * million_out) / 1e6
    cost = f"at most about ${dollars:.2f}" if million_in or million_out else "prices are not given"
    log(
        f"judge: {count:,} requests to {config.model or config.annotator} ({num_cached:,} more are "
        f"in the cache), about {tokens_in:,} tokens in, at most {tokens_out:,} out; {cost}"
    )
    if count > config.max_requests:
        raise UserError(
            f"{count:,} requests to the judge are needed, and judge.max_requests="
            f"{config.max_requests:,}: raise it, or compare fewer answers."
        )
    if config.max_dollars and dollars > config.max_dollars:
        raise UserError(
            f"The judge's answers would cost up to about ${dollars:.2f}, and judge.max_dollars="
            f"{config.max_dollars:g}: raise it, or compare fewer answers."
        )


def ask(
    config: JudgeConfig, prompts: Sequence[str], folder: Path, log: Callable[[str], None]
) -> dict[str, Reply | None]:
    """A reply to each prompt, None where a request failed for good.

    Raises:
        UserError: no key, the endpoint is down or refuses, or a bound is reached. What was answered
            until then is in `folder`.
    """
    endpoint = Endpoint(config, log)
    cache = _Cache(config, folder / "requests.jsonl")
    replies: dict[str, Reply | None] = {}
    for prompt in prompts:
        if known := cache.find(prompt):
            replies[prompt] = known
    waiting = [prompt for prompt in dict.fromkeys(prompts) if prompt not in replies]
    check_bounds(config, waiting, len(replies), log)
    failures_in_a_row, answered, step = 0, False, max(1, len(waiting) // 20)
    for number, (prompt, outcome) in enumerate(_outcomes(endpoint, waiting, cache), 1):
        if isinstance(outcome, Reply):
            replies[prompt] = outcome
            failures_in_a_row, answered = 0, True
        else:
            replies[prompt] = None
            failures_in_a_row += 1
            limit = _LIMIT_LATER if answered else _LIMIT_AT_FIRST
            down = outcome.again and not answered  # its retries have told
            if outcome.hopeless or down or failures_in_a_row >= limit:
                raise UserError(f"{outcome}; {cache.num:,} answers are kept in {folder}.")
            log(f"judge: a comparison failed: {outcome}")
        if number % step == 0 or number == len(waiting):
            log(f"judge: {number:,} of {len(waiting):,} requests are done")
    if waiting:
        tokens = endpoint.input_tokens, endpoint.output_tokens
        log(
            f"judge: {endpoint.num_requests:,} requests were sent; by the endpoint's count they "
            f"took {tokens[0]:,} tokens in and {tokens[1]:,} out, ${endpoint.dollars(*tokens):.2f}"
        )
    return replies


def _outcomes(
    endpoint: Endpoint, prompts: Sequence[str], cache: _Cache
) -> Iterator[tuple[str, Reply | Failure]]:
    """As they come. One at a time until one was answered, so that an endpoint that is down is not
    asked by all threads; these are daemons, so that Ctrl-C waits for none of them."""
    todo = iter(prompts)
    for prompt in todo:
        outcome = _outcome(endpoint, prompt, cache)
        yield prompt, outcome
        if isinstance(outcome, Reply):
            break
    left: queue.SimpleQueue[str] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[str, Reply | Failure | Exception]] = queue.SimpleQueue()
    count = 0
    for prompt in todo:
        left.put(prompt)
        count += 1
    stopped = threading.Event()

    def work() -> None:
        while not stopped.is_set():
            try:
                prompt = left.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((prompt, _outcome(endpoint, prompt, cache)))
            except Exception as error:  # such as a full disk: the main thread waits for it
                done.put((prompt, error))

    for _ in range(min(endpoint.config.num_parallel, count)):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in range(count):
            prompt, found = done.get()
            if not isinstance(found, Reply | Failure):
                raise found
            yield prompt, found
    finally:
        stopped.set()
        endpoint.stop()


def _outcome(endpoint: Endpoint, prompt: str, cache: _Cache) -> Reply | Failure:
    try:
        reply = endpoint.reply(prompt)
    except Failure as failure:
        return failure
    cache.add(prompt, Reply(endpoint.clean(reply.text), reply.cut))
    return reply


class _Cache:
    """Answers by what they depend on: the model's name, the limit of its answer and the prompt, not
    where it is served. One JSON object a line."""

    def __init__(self, config: JudgeConfig, path: Path) -> None:
        self._config, self._path = config, path
        self._lock = threading.Lock()
        self._known: dict[str, Reply] = {}
        lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
        for line in lines:
            try:
                row = json.loads(line)
                self._known[row["request"]] = Reply(str(row["answer"]), bool(row["cut"]))
            except (ValueError, TypeError, LookupError):
                continue  # torn, of a process that was killed as it wrote
        if lines and not lines[-1].endswith("\n"):
            self._append("\n")

    @property
    def num(self) -> int:
        return len(self._known)

    def find(self, prompt: str) -> Reply | None:
        return self._known.get(self._name(prompt))

    def add(self, prompt: str, reply: Reply) -> None:
        name = self._name(prompt)
        row = {"request": name, "answer": reply.text, "cut": reply.cut}
        with self._lock:
            self._known[name] = reply
            self._append(json.dumps(row) + "\n")

    def _append(self, text: str) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            cause = error.strerror or error
            raise UserError(f"{self._path} cannot be written: {cause}.") from error

    def _name(self, prompt: str) -> str:
        asked = [self._config.model, self._config.max_answer_tokens, prompt]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

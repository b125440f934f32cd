"""Requests to an OpenAI-compatible endpoint: their cost, and one sent, retried, parsed, or a reason
why not.

The key is read from the environment, sent in one header to one host, and removed from every text
that leaves this module.

The client is the standard library's. `huggingface_hub.InferenceClient` (2.4) sends nothing at all
under HF_HUB_OFFLINE=1, sends the user's hub token to any host where no key is given, follows
redirects, and bounds neither the size of a reply nor its whole time.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import random
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from neftune_dist.config import JudgeConfig, UserError

BACKOFF_SECONDS = 1.0  # before the first retry; doubled before each further one
_LONGEST_PAUSE_SECONDS = 600.0
_LARGEST_REPLY_BYTES = 2**20
_MOST_TOKENS = 2**32  # of one reply, by its own count
_BYTES_PER_TOKEN = 3.5  # English has 4 to 5: the estimate is on the high side
_TOKENS_AROUND = 10  # of a request's message


@dataclass(frozen=True)
class Reply:
    """The text of a reply, and whether it ended at judge.max_answer_tokens."""

    text: str
    cut: bool = False


class Failure(Exception):
    """A request without a reply. The message is a clause without a full stop.

    Attributes:
        retry: the cause may pass.
        fatal: every further request would fail, too.
        pause: seconds before a retry, where the endpoint asks for them.
    """

    def __init__(
        self, message: str, *, retry: bool = False, fatal: bool = False, pause: float | None = None
    ) -> None:
        super().__init__(message)
        self.retry, self.fatal, self.pause = retry, fatal, pause


def dollars(config: JudgeConfig, input_tokens: int, output_tokens: int) -> float:
    """The cost of this many tokens by the prices of `config`."""
    dollars_in = input_tokens * config.dollars_per_million_input
    return (dollars_in + output_tokens * config.dollars_per_million_output) / 1e6


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


class _AnyStatus(urllib.request.HTTPErrorProcessor):
    """Give a reply of any status as it is. No redirect is followed: it would carry the key to
    wherever it points."""

    def http_response(self, request: Any, response: Any) -> Any:
        return response

    https_response = http_response


class Endpoint:
    """The endpoint `config.url`, for many threads at once. Raises `UserError` where the key is
    missing or holds characters that no key has."""

    def __init__(self, config: JudgeConfig, log: Callable[[str], None]) -> None:
        self.config, self.log = config, log
        self.url = f"{str(config.url).rstrip('/')}/chat/completions"
        self.num_requests = self.input_tokens = self.output_tokens = 0
        self._key = _key(config.key_variable)
        self._opener = urllib.request.build_opener(_AnyStatus)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._resume_at = 0.0  # time.monotonic() before which no thread sends
        self._options = {"temperature": 0, "max_tokens": config.max_answer_tokens}

    def stop(self) -> None:
        """Retry no request and make no pause from now on."""
        self._stopped.set()

    def clean(self, text: str) -> str:
        """Remove the key from a text, should an answer repeat it."""
        return text.replace(self._key, "***") if self._key else text

    def reply(self, prompt: str) -> Reply:
        """Send a prompt, with as many retries as the configuration allows; return the reply.
        Raises `Failure`."""
        for retry in itertools.count(1):
            self._stopped.wait(max(0.0, self._resume_at - time.monotonic()))
            self._count_request()
            try:
                return self._post(prompt)
            except Failure as failure:
                if not failure.retry or retry > self.config.max_retries or self._stopped.is_set():
                    raise
                self._wait(failure, retry)
        raise AssertionError

    def _wait(self, failure: Failure, retry: int) -> None:
        # Spread, so that threads which paused together do not come back together.
        pause = BACKOFF_SECONDS * 2 ** (retry - 1) * random.Random().uniform(0.75, 1.25)
        pause = min(pause if failure.pause is None else failure.pause, _LONGEST_PAUSE_SECONDS)
        if failure.pause is not None:  # what the endpoint asks for holds for all threads
            self._resume_at = max(self._resume_at, time.monotonic() + pause)
        retries = self.config.max_retries
        self.log(f"judge: {failure}; again in {pause:.3g} s (retry {retry} of {retries})")
        self._stopped.wait(pause)

    def _count_request(self) -> None:
        config = self.config
        with self._lock:
            spent = dollars(config, self.input_tokens, self.output_tokens)
            if self.num_requests >= config.max_requests:
                limit = f"judge.max_requests={config.max_requests:,} are spent, retries included"
            elif config.max_dollars and spent >= config.max_dollars:
                limit = f"judge.max_dollars={config.max_dollars:g} are spent, by the endpoint's own"
                limit += " count of tokens"
            else:
                self.num_requests += 1
                return
        raise Failure(limit, fatal=True)

    def _post(self, prompt: str) -> Reply:
        messages = [{"role": "user", "content": prompt}]
        body = {"model": self.config.model, "messages": messages, **self._options}
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        # A socket's own time-out starts again with every byte: an endpoint could drip for ever.
        end, content = time.monotonic() + self.config.timeout_seconds, b""
        try:
            with self._opener.open(request, timeout=self.config.timeout_seconds) as response:
                while piece := response.read1(2**16):
                    content += piece
                    if time.monotonic() > end:
                        raise TimeoutError
                    if len(content) > _LARGEST_REPLY_BYTES:
                        raise http.client.HTTPException("the reply has no end")
        # Time-outs are OSErrors; a host's name that is too long is a UnicodeError.
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise self._broken(error) from None
        if response.status >= 300:
            raise self._refusal(response, content)
        return self._parsed(content)

    def _parsed(self, content: bytes) -> Reply:
        try:
            reply = json.loads(content)
            choice = reply["choices"][0]
            text, usage = choice["message"].get("content") or "", reply.get("usage") or {}
            used = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
            # Counts bound the cost, and are multiplied by prices.
            if not (isinstance(text, str) and all(0 <= count < _MOST_TOKENS for count in used)):
                raise ValueError
        except Exception:  # any other JSON may be there, of any depth
            start = self.clean(content.decode(errors="replace"))[:80]
            message = f"{self.url} does not answer as OpenAI's chat completions do: {start!r}"
            raise Failure(message, retry=True) from None
        with self._lock:
            self.input_tokens += used[0]
            self.output_tokens += used[1]
        return Reply(text, cut=choice.get("finish_reason") == "length")

    def _refusal(self, response: http.client.HTTPResponse, content: bytes) -> Failure:
        status, said = response.status, _message(self.clean(content.decode(errors="replace")))
        answer = f"{self.url} answered {status}" + (f" ({said})" if said else "")
        if status in (401, 403):
            sent = f"the key in {self.config.key_variable}" if self._key else "requests without key"
            return Failure(f"{answer}: it does not accept {sent}", fatal=True)
        if status == 404 or 300 <= status < 400:
            advice = "judge.url must be the part before /chat/completions, judge.model known there"
            return Failure(f"{answer}: {advice}", fatal=True)
        if status in (408, 409, 429) or status >= 500:
            return Failure(answer, retry=True, pause=_pause(response.getheader("Retry-After")))
        if status == 400 and self._drops_option(said):
            return Failure(answer, retry=True, pause=0.0)
        return Failure(answer)

    def _drops_option(self, said: str) -> bool:
        """Drop an option that the endpoint refused: reasoning models take no temperature, and have
        another name for the answer's limit. Return whether there was one."""
        with self._lock:
            options = dict(self._options)
            if "max_completion_tokens" in said and "max_tokens" in options:
                options["max_completion_tokens"] = options.pop("max_tokens")
            elif "temperature" in said:
                options.pop("temperature", None)
            changed, self._options = options != self._options, options
        return changed

    def _broken(self, error: Exception) -> Failure:
        cause = getattr(error, "reason", None) or error
        # A certificate that is not trusted now will not be in a second.
        untrusted = isinstance(cause, ssl.SSLCertVerificationError)
        if isinstance(cause, TimeoutError):
            text = f"no answer within judge.timeout_seconds={self.config.timeout_seconds:g}"
        else:
            text = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        message = f"{self.url} cannot be reached: {self.clean(text)}"
        return Failure(message, retry=not untrusted, fatal=untrusted)


def _key(variable: str | None) -> str:
    """Read the key from the environment; empty where the configuration sends none."""
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            f"The judge's key is missing: put it into the environment variable {variable}, or set "
            "judge.key_variable=null for an endpoint without keys."
        )
    if not (key.isascii() and key.isprintable() and " " not in key):
        # Refused here: http.client's own message would quote it.
        raise UserError(f"The environment variable {variable} holds characters that no key has.")
    return key


def _message(text: str) -> str:
    """An error's text in one line: OpenAI's `error.message`, or the beginning of the body."""
    try:
        error = json.loads(text)["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    except (LookupError, RecursionError, ValueError, TypeError):
        pass
    return " ".join(str(text).split())[:200].rstrip(".")


def _pause(retry_after: str | None) -> float | None:
    """Seconds to wait by a Retry-After header, where it is a number of them."""
    try:
        return max(0.0, float(retry_after or ""))
    except ValueError:
        return None

"""One request to an OpenAI-compatible endpoint: sent, retried, understood, or a reason why not.

Owns the connection and the key: read from the environment, sent in one header and to no other host,
cut out of every text that leaves this module. Owns also the pauses between retries and the bounds
on requests and dollars. What is asked, how often and in which order are its caller's.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import random
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from neftune_dist.config import JudgeConfig, UserError

BACKOFF_SECONDS = 1.0  # before the first retry; doubled before each that follows
_LONGEST_PAUSE_SECONDS = 600.0
_LARGEST_REPLY_BYTES = 2**20


@dataclass(frozen=True)
class Reply:
    """cut: the text ended at judge.max_answer_tokens."""

    text: str
    cut: bool = False


class Failure(Exception):
    """A request that came to nothing, in a clause without a full stop.

    again: its cause may pass; hopeless: all further requests would fail too.
    pause: seconds before a retry, where the endpoint asks for them.
    """

    def __init__(
        self, message: str, *, again: bool, hopeless: bool = False, pause: float | None = None
    ) -> None:
        super().__init__(message)
        self.again, self.hopeless, self.pause = again, hopeless, pause


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to wherever it points."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class Endpoint:
    """`config.url`, for many threads at once.

    Raises:
        UserError: the key's variable is not set, or holds no key.
    """

    def __init__(self, config: JudgeConfig, log: Callable[[str], None]) -> None:
        self.config, self.log = config, log
        self.url = f"{str(config.url).rstrip('/')}/chat/completions"
        self.num_requests = self.input_tokens = self.output_tokens = 0
        self._key = _key(config.key_variable)
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._resume_at = 0.0  # time.monotonic() before which nobody asks
        self._options = {"temperature": 0, "max_tokens": config.max_answer_tokens}

    def stop(self) -> None:
        """No retries and no pauses from now on."""
        self._stopped.set()

    def reply(self, prompt: str) -> Reply:
        """The answer to a prompt, with as many retries as the configuration allows.

        Raises:
            Failure: it came to nothing.
        """
        retry = 0
        while True:
            self._stopped.wait(max(0.0, self._resume_at - time.monotonic()))
            self._count_request()
            try:
                return self._post(prompt)
            except Failure as failure:
                if not failure.again or retry == self.config.max_retries or self._stopped.is_set():
                    raise
                retry += 1
                self._wait(failure, retry)

    def dollars(self, input_tokens: int, output_tokens: int) -> float:
        """What they cost by the configured prices."""
        config = self.config
        return (
            input_tokens * config.dollars_per_million_input
            + output_tokens * config.dollars_per_million_output
        ) / 1e6

    def clean(self, text: str) -> str:
        """The text without the key, should an answer repeat it."""
        return text.replace(self._key, "***") if self._key else text

    def _wait(self, failure: Failure, retry: int) -> None:
        pause = failure.pause
        if pause is None:
            # Spread, so that threads put off together do not come back together.
            pause = BACKOFF_SECONDS * 2 ** (retry - 1) * random.Random().uniform(0.75, 1.25)
        pause = min(pause, _LONGEST_PAUSE_SECONDS)
        if failure.pause is not None:  # the endpoint's own word holds for all threads
            self._resume_at = max(self._resume_at, time.monotonic() + pause)
        retries = self.config.max_retries
        self.log(f"judge: {failure}; again in {pause:.3g} s (retry {retry} of {retries})")
        self._stopped.wait(pause)

    def _count_request(self) -> None:
        config = self.config
        with self._lock:
            spent = self.dollars(self.input_tokens, self.output_tokens)
            if self.num_requests >= config.max_requests:
                bound = f"judge.max_requests={config.max_requests:,} are spent, retries included"
            elif config.max_dollars and spent >= config.max_dollars:
                bound = f"judge.max_dollars={config.max_dollars:g} are spent, by the endpoint's own"
                bound += " count of tokens"
            else:
                self.num_requests += 1
                return
        raise Failure(bound, again=False, hopeless=True)

    def _post(self, prompt: str) -> Reply:
        body = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": prompt}],
            **self._options,
        }
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        try:
            with self._opener.open(request, timeout=self.config.timeout_seconds) as response:
                content = self._read(response)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error) from None
        except (OSError, http.client.HTTPException) as error:  # time-outs are OSErrors
            raise self._broken(error) from None
        return self._parsed(content)

    def _read(self, response: Any) -> bytes:
        """All of it, within the time-out and a size: a socket's own time-out would let an endpoint
        drip for ever."""
        end = time.monotonic() + self.config.timeout_seconds
        content = b""
        while piece := response.read1(2**16):
            content += piece
            if time.monotonic() > end:
                raise TimeoutError
            if len(content) > _LARGEST_REPLY_BYTES:
                raise http.client.HTTPException("the reply has no end")
        return content

    def _parsed(self, content: bytes) -> Reply:
        try:
            reply = json.loads(content)
            choice = reply["choices"][0]
            text = choice["message"].get("content") or ""
            usage = reply.get("usage") or {}
            used = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
            if not isinstance(text, str):
                raise TypeError
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            ValueError,
            TypeError,
        ):
            start = self.clean(content.decode(errors="replace"))[:80]
            raise Failure(
                f"{self.url} does not answer as OpenAI's chat completions do: {start!r}", again=True
            ) from None
        with self._lock:
            self.input_tokens += used[0]
            self.output_tokens += used[1]
        return Reply(text, cut=choice.get("finish_reason") == "length")

    def _refusal(self, error: urllib.error.HTTPError) -> Failure:
        status = error.code
        try:
            said = _message(self.clean(error.read(2**16).decode(errors="replace")))
        except (OSError, http.client.HTTPException):
            said = ""
        answer = f"{self.url} answered {status}" + (f" ({said})" if said else "")
        if status in (401, 403):
            sent = f"the key in {self.config.key_variable}" if self._key else "requests without key"
            return Failure(f"{answer}: it does not accept {sent}", again=False, hopeless=True)
        if status == 404 or 300 <= status < 400:
            advice = "judge.url must be the part before /chat/completions, judge.model known there"
            return Failure(f"{answer}: {advice}", again=False, hopeless=True)
        if status in (408, 409, 429) or status >= 500:
            return Failure(answer, again=True, pause=_pause(error.headers.get("Retry-After")))
        if status == 400 and self._yields(said):
            return Failure(answer, again=True, pause=0.0)
        return Failure(answer, again=False)

    def _yields(self, said: str) -> bool:
        """Models that reason take no temperature, and have another name for the answer's limit."""
        with self._lock:
            if "max_completion_tokens" in said and "max_tokens" in self._options:
                limit = self._options.pop("max_tokens")
                self._options = {**self._options, "max_completion_tokens": limit}
                return True
            if "temperature" in said and "temperature" in self._options:
                self._options = {k: v for k, v in self._options.items() if k != "temperature"}
                return True
        return False

    def _broken(self, error: Exception) -> Failure:
        cause = getattr(error, "reason", None) or error
        # A certificate that is not trusted now will not be in a second.
        lasting = isinstance(cause, ssl.SSLCertVerificationError)
        if isinstance(cause, TimeoutError):
            what = f"no answer within judge.timeout_seconds={self.config.timeout_seconds:g}"
        else:
            what = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        return Failure(
            f"{self.url} cannot be reached: {self.clean(what)}", again=not lasting, hopeless=lasting
        )


def _key(variable: str | None) -> str:
    """The key, for the header alone; nothing where none is to be sent."""
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            f"The judge's key is missing: put it into the environment variable {variable}, or set "
            "judge.key_variable=null for an endpoint without keys."
        )
    if not (key.isascii() and key.isprintable() and " " not in key):
        # Said here: the library's own message would quote it.
        raise UserError(f"The environment variable {variable} holds characters that no key has.")
    return key


def _message(text: str) -> str:
    """What an error's body says: OpenAI's `error.message`, or its beginning; one line."""
    try:
        error = json.loads(text)["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    except (LookupError, RecursionError, ValueError, TypeError):
        pass
    return " ".join(str(text).split())[:200].rstrip(".")


def _pause(retry_after: str | None) -> float | None:
    """Seconds, from a number of them or a date."""
    if not retry_after:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return None

"""The judge: a local server with scripted verdicts, biases and faults; bounds, cache and key."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from neftune_dist.config import JudgeConfig, UserError
from neftune_dist.evaluation import endpoint, judge
from neftune_dist.evaluation.win_rate import Judgement, win_rate

KEY = "sk-test-0123456789-secret"
Row = dict[str, Any]


class Server:
    """An OpenAI-compatible endpoint. `behave(prompt, attempt)` gives the answer's text, or does to
    the handler what it likes and gives None; attempt counts from 1 for each prompt."""

    def __init__(self) -> None:
        self.behave: Callable[..., str | None] = lambda prompt, attempt, handler: "Better: tie"
        self.requests: list[Row] = []
        self.headers: list[dict[str, str]] = []
        self.attempts: Counter[str] = Counter()
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][-1]["content"]
                with outer._lock:
                    outer.requests.append(body)
                    outer.headers.append(dict(self.headers))
                    outer.attempts[prompt] += 1
                    attempt = outer.attempts[prompt]
                    outer._at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer._at_once)
                try:
                    text = outer.behave(prompt, attempt, self)
                    if text is not None:
                        self.answer(text)
                finally:
                    with outer._lock:
                        outer._at_once -= 1

            def answer(self, text: str, **other: Any) -> None:
                message = {"role": "assistant", "content": text}
                choice = {"message": message, "finish_reason": "stop", "index": 0, **other}
                usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
                self.send(200, json.dumps({"choices": [choice], "usage": usage}))

            def send(self, status: int, content: str, **headers: str) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(content.encode())))
                self.end_headers()
                self.wfile.write(content.encode())

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.close()


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.setattr(endpoint, "BACKOFF_SECONDS", 0.001)


def settings(server: Server, **changed: Any) -> JudgeConfig:
    defaults = {"url": server.url, "model": "m", "key_variable": "JUDGE_KEY", "max_retries": 2}
    return JudgeConfig(**{**defaults, "timeout_seconds": 5.0, **changed})


def rows(outputs: list[str]) -> list[Row]:
    return [{"instruction": f"question {i}", "output": output} for i, output in enumerate(outputs)]


class Compared:
    """Six comparisons by default; ours say "good", theirs "bad"."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lines = folder, list[str]()

    def __call__(self, config: JudgeConfig, num: int = 6, **sides: list[Row]) -> list[Judgement]:
        ours = sides.get("ours") or rows([f"good {i}" for i in range(num)])
        theirs = sides.get("theirs") or rows([f"bad {i}" for i in range(num)])
        return judge.compare(ours, theirs, config, self.folder, self.lines.append)

    def refused(self, config: JudgeConfig, **others: Any) -> str:
        with pytest.raises(UserError) as raised:
            self(config, **others)
        text = str(raised.value)
        assert "\n" not in text and text.endswith(".") and KEY not in text, text
        return text


@pytest.fixture
def compare(tmp_path: Path) -> Compared:
    return Compared(tmp_path / "judge")


def shown(prompt: str) -> tuple[str, str]:
    first = prompt.split("<answer_a>\n")[1].split("\n</answer_a>")[0]
    second = prompt.split("<answer_b>\n")[1].split("\n</answer_b>")[0]
    return first, second


def by_quality(prompt: str, *_: Any) -> str:
    first, second = shown(prompt)
    return "Better: A" if first.startswith("good") > second.startswith("good") else "Better: B"


# Verdicts.


def test_better_answer_wins_in_both_orders(server: Server, compare: Compared) -> None:
    server.behave = by_quality
    found = compare(settings(server))
    assert [j.preference for j in found] == [2.0] * 6
    assert [j.orders for j in found] == [(2.0, 2.0)] * 6
    assert (found[0].our_length, found[0].their_length) == (6, 5)
    both = [shown(body["messages"][0]["content"]) for body in server.requests]
    assert sorted(both) == sorted(
        pair for i in range(6) for pair in [(f"good {i}", f"bad {i}"), (f"bad {i}", f"good {i}")]
    )
    rates = win_rate(found)
    assert (rates["win_rate"], rates["order_agreement"], rates["first_shown"]) == (100, 100, 50)
    stored = (compare.folder / "judgements.jsonl").read_text().splitlines()
    assert [json.loads(line)["preference"] for line in stored] == [2.0] * 6


def test_worse_answer_loses(server: Server, compare: Compared) -> None:
    server.behave = by_quality
    swapped = compare(settings(server), ours=rows(["bad"] * 3), theirs=rows(["good"] * 3))
    assert win_rate(swapped)["win_rate"] == 0


@pytest.mark.parametrize(("letter", "first_shown"), [("A", 100), ("B", 0)])
def test_position_bias_is_a_tie(
    letter: str, first_shown: float, server: Server, compare: Compared
) -> None:
    server.behave = lambda *_: f"Better: {letter}"
    rates = win_rate(compare(settings(server)))
    assert (rates["win_rate"], rates["num_ties"], rates["order_agreement"]) == (50, 6, 0)
    assert rates["first_shown"] == first_shown


def test_reply_without_verdict_is_counted_and_never_a_win(
    server: Server, compare: Compared
) -> None:
    """One in one order, one in both."""

    def behave(prompt: str, *_: Any) -> str:
        if "question 1" in prompt and shown(prompt)[0].startswith("good"):
            return "I like both."
        return "" if "question 2" in prompt else by_quality(prompt)

    server.behave = behave
    found = compare(settings(server), num=3)
    assert [j.preference for j in found] == [2.0, None, None]
    assert [j.orders for j in found] == [(2.0, 2.0), (2.0, None), (None, None)]
    rates = win_rate(found)
    assert (rates["num_wins"], rates["num_unparsed"], rates["num_failed"]) == (1, 2, 0)
    assert any("3 of 6 answers hold no verdict" in line for line in compare.lines)


def test_replies_cut_at_the_limit_are_logged(server: Server, compare: Compared) -> None:
    server.behave = lambda _, __, handler: handler.answer("Let me see.", finish_reason="length")
    compare(settings(server, max_answer_tokens=3))
    assert compare.lines[-1].endswith("12 were cut at judge.max_answer_tokens")
    assert server.requests[0]["max_tokens"] == 3


@pytest.mark.parametrize(
    ("text", "first_better"),
    [
        ("Better: A", 1.0),
        ("better: b", 0.0),
        ("**Better: tie**", 0.5),
        ("A", 1.0),
        ("`B`.", 0.0),
        ("A is wrong about the date.\n\nBetter: B\n", 0.0),
        ("Better: B", 0.0),
        ("Better: B would be a matter of taste.\nBetter: A", 1.0),
        ("", None),
        ("Better: C", None),
        ("Better: A or B", None),
        ("Answer A is better.", None),
        ("Better: A, since it is longer", None),
        ("Better: A\nBetter: B", None),
        ("Better: A\nNo, wait.", None),
        ("AB", None),
        ("neither", None),
        ("T\u0130E", None),  # which matches "tie" without regard to case
    ],
)
def test_verdicts_are_read_strictly(text: str, first_better: float | None) -> None:
    assert judge._verdict(endpoint.Reply(text)) == first_better


def test_equal_answers_are_a_tie_without_a_request(server: Server, compare: Compared) -> None:
    server.behave = by_quality
    found = compare(settings(server), ours=rows(["same", "good"]), theirs=rows(["same", "bad"]))
    assert [j.preference for j in found] == [1.5, 2.0] and len(server.requests) == 2


def test_other_instructions_are_refused_before_a_request(server: Server, compare: Compared) -> None:
    other = [{"instruction": "else", "output": "bad"}]
    assert "number 1" in compare.refused(settings(server), ours=rows(["good"]), theirs=other)
    assert not server.requests


# Faults.


def test_passing_faults_are_retried(server: Server, compare: Compared) -> None:
    """The first attempt at each prompt fails, each time in another way."""

    def behave(prompt: str, attempt: int, handler: Any) -> str | None:
        if attempt > 1:
            return by_quality(prompt)
        number = int(prompt.split("question ")[1].split("\n")[0])
        if number == 0:
            handler.send(500, "oops")
        elif number == 1:
            handler.send(429, "slow down", Retry_After="0")
        elif number == 2:
            handler.send(200, "<html>gateway</html>")
        elif number == 3:
            choices = [{"message": {"content": "Better: A"}}]
            usage = {"prompt_tokens": 10**400}
            handler.send(200, json.dumps({"choices": choices, "usage": usage}))
        elif number == 4:  # closed before an answer
            handler.connection.shutdown(socket.SHUT_RDWR)
        else:  # closed within it
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            handler.wfile.write(b'{"choices": ')
        return None

    server.behave = behave
    found = compare(settings(server))
    assert [j.preference for j in found] == [2.0] * 6
    assert set(server.attempts.values()) == {2}
    assert any("answered 500 (oops); again in" in line for line in compare.lines)


def test_lasting_fault_fails_one_comparison(server: Server, compare: Compared) -> None:
    def behave(prompt: str, attempt: int, handler: Any) -> str | None:
        if "question 3" in prompt:
            return handler.send(503, "busy")
        if "question 4" in prompt:  # too long for the model, say: no use to try again
            return handler.send(400, json.dumps({"error": {"message": "context too long"}}))
        return by_quality(prompt)

    server.behave = behave
    found = compare(settings(server))
    assert [j.preference for j in found] == [2.0, 2.0, 2.0, None, None, 2.0]
    assert [j.failed for j in found] == [False, False, False, True, True, False]
    rates = win_rate(found)
    assert (rates["win_rate"], rates["num_failed"], rates["num_unparsed"]) == (100, 2, 0)
    attempts = {p: n for p, n in server.attempts.items() if "question 3" in p or "question 4" in p}
    assert sorted(attempts.values()) == [1, 1, 3, 3]  # max_retries=2
    server.behave = by_quality
    assert win_rate(compare(settings(server)))["num_failed"] == 0  # asked again, they alone
    assert sum(server.attempts.values()) == 8 + 8 + 4


def test_slow_reply_is_retried(server: Server, compare: Compared) -> None:
    def behave(prompt: str, attempt: int, handler: Any) -> str | None:
        if attempt == 1 and "question 1" in prompt:
            time.sleep(0.6)
        if attempt == 1 and "question 2" in prompt:  # a drop at a time
            handler.send_response(200)
            handler.end_headers()
            for _ in range(12):
                handler.wfile.write(b" ")
                time.sleep(0.05)
        return by_quality(prompt)

    server.behave = behave
    found = compare(settings(server, timeout_seconds=0.25), num=3)
    assert [j.preference for j in found] == [2.0] * 3
    assert sum("no answer within judge.timeout_seconds=0.25" in line for line in compare.lines) == 4


def test_retry_after_pauses_all_threads(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """30 seconds are asked for, of which the test waits for 0.2."""
    monkeypatch.setattr(endpoint, "_LONGEST_PAUSE_SECONDS", 0.2)
    limited, arrived = threading.Event(), []

    def behave(prompt: str, attempt: int, handler: Any) -> str | None:
        if prompt == "first" and attempt == 1:
            return handler.send(429, "slow down", Retry_After="30")
        arrived.append(time.monotonic())
        return "A"

    def log(line: str) -> None:
        assert "again in 0.2 s" in line
        limited.set()

    server.behave = behave
    asked = endpoint.Endpoint(settings(server), log)
    begun = time.monotonic()
    waiting = threading.Thread(target=asked.reply, args=("first",))
    waiting.start()
    assert limited.wait(20)
    asked.reply("second")  # not put off itself
    waiting.join(20)
    assert len(arrived) == 2 and min(arrived) >= begun + 0.2


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (401, "does not accept the key in JUDGE_KEY"),
        (403, "does not accept the key in JUDGE_KEY"),
        (404, "judge.url must be the part before /chat/completions"),
    ],
)
def test_refused_key_or_url_ends_after_one_request(
    status: int, says: str, server: Server, compare: Compared
) -> None:
    """And the key, which some endpoints quote, is not in it."""
    message = {"error": {"message": f"no: {KEY} is wrong"}}
    server.behave = lambda _, __, handler: handler.send(status, json.dumps(message))
    text = compare.refused(settings(server))
    assert says in text and "no: *** is wrong" in text and len(server.requests) == 1


def test_endpoint_that_is_down_ends_it(server: Server, compare: Compared) -> None:
    config = settings(server, max_retries=1)
    server.close()
    assert "Connection refused" in compare.refused(config)
    assert sum("again in" in line for line in compare.lines) == 1


def test_host_that_cannot_be_reached_is_named(server: Server, compare: Compared) -> None:
    """Also one whose name no resolver takes."""
    url = f"http://{'a' * 64}.example/v1"
    assert f"{url}/chat/completions cannot be reached: " in compare.refused(
        settings(server, url=url, max_retries=0)
    )


def test_three_refused_requests_end_it(server: Server, compare: Compared) -> None:
    server.behave = lambda _, __, handler: handler.send(400, "bad request")
    assert "answered 400 (bad request)" in compare.refused(settings(server))
    assert len(server.requests) == 3


def test_replies_before_an_outage_are_kept(
    server: Server, compare: Compared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "_LIMIT_LATER", 4)

    def behave(prompt: str, attempt: int, handler: Any) -> str | None:
        return by_quality(prompt) if len(server.requests) <= 5 else handler.send(500, "down")

    server.behave = behave
    text = compare.refused(settings(server, num_parallel=1, max_retries=0), num=10)
    # (How many it has sent before it notices depends on the machine's load.)
    assert "5 answers are kept" in text and len(server.requests) < 20
    kept = [body["messages"][-1]["content"] for body in server.requests[:5]]
    server.behave = by_quality
    assert win_rate(compare(settings(server), num=10))["win_rate"] == 100
    assert [server.attempts[prompt] for prompt in kept] == [1] * 5


def test_redirect_is_not_followed(server: Server, compare: Compared) -> None:
    other = Server()
    try:
        server.behave = lambda _, __, handler: handler.send(302, "", Location=other.url)
        assert "answered 302" in compare.refused(settings(server))
        assert not other.requests
    finally:
        other.close()


def test_refused_options_are_left_out(server: Server, compare: Compared) -> None:
    def behave(prompt: str, attempt: int, handler: Any) -> str | None:
        body = server.requests[-1]
        if "max_tokens" in body:
            return handler.send(400, "Unsupported: 'max_tokens', use 'max_completion_tokens'")
        if "temperature" in body:
            return handler.send(400, "Unsupported value: 'temperature' does not support 0")
        return by_quality(prompt)

    server.behave = behave
    assert win_rate(compare(settings(server), num=2))["win_rate"] == 100
    assert len(server.requests) == 2 + 4
    assert server.requests[-1]["max_completion_tokens"] == 64


# Bounds, cache and threads.


def test_cached_replies_are_not_requested_again(server: Server, compare: Compared) -> None:
    """Wherever the model is served; another model is another judge."""
    server.behave = by_quality
    first = compare(settings(server))
    assert len(server.requests) == 12
    assert compare(settings(server, url=server.url + "/")) == first and len(server.requests) == 12
    with (compare.folder / "requests.jsonl").open("a") as file:
        file.write('{"request": "torn')
    compare(settings(server), num=7)
    assert len(server.requests) == 14
    compare(settings(server), num=7)
    assert len(server.requests) == 14
    compare(settings(server, model="other"))
    assert len(server.requests) == 26


@pytest.mark.parametrize("num_written", [0, 3])
def test_full_disk_ends_it(
    num_written: int, server: Server, compare: Compared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noticed where the first answer comes, or later in a thread."""
    real, left = Path.open, [None] * num_written

    def full(self: Path, mode: str = "r", **others: Any) -> Any:
        if mode == "ab" and not left:
            raise OSError(28, "No space left on device")
        if mode == "ab":
            left.pop()
        return real(self, mode, **others)

    monkeypatch.setattr(Path, "open", full)
    assert "requests.jsonl cannot be written: No space" in compare.refused(settings(server))


def test_ctrl_c_keeps_replies(
    server: Server, compare: Compared, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.behave = by_quality
    config = settings(server, num_parallel=2)

    def log(line: str) -> None:
        if line.startswith("judge: 4 of"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge.compare(
            rows([f"good {i}" for i in range(10)]),
            rows([f"bad {i}" for i in range(10)]),
            config,
            compare.folder,
            log,
        )
    sent = len(server.requests)
    assert sent < 20
    kept = len((compare.folder / "requests.jsonl").read_text().splitlines())
    assert kept >= 4
    assert win_rate(compare(config, num=10))["win_rate"] == 100
    assert max(server.attempts.values()) <= 2 and sum(server.attempts.values()) <= 20 + 2


def test_num_parallel_requests_are_under_way(server: Server, compare: Compared) -> None:
    together = threading.Barrier(3, timeout=20)

    def behave(prompt: str, attempt: int, handler: Any) -> str:
        if len(server.requests) > 1:  # the first goes alone
            together.wait()
        return by_quality(prompt)

    server.behave = behave
    assert len(compare(settings(server, num_parallel=3), num=5)) == 5  # 1 + 9 requests
    assert server.most_at_once == 3


def test_cost_above_a_limit_is_refused_before_a_request(server: Server, compare: Compared) -> None:
    """2 x 3 requests of a little over 1,000 tokens in and at most 64 out."""
    long = {"ours": rows(["good " * 400] * 3), "theirs": rows(["bad " * 300] * 3)}
    prices = {"dollars_per_million_input": 100.0, "dollars_per_million_output": 1000.0}
    text = compare.refused(settings(server, max_dollars=1.0, **prices), **long)
    size = len(judge._prompts(long["ours"][0], long["theirs"][0])[0])
    dollars = 6 * (100 * (size / 3.5 + 10) + 1000 * 64) / 1e6
    assert f"about ${dollars:.2f}, and judge.max_dollars=1:" in text and 0.7 < dollars < 1.5
    assert "6 needed" not in text and not server.requests
    assert "5: raise it" in compare.refused(settings(server, max_requests=5), **long)
    assert not server.requests
    server.behave = by_quality
    compare(settings(server, max_dollars=dollars + 0.01, max_requests=6, **prices), **long)
    assert f"about ${dollars:.2f}" in compare.lines[-3] + compare.lines[-8]
    assert "600 tokens in and 60 out, $0.12" in compare.lines[-1]


def test_limits_hold_while_requests_are_sent(
    server: Server, compare: Compared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The endpoint counts more tokens than estimated (100 a request), retries more requests."""
    server.behave = by_quality
    prices = {"dollars_per_million_input": 0.0, "dollars_per_million_output": 1e5}  # $1 an answer
    config = settings(server, max_answer_tokens=1, max_dollars=3.0, num_parallel=1, **prices)
    assert "judge.max_dollars=3 are spent" in compare.refused(config)
    assert len(server.requests) == 3
    server.behave = lambda _, attempt, handler: handler.send(500, "no")
    config = settings(server, model="x", max_requests=12, max_retries=12)
    monkeypatch.setattr(endpoint, "BACKOFF_SECONDS", 0.0)
    assert "judge.max_requests=12 are spent" in compare.refused(config)
    assert len(server.requests) == 3 + 12


# The key.


def test_the_key_is_sent_and_never_written(
    server: Server,
    compare: Compared,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Though this endpoint quotes it in its answers and in its errors."""
    caplog.set_level(logging.DEBUG)

    def behave(prompt: str, attempt: int, handler: Any) -> str | None:
        if attempt == 1:
            return handler.send(500, f"{'x' * 190} {KEY}")  # across the end of what is shown
        if "question 2" in prompt:
            return handler.send(400, f"you sent {KEY}")
        if "question 3" in prompt and attempt == 2:
            return handler.send(200, f"{'x' * 70} {KEY}")
        return f"You are {KEY}.\nBetter: A"

    server.behave = behave
    compare(settings(server), num=4)
    assert {sent["Authorization"] for sent in server.headers} == {f"Bearer {KEY}"}
    written = [path.read_text() for path in compare.folder.rglob("*") if path.is_file()]
    everything = "".join([*written, *compare.lines, *capfd.readouterr(), caplog.text])
    assert "You are ***." in everything and "you sent ***" in everything
    assert KEY not in everything and KEY[:8] not in everything


def test_missing_or_malformed_key_is_refused(
    server: Server, compare: Compared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", " \n")
    assert "environment variable JUDGE_KEY" in compare.refused(settings(server))
    monkeypatch.setenv("JUDGE_KEY", f"{KEY}\nHeader:1")  # a library would quote it
    assert "JUDGE_KEY holds characters that no key has" in compare.refused(settings(server))
    assert not server.requests
    server.behave = by_quality
    compare(settings(server, key_variable=None), num=1)
    assert "Authorization" not in server.headers[0]


# The alpaca_eval package.


def test_missing_alpaca_eval_package_is_named(
    compare: Compared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "alpaca_eval", None)
    monkeypatch.setitem(sys.modules, "alpaca_eval.annotators", None)
    text = compare.refused(JudgeConfig(annotator="alpaca_eval_gpt4"))
    assert "pip install 'neftune-dist[alpaca-eval]'" in text


def test_annotators_of_alpaca_eval_1_and_2(tmp_path: Path) -> None:
    """Through the package itself and its OpenAI client, against the local server, in a process of
    its own: the package reads the environment once. It asks in one order, drawn by a hash: 1 ranks
    the answers, 2 reads the probability of a token."""
    pytest.importorskip("alpaca_eval", reason="alpaca_eval is not installed")
    server = Server()

    def behave(prompt: str, attempt: int, handler: Any) -> str | None:
        good_first = prompt.index("good") < prompt.index("bad")
        if "question 3" in prompt:
            return "none of them"
        if server.requests[-1].get("logprobs"):
            tokens = zip("mM", (0.8, 0.2) if good_first else (0.2, 0.8), strict=True)
            top = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in tokens]
            logprobs = {"content": [{**top[0], "top_logprobs": top}]}
            return handler.answer("m", logprobs=logprobs)
        ranks = (1, 2) if good_first else (2, 1)
        return str([{"model": f"model_{i + 1}", "rank": rank} for i, rank in enumerate(ranks)])

    server.behave = behave
    script = """
from pathlib import Path
from neftune_dist.config import JudgeConfig, UserError
from neftune_dist.evaluation.judge import compare
from neftune_dist.evaluation.win_rate import win_rate
ours = [{"instruction": f"question {i}", "output": f"good {i}"} for i in range(5)]
theirs = [{"instruction": f"question {i}", "output": f"bad {i}"} for i in range(5)]
theirs[4]["output"] = ours[4]["output"]
one, two = "alpaca_eval_gpt4", "weighted_alpaca_eval_gpt4_turbo"
for annotator in (one, one, two, "alpaca_eval_gpt5"):
    config = JudgeConfig(annotator=annotator, num_parallel=1)
    try:
        found = compare(ours, theirs, config, Path(annotator), print)
        print([j.preference and round(j.preference, 3) for j in found], win_rate(found))
    except UserError as error:
        print(error)
"""
    environment = {
        "OPENAI_API_KEY": KEY,
        "OPENAI_API_BASE": server.url,
        "PYTHONPATH": ":".join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    server.close()
    said = done.stdout + done.stderr
    assert done.stdout.count("[2.0, 2.0, 2.0, None, 1.5] {'win_rate': 87.5") == 2, said
    assert "[1.8, 1.8, 1.8, None, 1.5] {'win_rate': 72.5" in done.stdout, said
    assert "alpaca_eval_gpt5 is none of alpaca_eval's" in done.stdout
    assert len(server.requests) == 4 + 4  # none the second time: from its cache
    metrics = json.loads((tmp_path / "alpaca_eval_gpt4" / "alpaca_eval.json").read_text())
    assert metrics["win_rate"] == 87.5 and metrics["n_total"] == 4
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert KEY not in "".join([*written, said])

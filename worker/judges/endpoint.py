"""A judge behind OpenAI's chat completions: it is asked until it has answered, and never twice the same.

429                                              →  again, later, as long as any question is answered
5xx, no connection, an answer that is none       →  the same; one that goes on failing while others are answered, or
                                                    that is left alone, stays without an answer
400, 413, 422: a refusal of one question         →  that one stays without an answer
every other refusal, or nothing but refusals     →  `JudgeFailed`: the evaluation fails, and says why
"""

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import httpx2
import orjson

from app import __version__
from app.evaluations.service import PRIVATE
from app.outbound_http import HostRefused, find, new_client
from app.spec.evaluation import Endpoint

TIMEOUT_SECONDS = 300.0
"""For one answer: those who think before they say anything take minutes."""
PATIENCE_SECONDS = 900.0
"""Without any answer to any question, after which it is no use. Some requests may be lost and sent again by then."""
MAX_WAIT_SECONDS = 60.0
GARBLED_TRIES = 5
FAILED_TRIES = 8
"""Of one question, others being answered before each, after which it is the question's fault."""
MOST_GIVEN_UP = 3
"""Questions that were left alone and failed, one after the other; then it is the judge."""
MOST_REFUSED = 5
"""Questions before any answer, after which it is how we ask."""
MAX_ANSWER_BYTES = 4 << 20
MAX_SAID = 16_384
"""Of an answer so many characters are kept, the last ones: the verdict is at its end."""
GRACE_SECONDS = 10.0
"""For the answers that are under way when the asking is broken off: they are paid for."""
KEEP_SECONDS = 1.0


class JudgeFailed(Exception):
    """The judge gives no answers: `code` and a message for the user."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Answer:
    """What the judge said to one question (None: nothing that can be used) and the tokens that it counted."""

    text: str | None
    input_tokens: int = 0
    output_tokens: int = 0


def key_of(question: str) -> str:
    """The name under which a question's answer is kept."""
    return sha256(question.encode()).hexdigest()


class _Again(Exception):
    """The request may do better later: in `after` seconds, where the server says when."""

    def __init__(self, reason: str, after: float | None = None, garbled: bool = False, busy: bool = False) -> None:
        super().__init__(reason)
        self.after, self.garbled, self.busy = after, garbled, busy


class Asker:
    """Asks one endpoint, several questions at a time."""

    def __init__(self, endpoint: Endpoint, key: str | None, private_hosts: tuple[str, ...]) -> None:
        self.endpoint, self._key, self.private_hosts = endpoint, key, private_hosts
        self.headers = {"Content-Type": "application/json", "User-Agent": f"dpo-service/{__version__}"}
        if key is not None:
            self.headers["Authorization"] = f"Bearer {key}"
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._answered, self._refused, self._quiet_until, self._last_answer = 0, 0, 0.0, time.monotonic()
        self._under_way, self._given_up = 0, 0

    def ask_all(
        self,
        questions: Iterator[str],
        known: dict[str, Answer],
        keep: Callable[[dict[str, Answer]], None],
        tick: Callable[[], None],
    ) -> dict[str, Answer]:
        """The answers to all `questions` by their key, those that are `known` among them.

        `keep` gets new ones as they come. What `tick` raises breaks the asking off; what is under way then is
        waited for a little and kept. Raises `JudgeFailed`.
        """
        found, fresh, kept = dict(known), dict[str, Answer](), time.monotonic()  # `fresh` is to be kept yet
        pending: dict[Future[Answer], str] = {}
        self._answered, more = sum(answer.text is not None for answer in known.values()), True
        with new_client(TIMEOUT_SECONDS) as self._client:
            pool = ThreadPoolExecutor(self.endpoint.concurrency, thread_name_prefix="judge")
            try:
                while more or pending:
                    while more and len(pending) < self.endpoint.concurrency:
                        question = next(questions, None)
                        more = question is not None
                        if question is None or (key := key_of(question)) in found or key in pending.values():
                            continue
                        pending[pool.submit(self._ask, question)] = key
                    new, wrong = self._collect(pending, 0.25)
                    found.update(new)
                    fresh |= new
                    if wrong is not None:
                        raise wrong
                    if fresh and time.monotonic() - kept > KEEP_SECONDS:
                        keep(fresh)
                        fresh, kept = {}, time.monotonic()
                    tick()
            except BaseException:
                self._stopping.set()
                deadline = time.monotonic() + GRACE_SECONDS
                while pending and time.monotonic() < deadline:
                    fresh |= self._collect(pending, 0.25)[0]
                raise
            finally:
                self._stopping.set()
                if fresh:
                    keep(fresh)
                # Nobody waits for what is still under way: its threads end with their requests.
                pool.shutdown(wait=False, cancel_futures=True)
        return found

    @staticmethod
    def _collect(
        pending: "dict[Future[Answer], str]", seconds: float
    ) -> tuple[dict[str, Answer], BaseException | None]:
        """(the answers that came within `seconds`, what went wrong with others)"""
        found, wrong = dict[str, Answer](), None
        for future in wait(pending, seconds, return_when=FIRST_COMPLETED).done:
            key, error = pending.pop(future), future.exception()
            if error is None:
                found[key] = future.result()
            wrong = wrong or error
        return found, wrong

    def _ask(self, question: str) -> Answer:
        """One question, until it is answered."""
        with self._lock:
            self._under_way += 1
        try:
            return self._insist(question)
        finally:
            with self._lock:
                self._under_way -= 1

    def _insist(self, question: str) -> Answer:
        tries, garbled, failed, answered = 0, 0, 0, self._answered
        while True:
            self._wait_until(self._quiet_until)
            if self._stopping.is_set():
                raise JudgeFailed("judge_unavailable", "the asking was broken off")
            try:
                answer = self._post(question)
            except _Again as again:
                tries, garbled = tries + 1, garbled + again.garbled
                failed += self._answered > answered and not again.busy  # where nobody is answered it is the server
                answered = self._answered
                if garbled >= GARBLED_TRIES:
                    if not self._answered:
                        raise JudgeFailed("judge_refused", f"The judge has answered nothing: {again}.") from None
                    return Answer(None)
                if failed >= FAILED_TRIES:
                    return Answer(None)
                with self._lock:
                    silent = time.monotonic() - self._last_answer
                    if silent > PATIENCE_SECONDS:
                        if self._answered and self._under_way == 1 and self._given_up < MOST_GIVEN_UP:
                            self._given_up, self._last_answer = self._given_up + 1, time.monotonic()
                            return Answer(None)
                        message = f"The judge has given no answer for {silent / 60:.0f} minutes: {again}."
                        raise JudgeFailed("judge_unavailable", message) from None
                    pause = min(MAX_WAIT_SECONDS, 0.5 * 2 ** min(tries - 1, 7) * random.uniform(0.5, 1.0))  # noqa: S311
                    if again.after is not None:  # the server speaks for all that is sent to it
                        pause = min(MAX_WAIT_SECONDS, max(pause, again.after))
                        self._quiet_until = max(self._quiet_until, time.monotonic() + pause)
                self._wait_until(time.monotonic() + pause)
            else:
                with self._lock:
                    self._answered += answer.text is not None
                    self._last_answer, self._given_up = time.monotonic(), 0
                return answer

    def _wait_until(self, moment: float) -> None:
        while (left := moment - time.monotonic()) > 0 and not self._stopping.wait(left):
            pass

    def _post(self, question: str) -> Answer:
        body = {
            **self.endpoint.parameters,
            "model": self.endpoint.model,
            "messages": [{"role": "user", "content": question}],
        }
        try:
            target = find(f"{self.endpoint.base_url.rstrip('/')}/chat/completions", self.private_hosts, PRIVATE)
        except HostRefused as refused:
            if "resolved" in str(refused):  # a name server may be away
                raise _Again(str(refused)) from None
            raise JudgeFailed("judge_refused", f"The judge cannot be asked: {refused}.") from None
        try:
            answer, content = self._send(target.post(self._client, orjson.dumps(body), self.headers))
        except (httpx2.HTTPError, OSError, RuntimeError) as error:
            raise _Again(f"{type(error).__name__}: {error}"[:300]) from None
        if answer.status_code == 200:
            return _read(content)
        said = f"it answered {answer.status_code}: {self._problem(content)}"
        if answer.status_code in (408, 409, 425, 429) or answer.status_code >= 500:
            after = _seconds(answer.headers.get("retry-after"))
            raise _Again(said, after, busy=answer.status_code == 429 or after is not None)
        with self._lock:
            self._refused += 1
            hopeless = self._refused >= MOST_REFUSED and not self._answered
        if answer.status_code not in (400, 413, 422) or hopeless:
            raise JudgeFailed("judge_refused", f"The judge refuses what it is asked: {said}")
        return Answer(None)  # this question: too long for it, or nothing that it would talk about

    def _problem(self, content: bytes) -> str:
        """What an error's body says, for people, without the key."""
        try:
            said = str(orjson.loads(content)["error"]["message"])
        except (orjson.JSONDecodeError, LookupError, TypeError):
            said = content[:1000].decode(errors="replace")
        return (said.replace(self._key, "…") if self._key else said)[:300]

    def _send(self, request: httpx2.Request) -> tuple[httpx2.Response, bytes]:
        began, answer, content = time.monotonic(), self._client.send(request, stream=True), b""
        try:
            for chunk in answer.iter_bytes():
                content += chunk
                if len(content) > MAX_ANSWER_BYTES:
                    raise _Again("its answer is too long", garbled=True)
                if time.monotonic() - began > TIMEOUT_SECONDS:
                    raise _Again("its answer does not end", garbled=True)
        finally:
            answer.close()
        return answer, content


def _read(content: bytes) -> Answer:
    """An answer in the chat completions' format. Raises `_Again` for another one."""
    try:
        found: dict[str, Any] = orjson.loads(content)
        text = found["choices"][0]["message"]["content"]
        usage = found.get("usage") or {}
        counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
    except (orjson.JSONDecodeError, LookupError, TypeError, AttributeError, ValueError):
        raise _Again("its answer is not a chat completion", garbled=True) from None
    return Answer(text[-MAX_SAID:] if isinstance(text, str) else None, *counts)


def _seconds(retry_after: str | None) -> float | None:
    try:
        return None if retry_after is None else float(retry_after)
    except ValueError:  # a date: wait as if it had said nothing
        return None

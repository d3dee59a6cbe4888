"""A server with OpenAI's chat completions API. A question is repeated until it has an answer, and then never again.

429                                          →  retry later, as long as the server answers any question
5xx, no connection, an unusable response     →  retry later too. A question that keeps failing, while others are
                                                answered or as the last one, stays without an answer
400, 413, 422: one question is refused       →  this question stays without an answer
any other refusal, or nothing but refusals   →  `EndpointFailed`: the job fails with the reason
"""

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Literal

import httpx2
import orjson

from app import __version__
from app.jobs.sides import PRIVATE_JUDGES_SETTING
from app.outbound_http import HostRefused, new_client, resolve
from app.spec.evaluation import Endpoint
from app.spec.json_types import JsonObject

TIMEOUT_SECONDS = 300.0
"""Time limit of one answer. A model that reasons first may take minutes."""
PATIENCE_SECONDS = 900.0
"""Time without an answer to any question after which the server has failed. It allows for several lost requests."""
MAX_WAIT_SECONDS = 60.0
"""The longest pause before a retry."""
MAX_UNUSABLE = 5
"""Number of unusable responses to a question after which it stays without an answer."""
MAX_FAILED = 8
"""Number of failures of a question, with answers to others in between, after which it stays without an answer."""
MAX_GIVEN_UP = 3
"""Number of questions in a row that may fail while no other is under way. After that, the server has failed."""
MAX_REFUSED = 5
"""Number of refused questions, without any answer, after which the server has failed."""
MAX_ANSWER_BYTES = 4 << 20
MAX_VERDICT_CHARACTERS = 16_384
"""Number of characters of a judge's answer that are kept. They are the last ones: the verdict is at the end."""
GRACE_SECONDS = 10.0
"""Time to wait for answers under way after a failure or a stop. They are paid for."""
KEEP_SECONDS = 1.0
"""Interval at which new answers are handed over."""


class EndpointFailed(Exception):
    """The endpoint gives no answers. It has an error `code` and a message for the user.

    `field` is the field of the endpoint that is at fault, if one is.
    """

    def __init__(self, code: str, message: str, field: str = "") -> None:
        super().__init__(message)
        self.code, self._field = code, field

    def param(self, endpoint: str) -> str:
        """The path of the field at fault. `endpoint` is that of the endpoint."""
        return f"{endpoint}.{self._field}" if self._field else endpoint


@dataclass(frozen=True)
class Answer:
    """The answer to one question (None without a usable one) and the tokens that the server reported.

    `ended`: the answer was not cut at the maximum of tokens.
    """

    text: str | None
    input_tokens: int = 0
    output_tokens: int = 0
    ended: bool = True


@dataclass(frozen=True)
class Question:
    """A conversation that the endpoint is asked to continue. `key` is the key of its answer.

    `fields` are further fields of its request. The endpoint's own parameters replace them.
    """

    key: str
    messages: Sequence[JsonObject]
    fields: JsonObject = field(default_factory=dict)

    @classmethod
    def of_text(cls, text: str) -> "Question":
        """A question in one message. It is asked once, whoever asks it."""
        return cls(sha256(text.encode()).hexdigest(), [{"role": "user", "content": text}])

    @classmethod
    def of_prompt(cls, messages: Sequence[JsonObject], fields: JsonObject, which: str) -> "Question":
        """A prompt to be answered. `which` tells apart the answers that are asked for."""
        identity = orjson.dumps([messages, fields, which], option=orjson.OPT_SORT_KEYS)
        return cls(sha256(identity).hexdigest(), messages, fields)


Role = Literal["judge", "writer"]
"""The role of an endpoint. Messages and error codes name it so."""
CODES: dict[Role, tuple[str, str]] = {
    "judge": ("judge_refused", "judge_unavailable"),
    "writer": ("writer_refused", "writer_unavailable"),
}
"""The error codes of an endpoint that refuses, and of one that does not answer."""


class _Retry(Exception):
    """A request failed but may succeed later: after `after` seconds, if the server says when.

    `unusable`: the server answered, but not with a chat completion. `busy`: the server is overloaded.
    """

    def __init__(self, reason: str, after: float | None = None, unusable: bool = False, busy: bool = False) -> None:
        super().__init__(reason)
        self.after, self.unusable, self.busy = after, unusable, busy


class EndpointClient:
    """Asks one endpoint several questions at a time."""

    def __init__(self, endpoint: Endpoint, key: str | None, private_hosts: tuple[str, ...], role: Role) -> None:
        self.endpoint, self._key, self.private_hosts, self.role = endpoint, key, private_hosts, role
        self.headers = {"Content-Type": "application/json", "User-Agent": f"dpo-service/{__version__}"}
        if key is not None:
            self.headers["Authorization"] = f"Bearer {key}"
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._answered, self._refused, self._quiet_until, self._last_answer = 0, 0, 0.0, time.monotonic()
        self._under_way, self._given_up = 0, 0

    def ask_all(
        self,
        questions: Iterator[Question],
        known: dict[str, Answer],
        keep: Callable[[dict[str, Answer]], None],
        check_stop: Callable[[], None],
    ) -> dict[str, Answer]:
        """The answers to all `questions` by key. Answers that are `known` are included and not asked for again.

        `keep` is called with new answers as they come. `check_stop` is called several times a second and may raise to
        stop. Answers under way are then kept too, if they come within `GRACE_SECONDS`. Raises `EndpointFailed`.
        """
        answers, fresh, kept_at = dict(known), dict[str, Answer](), time.monotonic()  # `fresh`: not yet kept
        pending: dict[Future[Answer], str] = {}
        self._answered, more = sum(answer.text is not None for answer in known.values()), True
        with new_client(TIMEOUT_SECONDS) as self._client:
            pool = ThreadPoolExecutor(self.endpoint.concurrency, thread_name_prefix=self.role)
            try:
                while more or pending:
                    while more and len(pending) < self.endpoint.concurrency:
                        question = next(questions, None)
                        more = question is not None
                        if question is None or question.key in answers or question.key in pending.values():
                            continue
                        pending[pool.submit(self._ask, question)] = question.key
                    new, error = self._collect(pending, 0.25)
                    answers.update(new)
                    fresh |= new
                    if error is not None:
                        raise error
                    if fresh and time.monotonic() - kept_at > KEEP_SECONDS:
                        keep(fresh)
                        fresh, kept_at = {}, time.monotonic()
                    check_stop()
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
                # Requests that are still under way are not waited for. Their threads end with them.
                pool.shutdown(wait=False, cancel_futures=True)
        return answers

    @staticmethod
    def _collect(
        pending: "dict[Future[Answer], str]", seconds: float
    ) -> tuple[dict[str, Answer], BaseException | None]:
        """(answers that come within `seconds`, the first error). Both leave `pending`."""
        answers, first_error = dict[str, Answer](), None
        for future in wait(pending, seconds, return_when=FIRST_COMPLETED).done:
            key, error = pending.pop(future), future.exception()
            if error is None:
                answers[key] = future.result()
            first_error = first_error or error
        return answers, first_error

    def _ask(self, question: Question) -> Answer:
        """Ask one question until it has an answer or is given up."""
        with self._lock:
            self._under_way += 1
        try:
            return self._ask_until_answered(question)
        finally:
            with self._lock:
                self._under_way -= 1

    def _ask_until_answered(self, question: Question) -> Answer:
        tries, unusable, failed, answered = 0, 0, 0, self._answered
        while True:
            self._wait_until(self._quiet_until)
            if self._stopping.is_set():
                raise self._is_away("was asked no further")
            try:
                answer = self._post(question)
            except _Retry as retry:
                tries, unusable = tries + 1, unusable + retry.unusable
                failed += self._answered > answered and not retry.busy  # without other answers, the server is at fault
                answered = self._answered
                if unusable >= MAX_UNUSABLE:
                    if not self._answered:
                        raise self._refuses(f"has answered nothing: {retry}") from None
                    return Answer(None)
                if failed >= MAX_FAILED:
                    return Answer(None)
                with self._lock:
                    silent = time.monotonic() - self._last_answer
                    if silent > PATIENCE_SECONDS:
                        if self._answered and self._under_way == 1 and self._given_up < MAX_GIVEN_UP:
                            self._given_up, self._last_answer = self._given_up + 1, time.monotonic()
                            return Answer(None)
                        reason = f"has given no answer for {silent / 60:.0f} minutes: {retry}"
                        raise self._is_away(reason) from None
                    pause = min(MAX_WAIT_SECONDS, 0.5 * 2 ** min(tries - 1, 7) * random.uniform(0.5, 1.0))  # noqa: S311
                    if retry.after is not None:  # the server's pause applies to all questions
                        pause = min(MAX_WAIT_SECONDS, max(pause, retry.after))
                        self._quiet_until = max(self._quiet_until, time.monotonic() + pause)
                self._wait_until(time.monotonic() + pause)
            else:
                with self._lock:
                    self._answered += answer.text is not None
                    self._last_answer, self._given_up = time.monotonic(), 0
                return answer

    def _wait_until(self, moment: float) -> None:
        """Wait until `moment` of the monotonic clock, or until the client stops."""
        while (seconds := moment - time.monotonic()) > 0 and not self._stopping.wait(seconds):
            pass

    def _post(self, question: Question) -> Answer:
        """Send one request. Raises `_Retry` or `EndpointFailed`."""
        fields = {**question.fields, **self.endpoint.parameters}
        if self.role == "writer":  # null leaves a field out
            fields = {name: value for name, value in fields.items() if value is not None}
        body = {**fields, "model": self.endpoint.model, "messages": question.messages}
        try:
            url = f"{self.endpoint.base_url.rstrip('/')}/chat/completions"
            target = resolve(url, self.private_hosts, PRIVATE_JUDGES_SETTING)
        except HostRefused as refused:
            if refused.unknown:  # the name server may be unreachable
                raise _Retry(str(refused)) from None
            raise self._refuses(f"cannot be asked: {refused}") from None
        try:
            response, content = self._send(target.post(self._client, orjson.dumps(body), self.headers))
        except (httpx2.HTTPError, OSError, RuntimeError) as error:
            raise _Retry(f"{type(error).__name__}: {error}"[:300]) from None
        status = response.status_code
        if status == 200:
            return _read(content, MAX_VERDICT_CHARACTERS if self.role == "judge" else None)
        reason = f"it answered {status}: {self._error_message(content)}"
        if status in (408, 409, 425, 429) or status >= 500:
            after = _seconds(response.headers.get("retry-after"))
            raise _Retry(reason, after, busy=status == 429 or after is not None)
        with self._lock:
            self._refused += 1
            refuses_all = self._refused >= MAX_REFUSED and not self._answered
        if status not in (400, 413, 422) or refuses_all:
            raise self._refuses(f"refuses the questions: {reason}")
        return Answer(None)  # only this question is refused: it may be too long, or its topic unwanted

    def _refuses(self, reason: str) -> EndpointFailed:
        return EndpointFailed(CODES[self.role][0], f"The {self.role} {reason.removesuffix('.')}.")

    def _is_away(self, reason: str) -> EndpointFailed:
        return EndpointFailed(CODES[self.role][1], f"The {self.role} {reason.removesuffix('.')}.")

    def _error_message(self, content: bytes) -> str:
        """The message in the body of an error response. The API key is removed from it."""
        try:
            message = str(orjson.loads(content)["error"]["message"])
        except (orjson.JSONDecodeError, LookupError, TypeError):
            message = content[:1000].decode(errors="replace")
        return (message.replace(self._key, "…") if self._key else message)[:300]

    def _send(self, request: httpx2.Request) -> tuple[httpx2.Response, bytes]:
        began, response, content = time.monotonic(), self._client.send(request, stream=True), b""
        try:
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > MAX_ANSWER_BYTES:
                    raise _Retry("its answer is too long", unusable=True)
                if time.monotonic() - began > TIMEOUT_SECONDS:
                    raise _Retry("its answer does not end", unusable=True)
        finally:
            response.close()
        return response, content


def _read(content: bytes, last: int | None) -> Answer:
    """Read a chat completion, of whose text the `last` characters count. Raises `_Retry` for any other content."""
    try:
        completion: JsonObject = orjson.loads(content)
        choice = completion["choices"][0]
        text, ended = choice["message"]["content"], choice.get("finish_reason") != "length"
        usage = completion.get("usage") or {}
        counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
    except (orjson.JSONDecodeError, LookupError, TypeError, AttributeError, ValueError):
        raise _Retry("its answer is not a chat completion", unusable=True) from None
    return Answer(text[-last if last else 0 :] if isinstance(text, str) else None, counts[0], counts[1], ended)


def _seconds(retry_after: str | None) -> float | None:
    """The seconds of a `Retry-After` header; None without one, or if it holds a date."""
    try:
        return None if retry_after is None else float(retry_after)
    except ValueError:
        return None

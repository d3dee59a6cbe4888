"""A judge for tests: a real HTTP server that speaks chat completions, with faults on request."""

import json
import re
import socket
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[str, str, str], str]
"""(question, answer A, answer B) → the judge's reply."""
_ANSWERS = re.compile(r"(?:Response|Summary) A:\n(.*)\n\n(?:Response|Summary) B:\n(.*)\n\nFIRST", re.DOTALL)


def prefer_longer(_question: str, answer_a: str, answer_b: str) -> str:
    """The reply of a judge that prefers the longer answer."""
    return f"Comparison: one is longer.\nMore helpful: {'A' if len(answer_a) > len(answer_b) else 'B'}"


def prefer_first(_question: str, _answer_a: str, _answer_b: str) -> str:
    """The reply of a judge that prefers the answer it reads first."""
    return "Preferred: A"


class JudgeServer(ThreadingHTTPServer):
    """Answers with `reply`. The first requests for a question get the `faults` instead, one after another.

    About one question in `every` gets the faults. With `only`, no other question gets them.
    """

    daemon_threads = True

    def __init__(
        self,
        reply: Reply = prefer_longer,
        faults: tuple[str, ...] = (),
        key: str | None = None,
        every: int = 1,
        only: str | None = None,
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply, self.faults, self.key, self.every = reply, faults, key, every
        self.only = only
        self.credit: int | None = None
        """The number of answers that the account pays for. After them the server answers 402. None: no limit."""
        self.requests: Counter[str] = Counter()
        """Requests by question."""
        self.answered: Counter[str] = Counter()
        """Paid answers by question."""
        self.bodies: list[dict[str, Any]] = []
        """The bodies of all requests, in order."""
        self.delay = 0.0
        """Seconds that each request takes."""
        self.lock, self.in_flight, self.max_in_flight = threading.Lock(), 0, 0

    @property
    def url(self) -> str:
        return f"http://localhost:{self.server_address[1]}/v1"

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing: tests kill clients on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: JudgeServer

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            self._answer(404, {"error": {"message": "no such path"}})
            return
        question = body["messages"][0]["content"]
        with server.lock:
            earlier_requests = server.requests[question]
            server.requests[question] += 1
            server.bodies.append(body)
            server.in_flight += 1
            server.max_in_flight = max(server.in_flight, server.max_in_flight)
        try:
            time.sleep(server.delay)
            faulty = earlier_requests < len(server.faults) and zlib.crc32(question.encode()) % server.every == 0
            fault = server.faults[earlier_requests] if faulty and server.only in (None, question) else None
            if server.key is not None and self.headers.get("Authorization") != f"Bearer {server.key}":
                authorization = self.headers.get("Authorization")
                self._answer(401, {"error": {"message": f"wrong key: {authorization}"}})
            elif server.credit is not None and sum(server.answered.values()) >= server.credit:
                self._answer(402, {"error": {"message": "pay first"}})
            elif fault == "rate limit":
                self._answer(429, {"error": {"message": "slow down"}}, {"Retry-After": "0.01"})
            elif fault == "error":
                self._answer(500, {"error": {"message": "an error"}})
            elif fault == "refuse":
                self._answer(400, {"error": {"message": "I will not talk about this"}})
            elif fault == "no credit":
                self._answer(402, {"error": {"message": "pay first"}})
            elif fault == "not json":
                self._answer(200, b"<html>a proxy says hello</html>")
            elif fault == "no choices":
                self._answer(200, {"object": "list", "data": [1]})
            elif fault == "hang up":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            elif fault == "half":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"choices": [')
                self.close_connection = True
            else:
                with server.lock:
                    server.answered[question] += 1
                match = _ANSWERS.search(question)
                text = "no words" if fault == "babble" else server.reply(question, *(match.groups() if match else "ab"))
                usage = {"prompt_tokens": len(question.split()), "completion_tokens": len(text.split())}
                message = {"role": "assistant", "content": text}
                self._answer(200, {"choices": [{"index": 0, "message": message}], "usage": usage})
        finally:
            with server.lock:
                server.in_flight -= 1

    def _answer(self, status: int, body: dict[str, Any] | bytes, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def running_judge(*arguments: Any, **options: Any) -> Iterator[JudgeServer]:
    """A running `JudgeServer`."""
    with JudgeServer(*arguments, **options) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()

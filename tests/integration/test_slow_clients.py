"""Clients that send half a request and wait. They keep nobody out."""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx2
import pytest

from app import connections
from app.services import Services
from app.settings import Settings
from tests.helpers.api import served
from tests.helpers.servers import CEILING

HALF = b"GET /healthz HTTP/1.1\r\nHost: local"


def is_closed(connection: socket.socket) -> bool:
    """Whether the server has ended a connection. Waits for it."""
    connection.settimeout(CEILING)
    try:
        return connection.recv(1000) == b""
    except ConnectionResetError:
        return True


@contextmanager
def half_requests(port: int, number: int) -> Iterator[list[socket.socket]]:
    """Connections with half a request each."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(number)]
        for half in sockets:
            half.sendall(HALF)
        yield sockets


def test_half_sent_requests_keep_nobody_out(
    services: Services, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for 50 connections, 300 half-sent requests wait. Each probe is answered."""
    monkeypatch.setattr("app.main.most_connections", lambda: 50)
    with served(settings) as (server, _, _), half_requests(server.config.port, 300) as halves:
        for _ in range(20):
            probe = httpx2.get(f"http://127.0.0.1:{server.config.port}/healthz", timeout=CEILING)
            assert probe.status_code == 200
        assert len(server.server_state.connections) <= 50
        assert is_closed(halves[0]), "the oldest make room"


def test_a_client_has_a_time_for_its_headers_and_for_each_pause_of_a_body(
    services: Services, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)
    monkeypatch.setattr(connections, "BODY_SECONDS", 0.3)
    key = settings.admin_key.encode()
    post = b"POST /v1/webhooks HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer " + key + b"\r\n"
    whole = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with served(settings) as (server, _, _):
        for stalled in (b"", HALF, post + b"Content-Length: 100\r\n\r\n{"):
            with socket.create_connection(("127.0.0.1", server.config.port)) as connection:
                connection.sendall(stalled)
                assert is_closed(connection)
        with socket.create_connection(("127.0.0.1", server.config.port)) as connection:
            for _ in range(3):  # a connection that is kept alive has no deadline between two requests
                connection.sendall(whole)
                answer = b""
                while b"}" not in answer:
                    answer += connection.recv(1000)
                assert answer.startswith(b"HTTP/1.1 200")
                time.sleep(0.5)
            connection.sendall(HALF)
            assert is_closed(connection), "nor has it for ever to send the next"


def test_a_slow_but_steady_body_is_taken(
    services: Services, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "BODY_SECONDS", 1.0)

    def slowly() -> Iterator[bytes]:
        for piece in (b'{"name": "a",', b' "projec', b't": "default"', b"}"):
            yield piece
            time.sleep(0.4)

    with served(settings) as (_, _, http):
        answer = http.post("/v1/keys", content=slowly(), headers={"Content-Type": "application/json"})
        assert answer.status_code == 200, answer.text

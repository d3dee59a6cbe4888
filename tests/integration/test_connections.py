"""Connections to a real server in this process: how they end when it stops, and how long an idle one stays open."""

import socket

import httpx2
import pytest

from app.jobs.states import Status
from app.services import Services
from app.settings import Settings
from tests.helpers.api import served
from tests.helpers.jobs import make_job
from tests.helpers.servers import CEILING


def test_a_stopped_server_ends_its_streams_at_once(settings: Settings, services: Services) -> None:
    """The requests have an hour to end, and the stream needs none of it. The client sees a whole answer."""
    job_id = make_job(services, status=Status.RUNNING)
    with served(settings, shutdown_seconds=3600) as (server, thread, client):
        with client.stream("GET", f"/v1/fine_tuning/jobs/{job_id}/stream") as answer:
            lines = answer.iter_lines()
            assert next(lines) == "event: job"
            server.should_exit = True
            assert all(line.startswith(("data: ", ":")) or not line for line in lines)
        thread.join(CEILING)
        assert not thread.is_alive()


def test_a_stopped_server_cuts_a_download_when_its_time_is_over(settings: Settings, services: Services) -> None:
    """A client that reads nothing keeps the server for no longer than the setting allows."""
    size = 50_000_000
    with served(settings, shutdown_seconds=1) as (server, thread, client):
        upload = client.post("/v1/files", files={"file": ("p.jsonl", b"x" * size)}, data={"purpose": "fine-tune"})
        with client.stream("GET", f"/v1/files/{upload.json()['id']}/content") as answer:
            server.should_exit = True
            thread.join(CEILING)
            assert not thread.is_alive()
            with pytest.raises(httpx2.TransportError):
                answer.read()


def test_an_idle_connection_is_closed_after_the_time_of_the_setting(settings: Settings, services: Services) -> None:
    with served(settings, keep_alive_seconds=1) as (_, _, client):
        url = client.base_url
        with socket.create_connection((url.host, url.port or 80), timeout=CEILING) as connection:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b"".join(iter(lambda: connection.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 200 OK") and b"connection: close" not in answer.lower()
    assert Settings().keep_alive_seconds > 60, "proxies hold idle connections for 60 seconds, and must close them first"

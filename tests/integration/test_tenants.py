"""No key reads, starves, fills or ends another: attacks, made small enough to be harmless."""

import itertools
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager

import httpx2
import pytest
from fastapi.testclient import TestClient
from httpx2 import Response
from sqlalchemy import select, update

from app import connections, counted_objects, outbound_http
from app.dashboard import session as dashboard_session
from app.database import database_now
from app.jobs import event_feed
from app.jobs import events as job_events
from app.jobs.states import Status
from app.keys import rates
from app.keys.schemas import Scope
from app.keys.tables import ApiKey
from app.main import create_app
from app.models import repository as models
from app.models.tables import Model
from app.projects import repository as projects
from app.projects import reservations
from app.projects.schemas import Limits
from app.projects.tables import Project, Reservation
from app.prune import prune
from app.services import Services
from app.settings import Settings
from app.uploads import service as uploads
from app.webhooks import repository as webhooks
from app.webhooks.tables import WebhookEndpoint
from tests.helpers.api import error_of, key_of, served
from tests.helpers.jobs import make_job
from tests.helpers.servers import CEILING
from worker.housekeeping import expire
from worker.trainer.events import Metrics
from worker.training_run import MEASURED_STEPS, is_recorded
from worker.webhooks import MAX_PER_PROJECT, _reaching

End = Callable[[Services, str], None]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def id_of(services: Services, key: str) -> str:
    caller = services.keys.identify(key)
    assert caller is not None
    return caller.key_id


def revoke(services: Services, key_id: str) -> None:
    services.keys.revoke(key_id)


def let_expire(services: Services, key_id: str) -> None:
    with services.database.write() as session:
        session.execute(update(ApiKey).where(ApiKey.id == key_id).values(expires_at=database_now() - 1))


# -- streams ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [revoke, let_expire])
def test_an_open_stream_ends_with_its_key(services: Services, settings: Settings, end: End) -> None:
    key = key_of(services, "search", Scope.READ)
    job_id, key_id = make_job(services, project="search", status=Status.QUEUED), id_of(services, key)
    with served(settings) as (_, _, http):
        path = f"/v1/fine_tuning/jobs/{job_id}/stream"
        with http.stream("GET", path, headers=bearer(key)) as stream:
            lines = stream.iter_lines()
            assert any(line.startswith("event: job") for line in lines)
            end(services, key_id)
            with services.database.write() as session:
                job_events.add(session, job_id, "a secret of later")
            assert not any("a secret of later" in line for line in lines)
        assert http.get(path, headers=bearer(key)).status_code == 401


@pytest.mark.parametrize("end", [revoke, let_expire])
def test_a_stream_token_is_worth_no_more_than_its_key(client: TestClient, services: Services, end: End) -> None:
    key = key_of(services, "search", Scope.READ)
    job_id = make_job(services, project="search", status=Status.SUCCEEDED)
    grant = client.post(f"/v1/fine_tuning/jobs/{job_id}/stream_token", headers=bearer(key)).raise_for_status().json()
    client.headers.pop("Authorization")
    assert client.get(grant["url"]).status_code == 200
    end(services, id_of(services, key))
    assert error_of(client.get(grant["url"]), 401)["code"] == "invalid_stream_token"


def test_a_key_has_a_bounded_number_of_open_streams(
    services: Services, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_feed, "MAX_STREAMS", 2)
    key, other = key_of(services, "search", Scope.READ), key_of(services, "search", Scope.READ)
    job_id = make_job(services, project="search", status=Status.QUEUED)
    with served(settings) as (_, _, http):
        path = f"/v1/fine_tuning/jobs/{job_id}/stream"
        with (
            http.stream("GET", path, headers=bearer(key)) as first,
            http.stream("GET", path, headers=bearer(key)) as second,
        ):
            open_streams = [stream.iter_lines() for stream in (first, second)]
            assert all(next(lines) for lines in open_streams)
            refused = http.get(path, headers=bearer(key))
            assert error_of(refused, 429)["code"] == "too_many_streams" and refused.headers["retry-after"]
            with http.stream("GET", path, headers=bearer(other)) as third:
                assert third.status_code == 200


# -- keys and sessions --------------------------------------------------------------------------------------------


def test_wrong_keys_are_slowed_down_and_right_ones_are_not(
    client: TestClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come from one address, as behind a proxy."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr("app.keys.rates.asyncio.sleep", sleep)
    for _ in range(rates.FAILURES_PER_MINUTE):
        assert client.get("/v1/files", headers=bearer("dpo_guess")).status_code == 401
    assert not slept
    assert client.get("/v1/files", headers=bearer("dpo_guess")).status_code == 401
    assert client.post("/dashboard/login", data={"key": "dpo_guess"}).status_code == 401
    assert slept == [rates.SLOW_SECONDS] * 2
    assert client.get("/v1/files", headers=bearer(key_of(services, "search"))).status_code == 200
    assert slept == [rates.SLOW_SECONDS] * 2


def test_a_session_of_the_dashboard_counts_in_the_rate_of_its_key(services: Services) -> None:
    settings = services.settings.model_copy(update={"rate_limit": 5})
    key = key_of(services, "search", Scope.READ)
    with TestClient(create_app(settings), "http://localhost") as client:
        client.post("/dashboard/login", data={"key": key}, follow_redirects=False)
        answers = [client.get("/dashboard").status_code for _ in range(4)]
        answers += [client.get("/v1/files", headers=bearer(key)).status_code for _ in range(2)]
        assert answers == [200] * 5 + [429]
        assert client.get("/dashboard").status_code == 429


def test_a_session_ends_on_the_server_after_its_time(
    client: TestClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cookie that somebody has copied does not end with the browser's."""
    key = key_of(services, "search", Scope.READ)
    client.post("/dashboard/login", data={"key": key}, follow_redirects=False)
    assert client.get("/dashboard").status_code == 200
    monkeypatch.setattr(dashboard_session, "SESSION_SECONDS", -1)
    assert client.get("/dashboard", follow_redirects=False).headers["location"].endswith("/login")


@pytest.mark.parametrize("path", ["/dashboard/login", "/dashboard/logout"])
@pytest.mark.parametrize(
    ("headers", "accepted"),
    [
        ({"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"}, False),
        ({"Sec-Fetch-Site": "same-site", "Origin": "https://other.localhost"}, False),
        ({"Origin": "https://evil.example"}, False),
        ({"Origin": "null"}, False),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "http://localhost"}, True),
        ({"Origin": "http://localhost"}, True),
        ({}, True),
    ],
)
def test_forms_of_other_sites_are_refused(
    client: TestClient, settings: Settings, path: str, headers: dict[str, str], accepted: bool
) -> None:
    answer = client.post(path, data={"key": settings.admin_key}, headers=headers, follow_redirects=False)
    if accepted:
        assert answer.status_code == 303
    else:
        assert error_of(answer, 403)["code"] == "cross_site_request" and "set-cookie" not in answer.headers


# -- what a key may learn -----------------------------------------------------------------------------------------


def test_no_project_finds_what_another_has_cached() -> None:
    name = f"tokens/{'a' * 64}/{'b' * 64}"
    mine, other = (counted_objects.key_of(project, name, shared=False) for project in ("a", "b"))
    assert mine == f"cache/tokens/a/{'a' * 64}/{'b' * 64}" and mine != other
    shared = {counted_objects.key_of(project, name, shared=True) for project in ("a", "b")}
    assert shared == {f"cache/tokens/_shared/{'a' * 64}/{'b' * 64}"}


# -- storage ------------------------------------------------------------------------------------------------------


MEGABYTE = 1_000_000


def limited(services: Services, bytes_: int) -> dict[str, str]:
    """The headers of a key of a project that may store so many bytes."""
    key = key_of(services, "search")
    services.projects.limit("search", Limits(max_storage_bytes=bytes_))
    return bearer(key)


def stored_bytes(services: Services) -> int:
    return sum(size for prefix in ("files", "uploads") for _, size in services.storage.list(prefix))


def used(services: Services) -> int:
    with services.database.read() as session:
        return projects.storage_bytes(session, "search")


@pytest.mark.parametrize("announced", [True, False], ids=["of announced size", "of unknown size"])
def test_parallel_uploads_never_store_more_than_the_limit(
    services: Services, settings: Settings, monkeypatch: pytest.MonkeyPatch, announced: bool
) -> None:
    """Eight uploads of 3 MB at once, into room for 4 MB."""
    monkeypatch.setattr(reservations, "STEP_BYTES", MEGABYTE)
    headers, received = limited(services, 4 * MEGABYTE), list[int]()
    body = (
        b'--xx\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--xx\r\n'
        b'Content-Disposition: form-data; name="file"; filename="p.jsonl"\r\n\r\n'
        + b"x" * 3 * MEGABYTE
        + b"\r\n--xx--\r\n"
    )
    headers |= {"Content-Type": "multipart/form-data; boundary=xx"}

    def send(http: httpx2.Client) -> int:
        pieces = (body[start : start + 200_000] for start in range(0, len(body), 200_000))
        content = body if announced else pieces
        return http.post("/v1/files", content=content, headers=headers).status_code

    with served(settings) as (_, _, http), ThreadPoolExecutor(8) as threads:
        received += threads.map(lambda _: send(http), range(8))
        assert set(received) <= {200, 403} and received.count(200) <= 1
        if announced:  # otherwise each may take a part of the room, and none get all that it needs
            assert received.count(200) == 1
        assert stored_bytes(services) == 3 * MEGABYTE * received.count(200) == used(services)


def test_a_body_that_is_too_large_is_refused_before_it_comes(client: TestClient, services: Services) -> None:
    headers = limited(services, MEGABYTE)
    answer = client.post(
        "/v1/files",
        files={"file": ("p.jsonl", b"x" * 2 * MEGABYTE)},
        data={"purpose": "fine-tune"},
        headers=headers,
    )
    assert error_of(answer, 403)["code"] == "storage_limit_reached"
    assert stored_bytes(services) == 0 == used(services)


def test_a_file_that_fits_exactly_is_taken(client: TestClient, services: Services) -> None:
    headers = limited(services, MEGABYTE)
    for size, status in ((MEGABYTE - 10, 200), (11, 403), (10, 200), (1, 403)):
        files = {"file": ("p.jsonl", b"x" * size)}
        answer = client.post("/v1/files", files=files, data={"purpose": "fine-tune"}, headers=headers)
        assert answer.status_code == status, answer.text
    assert used(services) == MEGABYTE


def test_a_request_that_dies_reserves_nothing_for_ever(client: TestClient, services: Services) -> None:
    headers = limited(services, MEGABYTE)
    with services.database.write() as session:
        session.add(Reservation(id="dead", project="search", bytes=MEGABYTE, expires_at=database_now() + 1000))
    body = {"filename": "p.jsonl", "purpose": "fine-tune", "bytes": 5, "mime_type": "text/jsonl"}
    assert error_of(client.post("/v1/uploads", json=body, headers=headers), 403)["code"] == "storage_limit_reached"
    with services.database.write() as session:
        session.execute(update(Reservation).values(expires_at=database_now() - 1))
    assert client.post("/v1/uploads", json=body, headers=headers).status_code == 200
    expire(services)
    with services.database.read() as session:
        assert session.scalars(select(Reservation)).all() == []


def test_parallel_parts_of_an_upload_are_bounded(
    services: Services, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts that are on their way count, so a hundred of them at once store no more than a few."""
    monkeypatch.setattr(uploads, "MAX_PART_BYTES", MEGABYTE)
    headers = limited(services, MEGABYTE)
    with served(settings) as (_, _, http), ThreadPoolExecutor(12) as threads:
        body = {"filename": "p.jsonl", "purpose": "fine-tune", "bytes": MEGABYTE // 2, "mime_type": "text/jsonl"}
        upload_id = http.post("/v1/uploads", json=body, headers=headers).raise_for_status().json()["id"]

        def send(_: int) -> int:
            files = {"data": ("part", b"x" * (MEGABYTE // 2))}
            return http.post(f"/v1/uploads/{upload_id}/parts", files=files, headers=headers).status_code

        statuses = Counter(threads.map(send, range(12)))
        assert statuses[200] == 2 and statuses[400] == 10
        assert stored_bytes(services) == MEGABYTE


def merge_of(client: TestClient, name: str, key: str) -> Response:
    return client.get(f"/v1/models/{name}/download", params={"format": "merged"}, headers=bearer(key))


def add_model(services: Services, name: str) -> None:
    """An adapter of the project `search`, with its folder."""
    services.storage.put_bytes(f"jobs/{name}/model/adapter_model.safetensors", b"weights")
    with services.database.write() as session:
        session.add(
            Model(
                name=name, kind="adapter", project="search", created_at=0.0, base_model="tiny",
                prefix=f"jobs/{name}/model", details={}, bytes=7,
            )
        )  # fmt: skip


def test_only_a_key_that_may_write_has_models_merged_and_only_a_few_at_a_time(
    client: TestClient, services: Services
) -> None:
    reads, writes = key_of(services, "search", Scope.READ), key_of(services, "search", Scope.WRITE)
    names = [f"ft-{number}" for number in range(6)]
    for name in names:
        add_model(services, name)
    assert error_of(merge_of(client, names[0], reads), 403)["code"] == "insufficient_scope"
    assert merge_of(client, names[0], writes).status_code == 202
    assert merge_of(client, names[0], reads).status_code == 202, "it is being made"
    assert [merge_of(client, name, writes).status_code for name in names[1:]] == [202, 202, 202, 429, 429]


def test_a_merge_needs_room_for_a_copy_of_the_base(client: TestClient, services: Services) -> None:
    key = key_of(services, "search")
    add_model(services, "ft-1")
    with services.database.write() as session:
        models.register(session, "tiny", "r1", {"architecture": "LlamaForCausalLM", "bytes": 5 * MEGABYTE})
    services.projects.limit("search", Limits(max_storage_bytes=5 * MEGABYTE))
    assert error_of(merge_of(client, "ft-1", key), 403)["code"] == "storage_limit_reached"
    services.projects.limit("search", Limits(max_storage_bytes=5 * MEGABYTE + 7))
    assert merge_of(client, "ft-1", key).status_code == 202


def test_merged_models_and_logs_count_until_they_are_removed(services: Services) -> None:
    with services.database.write() as session:
        counted_objects.note(session, "search", "merged/task-1/attempt-1", 100)
        counted_objects.note(session, "search", "jobs/ftjob-1/attempt-1/trainer.log", 20)
        counted_objects.note(session, "search", "jobs/ftjob-1/attempt-1/trainer.log", 25)
        session.add(Project(id="search", created_at=0.0))
    assert used(services) == 125
    prune(services, delete=True)  # the store is empty, and now belongs to this database
    services.storage.put_bytes("jobs/ftjob-1/attempt-1/trainer.log", b"x" * 25)
    prune(services, delete=True, min_age=0.0)
    assert used(services) == 100


# -- other hosts --------------------------------------------------------------------------------------------------


def test_a_slow_name_server_holds_up_one_project(
    client: TestClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its other requests are refused at once; another project's host is looked up."""
    answering = threading.Event()

    def getaddrinfo(host: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        if host.startswith("slow"):
            answering.wait(60)
        return [(0, 0, 0, "", ("93.184.216.34", 443))]

    monkeypatch.setattr("app.outbound_http.socket.getaddrinfo", getaddrinfo)
    monkeypatch.setattr(outbound_http, "LOOKUP_SECONDS", 60.0)
    slow, quick = bearer(key_of(services, "slow")), bearer(key_of(services, "quick"))

    def create(headers: dict[str, str], host: str) -> int:
        return client.post("/v1/webhooks", json={"url": f"https://{host}/hook"}, headers=headers).status_code

    with ThreadPoolExecutor(8) as threads:
        waiting = [threads.submit(create, slow, f"slow-{number}") for number in range(6)]
        refused = [future.result() for future in itertools.islice(as_completed(waiting), 2)]
        assert refused == [429, 429]
        assert create(quick, "quick.example") == 200
        answering.set()
        assert sorted(future.result() for future in waiting) == [200] * 4 + [429] * 2


def test_a_name_server_that_never_answers_is_not_waited_for(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = threading.Event()
    monkeypatch.setattr(outbound_http, "LOOKUP_SECONDS", 0.1)
    monkeypatch.setattr("app.outbound_http.socket.getaddrinfo", lambda *_, **__: never.wait(60))
    error = error_of(client.post("/v1/webhooks", json={"url": "https://host.example/"}), 400)
    never.set()
    assert error["code"] == "invalid_url"


def test_an_error_does_not_tell_whether_an_inner_host_exists(
    client: TestClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    def getaddrinfo(host: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        if host == "inside.internal":
            return [(0, 0, 0, "", ("10.0.0.7", 443))]
        raise OSError("no such host")

    monkeypatch.setattr("app.outbound_http.socket.getaddrinfo", getaddrinfo)
    messages = {
        error_of(client.post("/v1/webhooks", json={"url": f"https://{host}/"}), 400)["message"].replace(host, "HOST")
        for host in ("inside.internal", "missing.internal")
    }
    assert len(messages) == 1


@pytest.mark.parametrize(
    ("name", "port", "allowed"),
    [
        ("inner", 443, True), ("inner", 80, True), ("inner", 8000, False), ("inner:8000", 8000, True),
        ("inner:8000", 443, False), ("inner:*", 8000, True), ("INNER:*", 1, True), ("other:*", 443, False), ("inn", 443, False),
    ],
)  # fmt: skip
def test_an_inner_host_is_allowed_with_its_port(name: str, port: int, allowed: bool) -> None:
    assert outbound_http.is_allowed("inner", port, (name,)) is allowed
    assert outbound_http.is_allowed("::1", port, (name.lower().replace("inner", "[::1]"),)) is allowed


def test_a_project_whose_receivers_never_answer_delays_no_other(services: Services) -> None:
    """Claims leave the deliveries of a project alone that has several on their way."""
    with services.database.write() as session:
        for project in ("slow", "quick"):
            session.add(Project(id=project, created_at=0.0))
            for number in range(10):
                endpoint = WebhookEndpoint(
                    id=f"whe-{project}-{number}", project=project, url="https://93.184.216.34/", events=["fine_tuning.job.succeeded"],
                    sealed_secret="", created_at=0.0,
                )  # fmt: skip
                session.add(endpoint)
                session.flush()
                webhooks.enqueue(session, project, "fine_tuning.job.succeeded", {"id": "ftjob-x"})
    taken = list[str]()
    for _ in range(2 * MAX_PER_PROJECT):
        with services.database.write() as session:
            claimed = webhooks.claim(session, "test", (), _reaching(MAX_PER_PROJECT, taken))
        assert claimed is not None
        taken.append(claimed[1].project)
    assert Counter(taken) == {"slow": MAX_PER_PROJECT, "quick": MAX_PER_PROJECT}


def test_a_very_long_training_has_a_bounded_number_of_measured_steps() -> None:
    def measured(step: int, total: int, **metrics: float) -> bool:
        return is_recorded(Metrics("dpo", step, total, None, {"loss": 0.5, **metrics}))

    assert all(measured(step, MEASURED_STEPS) for step in range(1, MEASURED_STEPS + 1))
    recorded = [step for step in range(1, 10 * MEASURED_STEPS + 1) if measured(step, 10 * MEASURED_STEPS)]
    assert len(recorded) == MEASURED_STEPS and recorded[0] == 10 and recorded[-1] == 10 * MEASURED_STEPS
    assert measured(7, 10 * MEASURED_STEPS, **{"eval/loss": 0.5}) and measured(200_003, 200_003)


# -- connections --------------------------------------------------------------------------------------------------

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

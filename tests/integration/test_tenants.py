"""No key reads, starves, fills or ends another: attacks, made small enough to be harmless."""

import itertools
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from app import counted_objects
from app.dashboard import session as dashboard_session
from app.database import database_now
from app.estimates.service import _shown_pace
from app.jobs import event_feed
from app.jobs import events as job_events
from app.jobs import queue as job_queue
from app.jobs.states import Status
from app.keys import middleware, rates
from app.keys.schemas import Scope
from app.keys.tables import ApiKey
from app.main import create_app
from app.services import Services
from app.settings import Settings
from tests.helpers.api import error_of, key_of, served
from tests.helpers.jobs import make_job
from tests.helpers.servers import CEILING, wait_until
from worker.trainer.events import Metrics
from worker.training_run import MEASURED_STEPS, is_recorded

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


# -- streams ----------------------------------------------------------------------------------------------------------


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


# -- requests -----------------------------------------------------------------------------------------------------


def test_a_project_with_many_slow_requests_holds_up_no_other(
    services: Services, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two are worked on, two wait, and the others are refused at once. Here a slow request waits for a name server."""
    monkeypatch.setattr(middleware, "MAX_AT_WORK", 2)
    monkeypatch.setattr(middleware, "MAX_WAITING", 2)
    monkeypatch.setattr("app.outbound_http.LOOKUP_SECONDS", CEILING)
    answering, asked, look_up = threading.Event(), list[str](), socket.getaddrinfo

    def getaddrinfo(host: str, *arguments: Any, **more: Any) -> Any:
        if host != "slow.example":
            return look_up(host, *arguments, **more)
        asked.append(host)
        answering.wait(CEILING)
        return [(0, 0, 0, "", ("93.184.216.34", 443))]

    monkeypatch.setattr("socket.getaddrinfo", getaddrinfo)
    slow, quick = bearer(key_of(services, "slow")), bearer(key_of(services, "quick"))
    with served(settings) as (_, _, http), ThreadPoolExecutor(8) as threads:

        def create(_: int) -> int:
            return http.post("/v1/webhooks", json={"url": "https://slow.example/hook"}, headers=slow).status_code

        sent = [threads.submit(create, number) for number in range(7)]
        try:
            refused = [future.result() for future in itertools.islice(as_completed(sent), 3)]
            wait_until(lambda: len(asked) == 2, "the requests that are worked on")
            quick_answers = [http.get("/v1/webhooks", headers=quick).status_code for _ in range(5)]
        finally:
            answering.set()
        assert refused == [429] * 3 and quick_answers == [200] * 5
        assert sorted(future.result() for future in sent) == [200] * 4 + [429] * 3
        assert http.get("/v1/webhooks", headers=slow).status_code == 200, "every turn has ended"


# -- keys and sessions ------------------------------------------------------------------------------------------------


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


# -- what a project may learn -----------------------------------------------------------------------------------------


def test_no_project_finds_what_another_has_cached() -> None:
    name = f"tokens/{'a' * 64}/{'b' * 64}"
    mine, other = (counted_objects.key_of(project, name, shared=False) for project in ("a", "b"))
    assert mine == f"cache/tokens/a/{'a' * 64}/{'b' * 64}" and mine != other
    shared = {counted_objects.key_of(project, name, shared=True) for project in ("a", "b")}
    assert shared == {f"cache/tokens/_shared/{'a' * 64}/{'b' * 64}"}


def test_an_estimate_tells_the_pace_of_the_projects_own_jobs_only(services: Services) -> None:
    """Without any, it has one digit of the machines' pace, and no number of jobs."""
    for project, speed in (("other", 1234.5), ("search", 77.5)):
        pace = {"tokens": 1000 * speed, "seconds": 1000.0, "overhead_seconds": 12.3}
        make_job(services, name=project, project=project, status=Status.SUCCEEDED, pace=pace)
    with services.database.read() as session:
        own, shown = (_shown_pace(session, "tiny", project, writes=False) for project in ("search", "third"))
    assert own is not None and (own.tokens_per_second, own.overhead_seconds, own.jobs) == (77.5, 12.3, 1)
    assert shown is not None and (shown.tokens_per_second, shown.overhead_seconds, shown.jobs) == (700.0, 10.0, 0)


def test_the_pace_of_a_job_on_several_devices_is_that_of_one(services: Services) -> None:
    pace = {"tokens": 4000.0, "seconds": 10.0, "overhead_seconds": 1.0}
    make_job(services, project="search", status=Status.SUCCEEDED, pace=pace, devices=4)
    with services.database.read() as session:
        measured = _shown_pace(session, "tiny", "search", writes=False)
    assert measured is not None and measured.tokens_per_second == 100.0


def test_the_pace_of_stages_in_which_the_model_writes_is_one_of_its_own(services: Services) -> None:
    for speed, writes in ((100.0, None), (10.0, True), (300.0, False)):
        pace = {"tokens": 10 * speed, "seconds": 10.0, "overhead_seconds": 1.0}
        pace |= {} if writes is None else {"writes": writes}  # a version before did not tell
        make_job(services, name=f"{speed}", project="search", status=Status.SUCCEEDED, pace=pace)
    with services.database.read() as session:
        others, writing = (_shown_pace(session, "tiny", "search", writes=writes) for writes in (False, True))
    assert others is not None and (others.tokens_per_second, others.jobs) == (200.0, 2)
    assert writing is not None and (writing.tokens_per_second, writing.jobs) == (10.0, 1)


def test_an_estimate_counts_the_waiting_jobs_of_the_project_only(services: Services) -> None:
    for number, project in enumerate(("other", "other", "search")):
        make_job(services, name=str(number), project=project)
    with services.database.read() as session:
        assert [job_queue.count_waiting(session, 100, project) for project in ("other", "search", "third")] == [2, 1, 0]


def test_a_very_long_training_has_a_bounded_number_of_measured_steps() -> None:
    def measured(step: int, total: int, **metrics: float) -> bool:
        return is_recorded(Metrics("dpo", step, total, None, {"loss": 0.5, **metrics}))

    assert all(measured(step, MEASURED_STEPS) for step in range(1, MEASURED_STEPS + 1))
    recorded = [step for step in range(1, 10 * MEASURED_STEPS + 1) if measured(step, 10 * MEASURED_STEPS)]
    assert len(recorded) == MEASURED_STEPS and recorded[0] == 10 and recorded[-1] == 10 * MEASURED_STEPS
    assert measured(7, 10 * MEASURED_STEPS, **{"eval/loss": 0.5}) and measured(200_003, 200_003)

"""Scopes, revocation, last use, rates and projects, over HTTP."""

import signal
from dataclasses import replace

import pytest
from fastapi.testclient import TestClient
from structlog.testing import capture_logs

from app.errors import TooMany
from app.keys.rates import RateLimiter
from app.keys.schemas import Scope
from app.keys.service import Caller
from app.main import create_app
from app.services import Services
from app.settings import Settings
from tests.helpers.api import error_of, key_of, upload
from tests.helpers.servers import redis_process


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_a_key_may_do_only_what_its_scopes_allow(client: TestClient, services: Services) -> None:
    reads, writes = (bearer(key_of(services, "default", scope)) for scope in (Scope.READ, Scope.WRITE))
    file_id = upload(client)
    for headers in (reads, writes):
        assert client.get(f"/v1/files/{file_id}", headers=headers).status_code == 200
        assert error_of(client.get("/v1/projects", headers=headers), 403)["code"] == "insufficient_scope"
        assert error_of(client.get("/v1/keys", headers=headers), 403)["code"] == "insufficient_scope"
        assert error_of(client.post("/v1/keys", headers=headers, json={"name": "x"}), 403)
    body = {"model": "tiny", "training_file": file_id}
    assert error_of(client.post("/v1/fine_tuning/jobs", json=body, headers=reads), 403)["code"] == "insufficient_scope"
    error_of(client.delete(f"/v1/files/{file_id}", headers=reads), 403)
    assert client.post("/v1/fine_tuning/jobs", json=body, headers=writes).status_code == 200
    assert client.delete(f"/v1/files/{file_id}", headers=writes).status_code == 200


def test_keys_are_created_listed_used_and_revoked(client: TestClient) -> None:
    assert client.post("/v1/projects", json={"id": "search", "max_running_jobs": 2}).json()["max_running_jobs"] == 2
    error_of(client.post("/v1/projects", json={"id": "search"}), 409)
    error_of(client.post("/v1/keys", json={"name": "ci", "project": "nobody"}), 404)
    spec = {"name": "ci", "project": "search", "scopes": ["read"], "expires_in": 60}
    created = client.post("/v1/keys", json=spec).json()
    assert created["expires_at"] - created["created_at"] in (60, 61)
    assert client.get("/v1/files", headers=bearer(created["key"])).status_code == 200
    (listed,) = client.get("/v1/keys", params={"project": "search"}).json()["data"]
    assert listed["id"] == created["id"] and "key" not in listed
    assert listed["last_used_at"] is not None and created["last_used_at"] is None
    assert client.delete(f"/v1/keys/{created['id']}").json()["revoked_at"] is not None
    error_of(client.get("/v1/files", headers=bearer(created["key"])), 401)
    error_of(client.delete("/v1/keys/key-none"), 404)
    changed = client.post("/v1/projects/search", json={"max_storage_bytes": 5}).json()
    assert (changed["max_storage_bytes"], changed["max_running_jobs"]) == (5, 2)
    error_of(client.post("/v1/projects/none", json={}), 404)
    assert error_of(client.post("/v1/projects", json={"id": "Not A Slug"}), 400)["param"] == "id"


def test_a_key_over_its_rate_limit_gets_429_with_retry_after(services: Services, tmp_path: object) -> None:
    settings = services.settings.model_copy(update={"rate_limit": 5})
    with TestClient(create_app(settings), base_url="http://localhost", headers=bearer(settings.admin_key)) as client:
        answers = [client.get("/v1/files") for _ in range(6)]
        assert [answer.status_code for answer in answers] == [200] * 5 + [429]
        assert error_of(answers[5], 429)["code"] == "rate_limit_exceeded"
        assert 1 <= int(answers[5].headers["Retry-After"]) <= 60
        other_key = key_of(services, "default")
        assert client.get("/v1/files", headers=bearer(other_key)).status_code == 200


def test_a_stream_token_opens_one_path_for_a_limited_time(services: Services) -> None:
    path = "/v1/fine_tuning/jobs/ftjob-x/stream"
    holder = services.keys.identify(key_of(services, "search"))
    assert holder is not None
    token, _ = services.keys.stream_token(holder.key_id, path)
    caller = services.keys.identify_stream(token, path)
    assert caller is not None and caller.project == "search" and not caller.may(Scope.WRITE)
    assert services.keys.identify_stream(token, path.replace("x", "y")) is None
    key_id, expires_at, signature = token.split(".")
    assert services.keys.identify_stream(f"admin.{expires_at}.{signature}", path) is None
    assert services.keys.identify_stream(f"{key_id}.{int(expires_at) + 9}.{signature}", path) is None
    for nonsense in ("", ".", "..", "a.b.c", "é.1.2"):
        assert services.keys.identify_stream(nonsense, path) is None


def test_the_default_rate_limit_is_6000(settings: Settings) -> None:
    assert settings.rate_limit == 6000


def test_a_control_character_in_a_path_does_not_bypass_the_scope_check(client: TestClient, services: Services) -> None:
    """A router's pattern may match up to a line break where the guard's pattern does not."""
    writes = bearer(key_of(services, "default", Scope.WRITE))
    for path in ("/v1/keys%0A", "/v1/projects%0A", "/v1/keys/x%0A", "/v1/keys%0D", "/v1/keys%00", "/v1/keys/"):
        for method in ("GET", "POST", "DELETE"):
            answer = client.request(method, path, headers=writes, json={"name": "x", "scopes": ["admin"]})
            assert answer.status_code in (403, 404), (method, path)
    assert len(services.keys.list()) == 1


def test_only_the_first_request_waits_for_a_redis_that_stands_still() -> None:
    """Requests are counted again once it answers and the pause is over."""
    with redis_process() as server:
        limiter = RateLimiter(1, f"redis://127.0.0.1:{server.port}/0")
        caller = Caller("key", "default", frozenset({Scope.READ}))
        server.process.send_signal(signal.SIGSTOP)
        try:
            with capture_logs() as logs:
                for _ in range(20):
                    limiter.check(caller)
        finally:
            server.process.send_signal(signal.SIGCONT)
        assert [entry["event"] for entry in logs] == ["requests not counted"]
        limiter._counts_from = 0.0
        other = replace(caller, key_id="other")
        limiter.check(other)
        with pytest.raises(TooMany):
            limiter.check(other)

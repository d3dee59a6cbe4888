"""Each change is in the audit log: who, when, what."""

import getpass
import os

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, update

from app.audit.tables import AuditEvent
from app.cli.local import local
from app.keys.schemas import Scope
from app.services import Services
from tests.helpers.api import error_of, key_of, upload
from worker.housekeeping import forget_old_events


def test_changes_say_who_made_them_when_and_to_what(client: TestClient, services: Services) -> None:
    key = key_of(services, "search", Scope.WRITE)
    writer = {"Authorization": f"Bearer {key}"}
    file_id = upload(client)
    own_file = client.post(
        "/v1/files", files={"file": ("p.jsonl", b"{}")}, data={"purpose": "fine-tune"}, headers=writer
    ).json()["id"]
    client.get(f"/v1/files/{file_id}")
    client.delete(f"/v1/files/{file_id}", headers=writer)  # of another project: refused
    deleted = client.delete(f"/v1/files/{own_file}", headers=writer)
    job_id = client.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": file_id}).json()["id"]
    client.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
    client.post("/v1/projects/search", json={"max_running_jobs": 3})
    new_key = client.post("/v1/keys", json={"name": "ci", "scopes": ["read"]}).json()
    client.delete(f"/v1/keys/{new_key['id']}")
    client.delete("/v1/models/none")

    events = client.get("/v1/audit?limit=100").json()["data"]
    assert [(event["action"], event["subject"], event["project"]) for event in events[::-1]] == [
        ("POST /v1/files", "/v1/files", "default"),
        ("POST /v1/files", "/v1/files", "search"),
        ("DELETE /v1/files/{file_id}", f"/v1/files/{own_file}", "search"),
        ("POST /v1/fine_tuning/jobs", "/v1/fine_tuning/jobs", "default"),
        ("POST /v1/fine_tuning/jobs/{job_id}/cancel", f"/v1/fine_tuning/jobs/{job_id}/cancel", "default"),
        ("POST /v1/projects/{project_id}", "/v1/projects/search", "default"),
        ("POST /v1/keys", "/v1/keys", "default"),
        ("DELETE /v1/keys/{key_id}", f"/v1/keys/{new_key['id']}", "default"),
    ], "reads and refused requests change nothing"
    by_action = {event["action"]: event for event in events}
    assert by_action["POST /v1/projects/{project_id}"]["details"] == {"max_running_jobs": 3}
    assert by_action["POST /v1/fine_tuning/jobs"]["details"] is None
    removal = by_action["DELETE /v1/files/{file_id}"]
    assert removal["request_id"] == deleted.headers["x-request-id"]
    assert removal["actor"] == services.keys.list("search")[0].id
    assert by_action["POST /v1/keys"]["actor"] == "admin"
    assert new_key["key"] not in str(events)


def test_the_audit_log_is_paged_and_filtered(client: TestClient, services: Services) -> None:
    for name in "abc":
        client.post("/v1/projects", json={"id": name})
    client.post("/v1/operations", json={"claims_paused": False})
    first = client.get("/v1/audit?limit=3").json()
    assert first["has_more"] and first["data"][0]["action"] == "POST /v1/operations"
    rest = client.get(f"/v1/audit?after={first['last_id']}").json()
    assert [event["details"] for event in rest["data"]] == [{"id": "a"}] and not rest["has_more"]
    assert len(client.get("/v1/audit?action=POST /v1/projects").json()["data"]) == 3
    assert client.get("/v1/audit?project=other").json()["data"] == []
    assert len(client.get("/v1/audit?actor=admin").json()["data"]) == 4
    for after in ("audit-999", "nonsense", "audit-" + "9" * 30):
        assert error_of(client.get(f"/v1/audit?after={after}"), 404)["code"] == "audit_event_not_found"


def test_old_audit_events_are_forgotten(client: TestClient, services: Services) -> None:
    client.post("/v1/projects", json={"id": "old"})
    client.post("/v1/projects", json={"id": "new"})
    with services.database.write() as session:
        session.execute(update(AuditEvent).where(AuditEvent.sequence == 1).values(created_at=0.0))
    assert forget_old_events(services.database, 3600) == 1
    with services.database.read() as session:
        assert [event.details for event in session.scalars(select(AuditEvent))] == [{"id": "new"}]


@pytest.mark.parametrize("named", [True, False])
def test_commands_on_the_services_machine_are_recorded(
    client: TestClient, services: Services, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """Also those of a user without a name, as in some containers."""
    monkeypatch.setenv("DPO_HOME", str(services.settings.home))
    monkeypatch.setenv("DPO_DATABASE_URL", services.settings.database_url)
    monkeypatch.setattr("sys.argv", ["/usr/bin/dpo", "projects", "limit", "search", "--weight", "2"])

    def no_name() -> str:
        raise KeyError("getpwuid(): uid not found")

    if not named:
        monkeypatch.setattr("getpass.getuser", no_name)
    local().database.close()
    (event,) = client.get("/v1/audit").json()["data"]
    assert event["action"] == "dpo projects limit" and event["subject"] == "dpo projects limit search --weight 2"
    assert event["actor"] == f"cli:{getpass.getuser() if named else os.getuid()}" and event["project"] is None

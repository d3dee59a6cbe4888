"""No query of a loop, a page or a route goes through a table that grows.

The tables are filled with a history. Each statement that the service sends is then explained by the database itself.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Connection, event

from app.derived_artifacts import repository as artifacts
from app.jobs import event_blocks, fair_share
from app.jobs import queue as job_queue
from app.jobs.states import Status
from app.models import repository as models
from app.services import Services
from app.webhooks import repository as webhooks
from tests.helpers.api import key_of
from tests.helpers.history import History, fill
from worker import housekeeping
from worker.reaper import Reaper

HISTORY = History(jobs=12_000, events=40_000, models=12_000, queued=300, running=10, files=6_000, deliveries=6_000)
GROWING = {
    "jobs", "job_labels", "job_events", "models", "checkpoints", "files", "tasks", "webhook_deliveries", "sent_requests", "uploads",
}  # fmt: skip
MOST_ROWS = 500
"""The most rows of one table that a statement may look at. The tables have at least four times as many."""
Statement = tuple[str, Any]


@contextmanager
def statements(services: Services) -> Iterator[list[Statement]]:
    """The statements, with their parameters, that are sent while the block runs."""
    sent: list[Statement] = []

    def record(_connection: Connection, _cursor: object, statement: str, parameters: Any, *_: object) -> None:
        sent.append((statement, parameters))

    event.listen(services.database.engine, "before_cursor_execute", record)
    yield sent
    event.remove(services.database.engine, "before_cursor_execute", record)


def rows_looked_at(services: Services, statement: str, parameters: Any) -> dict[str, int]:
    """By table: the rows that a statement reads, those included that it leaves out. For SQLite: all or none."""
    with services.database.engine.connect() as connection:
        if connection.dialect.name == "sqlite":
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
            scans = [re.match(r"SCAN (\w+)(?! USING)$", row[3].replace(" AS ", " ")) for row in plan]
            return {scan[1]: 10**9 for scan in scans if scan}
        explained = connection.exec_driver_sql(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters).scalar_one()
        connection.rollback()
        plan = explained if isinstance(explained, list) else json.loads(explained)
    rows: dict[str, int] = {}

    def add(node: dict[str, Any]) -> None:
        if table := node.get("Relation Name"):
            seen = node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
            rows[table] = max(rows.get(table, 0), int(seen * node["Actual Loops"]))
        for child in node.get("Plans", []):
            add(child)

    add(plan[0]["Plan"])
    return rows


def linear(services: Services, work: Callable[[], object]) -> list[str]:
    """The statements of `work` that look at many rows of a table that grows."""
    with statements(services) as sent:
        work()
    found = []
    for statement, parameters in dict(sent).items():
        if statement.lstrip().split()[0] in ("SELECT", "UPDATE", "DELETE", "WITH"):
            rows = rows_looked_at(services, statement, parameters)
            found += [
                f"{table} {count}: {statement}"
                for table, count in rows.items()
                if table in GROWING and count > MOST_ROWS
            ]
    return found


@pytest.fixture
def filled(services: Services) -> Services:
    fill(services, HISTORY)
    return services


def test_loops_of_workers_look_at_few_rows(filled: Services) -> None:
    database = filled.database

    def claim(*arguments: Any) -> None:
        with database.write() as session:
            job_queue.claim(session, *arguments)
            session.rollback()

    def others() -> None:
        with database.write() as session:
            artifacts.claim(session, "worker", ["tiny"])
            webhooks.claim(session, "worker")
            assert models.users_of(session, "ft:tiny:000000007") == []
            session.rollback()

    def pack() -> None:
        with database.write() as session:
            assert event_blocks.pack(session)
            session.rollback()

    loops: dict[str, Callable[[], object]] = {
        "a claim of a worker that serves the queue": lambda: claim(Status.QUEUED, "worker", ["tiny"], 10**12),
        "a claim of a worker that serves nothing": lambda: claim(Status.QUEUED, "worker", [], 10**12),
        "a claim of a file check": lambda: claim(Status.VALIDATING, "worker"),
        "other claims": others,
        "the reaper": Reaper(filled).inspect,
        "expiry": lambda: housekeeping.keep_house(filled),
        "packing": pack,
        "use": lambda: fair_share.count_running(database),
        "old checkpoints": lambda: filled.models.forget_checkpoints(100 * 365 * 86400),
        "retention": lambda: housekeeping.forget_old_events(database, 100 * 365 * 86400),
    }
    assert {name: found for name, work in loops.items() if (found := linear(filled, work))} == {}


def test_routes_look_at_few_rows(client: TestClient, filled: Services) -> None:

    key = key_of(filled, "project-1")
    headers = {"Authorization": f"Bearer {key}"}
    job, queued = "ftjob-000000001", f"ftjob-{HISTORY.jobs - 2:09d}"
    app_services: Services = client.app.state.services  # type: ignore[attr-defined]
    client.get("/metrics")  # the first one counts everything
    paths = [
        "/v1/fine_tuning/jobs", "/v1/evaluations", "/v1/fine_tuning/jobs?metadata[team]=a",
        "/v1/fine_tuning/jobs?metadata[team]=b", "/v1/fine_tuning/jobs?metadata=null", f"/v1/fine_tuning/jobs/{job}", f"/v1/fine_tuning/jobs/{queued}",
        f"/v1/fine_tuning/jobs/{job}/events", f"/v1/fine_tuning/jobs/{job}/metrics",
        f"/v1/fine_tuning/jobs/{job}/checkpoints", "/v1/models?limit=20", "/v1/models/ft:tiny:000000001",
        "/v1/files?limit=20", "/v1/files/file-000000001", "/v1/sweeps", "/metrics", "/v1/webhooks",
    ]  # fmt: skip

    def get(path: str) -> None:
        assert client.get(path, headers=headers).status_code == 200, path

    found = {path: linear(app_services, partial(get, path)) for path in paths}
    assert {path: texts for path, texts in found.items() if texts} == {}

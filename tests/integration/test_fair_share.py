"""Projects share the GPUs: no project waits behind another's queue, and each one's use is counted."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, func, select, text, update

from app.database import now
from app.jobs import fair_share, transitions
from app.jobs import queue as job_queue
from app.jobs.states import Actor, Status
from app.jobs.tables import Job, JobEvent
from app.keys.schemas import Scope
from app.projects import repository as projects
from app.projects.schemas import Limits, ProjectSpec
from app.projects.tables import Project
from app.services import Services
from app.usage import repository as usage
from app.usage.repository import month_of
from tests.helpers.api import error_of, key_of, upload
from tests.helpers.jobs import claim, end, get, make_job

HOUR = 3600.0


def add_projects(services: Services, **weights: float) -> None:
    for name, weight in weights.items():
        services.projects.create(ProjectSpec(id=name, weight=weight))


def add_jobs(services: Services, project: str, count: int, **columns: Any) -> list[str]:
    return [make_job(services, name=f"{project}-{number}", project=project, **columns) for number in range(count)]


def run(services: Services, seconds: float) -> str:
    """Claim the next job, let it run for `seconds` and succeed. Returns its project."""
    job = claim(services)
    assert job is not None
    with services.database.write() as session:
        session.execute(update(Job).where(Job.id == job.id).values(ran_seconds=seconds))
    assert end(services, job.id, job.attempt)
    return job.project


def test_one_job_does_not_wait_behind_another_projects_queue(services: Services) -> None:
    add_projects(services, large=1, small=1)
    add_jobs(services, "large", 20)
    assert run(services, HOUR) == "large"
    add_jobs(services, "small", 1, priority=-5)
    assert run(services, HOUR) == "small", "a priority orders the jobs of one project only"
    assert run(services, HOUR) == "large"


def test_one_jobs_running_time_counts_before_it_ends(services: Services) -> None:
    add_projects(services, large=1, small=1)
    add_jobs(services, "large", 5, estimated_seconds=10 * HOUR)
    add_jobs(services, "small", 5, estimated_seconds=HOUR)
    claimed = [job.project for job in iter(lambda: claim(services), None)]
    assert claimed == ["large", *["small"] * 5, *["large"] * 4], "five hours of one are less than ten of the other"


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.5, 2.0)])
def test_projects_that_both_wait_share_the_time_by_their_weights(
    services: Services, weights: tuple[float, float]
) -> None:
    """Jobs of one take twice as long as those of the other: time is shared, not turns."""
    add_projects(services, a=weights[0], b=weights[1])
    for project in ("a", "b"):
        add_jobs(services, project, 40)
    used = Counter[str]()
    while sum(used.values()) < 30:
        job = claim(services)
        assert job is not None
        hours = 2 if job.project == "a" else 1
        with services.database.write() as session:
            session.execute(update(Job).where(Job.id == job.id).values(ran_seconds=hours * HOUR))
        end(services, job.id, job.attempt)
        used[job.project] += hours
    fair = sum(used.values()) * weights[0] / sum(weights)
    assert abs(used["a"] - fair) <= 2, "no further from the fair share than one job"


def test_use_counts_half_after_a_day(services: Services) -> None:
    add_projects(services, a=1)
    add_jobs(services, "a", 3)
    run(services, HOUR)
    with services.database.write() as session:
        session.execute(update(Project).values(recent_at=Project.recent_at - fair_share.HALF_LIFE))
    run(services, HOUR)
    with services.database.read() as session:
        project = session.get_one(Project, "a")
        used = fair_share.used_lately(project.recent_seconds, project.recent_at, now(session))
    assert used == pytest.approx(1.5 * HOUR, rel=1e-3)


JOB = st.tuples(st.sampled_from("abc"), st.integers(-1, 1), st.sampled_from([None, 60.0, 500.0, 9000.0]))


@given(jobs=st.lists(JOB, min_size=1, max_size=12), weights=st.tuples(*[st.sampled_from([0.5, 1.0, 3.0])] * 3))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_jobs_start_in_the_order_that_their_positions_say(
    services: Services, jobs: list[tuple[str, int, float | None]], weights: tuple[float, ...]
) -> None:
    with services.database.write() as session:
        for table in (JobEvent, Job):
            session.execute(delete(table))
        session.execute(delete(Project).where(Project.id != "default"))
    add_projects(services, **dict(zip("abc", weights, strict=True)))
    for number, (project, priority, seconds) in enumerate(jobs):
        make_job(services, name=str(number), project=project, priority=priority, estimated_seconds=seconds)
    with services.database.read() as session:
        expected = [job.id for job in job_queue.waiting(session)]
    assert [job.id for job in iter(lambda: claim(services), None)] == expected
    assert len(expected) == len(jobs)


def test_every_waiting_job_of_a_long_queue_has_its_own_position(client: TestClient, services: Services) -> None:
    count = job_queue.READ_AT_ONCE + 30
    first = get(services, make_job(services))
    template = {column.name: getattr(first, column.name) for column in Job.__table__.c}
    with services.database.write() as session:
        session.execute(delete(Job))
        session.add_all(Job(**template | {"id": f"ftjob-{n:04d}", "created_at": float(n)}) for n in range(count))
    listed: list[dict[str, Any]] = []
    while len(listed) < count:
        after = f"&after={listed[-1]['id']}" if listed else ""
        listed += client.get(f"/v1/fine_tuning/jobs?limit=100{after}").json()["data"]
    assert [job["queue_position"] for job in listed] == list(range(count, 0, -1))


def test_projects_take_turns_in_the_check_of_files(services: Services) -> None:
    add_projects(services, large=1, small=1)
    add_jobs(services, "large", 5, status=Status.VALIDATING)
    first = _claim_check(services)
    add_jobs(services, "small", 2, status=Status.VALIDATING)
    assert [first, *(_claim_check(services) for _ in range(6))] == [
        "large", "small", "large", "small", "large", "large", "large",
    ]  # fmt: skip


def test_checks_at_a_time_are_limited_too(services: Services) -> None:
    add_projects(services, large=1)
    services.projects.limit("large", Limits(max_running_jobs=2))
    add_jobs(services, "large", 3, status=Status.VALIDATING)
    assert [_claim_check(services) for _ in range(3)] == ["large", "large", None]
    services.projects.limit("large", Limits(max_running_jobs=0))
    with services.database.write() as session:
        session.execute(update(Job).values(lease_owner=None, lease_expires_at=None))
    assert [_claim_check(services) for _ in range(2)] == ["large", None], "a project may always check one"


def _claim_check(services: Services) -> str | None:
    with services.database.write() as session:
        job = job_queue.claim(session, Status.VALIDATING, "test")
        return None if job is None else job.project


@contextmanager
def claim_lock_held(services: Services) -> Iterator[None]:
    """Another worker is in the middle of a claim."""
    with services.database.engine.connect() as connection, connection.begin():
        connection.execute(select(func.pg_advisory_xact_lock(job_queue.CLAIM_LOCK)))
        yield


def test_a_worker_that_finds_nothing_waits_for_no_claim_of_others(services: Services) -> None:
    if services.database.engine.dialect.name == "sqlite":
        return  # there a claim waits for every writer
    make_job(services)
    with claim_lock_held(services), services.database.write() as session:
        session.execute(text("SET LOCAL lock_timeout = '1s'"))
        assert job_queue.claim(session, Status.QUEUED, "test", ["another"]) is None


def test_a_project_may_queue_only_so_many_jobs(client: TestClient, services: Services) -> None:
    assert client.get("/v1/projects/default").json()["max_queued_jobs"] == 2000, "there is a limit by default"
    client.post("/v1/projects/default", json={"max_queued_jobs": 2})
    body = {"model": "tiny", "training_file": upload(client)}
    answers = []
    together = threading.Barrier(4)

    def create() -> None:
        together.wait()
        answers.append(client.post("/v1/fine_tuning/jobs", json=body))

    threads = [threading.Thread(target=create) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in answers) == [200, 200, 403, 403], "also of requests at once"
    assert error_of(client.post("/v1/fine_tuning/jobs", json=body), 403)["code"] == "queue_limit_reached"
    accepted = next(answer.json()["id"] for answer in answers if answer.status_code == 200)
    client.post(f"/v1/fine_tuning/jobs/{accepted}/cancel")
    assert client.post("/v1/fine_tuning/jobs", json=body).status_code == 200
    sweep = {"job": body, "grid": {"seed": [1, 2, 3]}}
    assert error_of(client.post("/v1/sweeps", json=sweep), 403)["code"] == "queue_limit_reached"
    assert client.post("/v1/projects/default", json={"max_queued_jobs": None}).json()["max_queued_jobs"] is None
    assert client.post("/v1/fine_tuning/jobs", json=body).status_code == 200


def test_a_project_has_a_highest_priority(client: TestClient) -> None:
    body = {"model": "tiny", "training_file": upload(client)}
    assert client.get("/v1/projects/default").json()["max_priority"] == 10
    assert client.post("/v1/fine_tuning/jobs", json=body | {"priority": 10}).status_code == 200
    error = error_of(client.post("/v1/fine_tuning/jobs", json=body | {"priority": 11}), 403)
    assert (error["code"], error["param"]) == ("priority_limit_reached", "priority")
    client.post("/v1/projects/default", json={"max_priority": None})
    assert client.post("/v1/fine_tuning/jobs", json=body | {"priority": 100}).status_code == 200


def test_all_that_ran_is_in_the_usage_of_its_month(client: TestClient, services: Services) -> None:
    """Lost attempts count, nothing counts twice, and a job that still runs counts already."""
    for name in ("first", "second"):
        make_job(services, name=name, trained_tokens=1000)
    for _ in range(2):  # an attempt that is handed back, and one that succeeds
        job = claim(services)
        assert job is not None
        with services.database.write() as session:
            session.execute(update(Job).where(Job.id == job.id).values(ran_seconds=Job.ran_seconds + 50.0))
        fair_share.count_running(services.database)
        with services.database.write() as session:
            session.execute(update(Job).where(Job.id == job.id).values(ran_seconds=Job.ran_seconds + 10.0))
        if get(services, job.id).attempt == 1:
            _hand_back(services, job)
        else:
            assert end(services, job.id, job.attempt)
    running = claim(services)
    assert running is not None
    with services.database.write() as session:
        session.execute(update(Job).where(Job.id == running.id).values(ran_seconds=7.0))
    fair_share.count_running(services.database)
    fair_share.count_running(services.database)
    with services.database.read() as session:
        month = month_of(now(session))
    (used,) = client.get("/v1/usage").json()["data"]
    assert used["project"] == "default" and used["month"] == month
    assert used["gpu_seconds"] == pytest.approx(2 * 60.0 + 7.0)
    assert used["trained_tokens"] == 1000
    metrics = client.get("/metrics").text
    assert 'dpo_project_gpu_seconds_total{project="default"} 127.0' in metrics
    assert 'dpo_project_trained_tokens_total{project="default"} 1000.0' in metrics


def _hand_back(services: Services, job: Job) -> None:
    with services.database.write() as session:
        assert transitions.transition(
            session, job.id, Status.RUNNING, Status.QUEUED, actor=Actor.RUNNER, attempt=job.attempt, message="stops"
        )


def test_bytes_stored_are_in_the_usage(client: TestClient, services: Services) -> None:
    upload(client)
    stored = client.get("/v1/projects/default").json()["storage_bytes"]
    measured_at = usage.measure_storage(services.database, float("nan"))
    usage.measure_storage(services.database, measured_at - 2 * HOUR)
    (used,) = client.get("/v1/usage").json()["data"]
    assert used["storage_bytes"] == stored > 0
    assert used["storage_byte_hours"] == pytest.approx(2 * stored, rel=1e-3)
    assert f'dpo_project_storage_bytes{{project="default"}} {float(stored)}' in client.get("/metrics").text


def test_usage_of_other_projects_is_for_administrators(client: TestClient, services: Services) -> None:
    reads = {"Authorization": f"Bearer {key_of(services, 'other', Scope.READ)}"}
    for project, month in (("default", "2026-01"), ("default", "2026-02"), ("other", "2026-02")):
        with services.database.write() as session:
            row = usage.of_month(session, session.get_one(Project, project), 0.0)
            row.month = month
    names = [(row["project"], row["month"]) for row in client.get("/v1/usage?project=*").json()["data"]]
    assert names == [("default", "2026-01"), ("default", "2026-02"), ("other", "2026-02")]
    assert len(client.get("/v1/usage?first_month=2026-02&last_month=2026-02").json()["data"]) == 1
    assert [row["project"] for row in client.get("/v1/usage", headers=reads).json()["data"]] == ["other"]
    for project in ("default", "*"):
        error = error_of(client.get("/v1/usage", params={"project": project}, headers=reads), 403)
        assert error["code"] == "insufficient_scope"
    error_of(client.get("/v1/usage?project=none"), 404)
    assert error_of(client.get("/v1/usage?first_month=2026-13"), 400)["param"] == "first_month"


def test_a_project_whose_row_is_locked_holds_up_no_check_of_another(services: Services) -> None:
    """A large sweep holds its project's row for a second. SQLite has one writer, and no such lock."""
    if services.settings.database_url.startswith("sqlite"):
        return
    add_projects(services, first=1.0, second=1.0)
    for project in ("first", "second"):
        make_job(services, name=project, project=project, status=Status.VALIDATING)
    claimed: list[str | None] = []

    def claim_twice() -> None:
        for _ in range(2):
            with services.database.write() as session:
                job = job_queue.claim(session, Status.VALIDATING, "test")
                claimed.append(None if job is None else job.project)

    with services.database.write() as session:
        projects.lock(session, "first")
        thread = threading.Thread(target=claim_twice)
        thread.start()
        thread.join(30)
        assert not thread.is_alive() and claimed == ["second", None]
    claim_twice()
    assert claimed[2:] == ["first", None]

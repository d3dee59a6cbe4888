"""Which checkpoints are kept, while their job runs and after: rows and objects, on both databases."""

import threading
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, text, update

from app.chores import Chore
from app.database import database_now, now
from app.jobs.states import Status
from app.jobs.tables import Checkpoint, Job
from app.models import repository as models
from app.models.tables import Model
from app.projects.schemas import Limits
from app.services import Services
from tests.helpers.api import error_of, key_of, upload
from tests.helpers.jobs import claim, end, get, make_job
from tests.helpers.servers import wait_until
from worker import checkpoints
from worker.checkpoints import Checkpoints
from worker.housekeeping import retain_checkpoints
from worker.lease import JobLease

NAME = "ft:tiny:default::12345678:ckpt-step-{}"


@pytest.fixture
def job(services: Services, tmp_path: Path) -> Job:
    """A running job with checkpoints of the steps 1 to 5. It asks to keep two."""
    job_id = make_job(services, spec={**_spec(services), "keep_checkpoints": 2})
    assert claim(services) is not None
    folder = tmp_path / "checkpoint"
    for subfolder in ("model", "state"):
        (folder / subfolder).mkdir(parents=True)
        (folder / subfolder / "weights").write_text("x")
    with services.database.write() as session:
        for step in range(1, 6):
            prefix = f"jobs/{job_id}/attempt-1/checkpoints/{step}"
            services.storage.put_folder(prefix, folder)
            session.add(
                Checkpoint(
                    id=f"ftckpt-{step}", job_id=job_id, created_at=database_now(), stage="dpo", step_number=step,
                    metrics={}, model_name=NAME.format(step), prefix=prefix, project="default", bytes=1, state_bytes=1,
                )
            )  # fmt: skip
    return get(services, job_id)


def _spec(services: Services) -> dict[str, object]:
    other = get(services, make_job(services, name="other", status=Status.SUCCEEDED))
    return dict(other.spec)


def listed_steps(services: Services) -> list[int]:
    with services.database.read() as session:
        return sorted(session.scalars(select(Checkpoint.step_number)))


def stored_steps(services: Services, job: Job, kind: str) -> list[int]:
    return sorted(int(key.split("/")[4]) for key, _ in services.storage.list(f"jobs/{job.id}") if f"/{kind}/" in key)


def trim(services: Services, job: Job) -> None:
    Checkpoints(services.storage, JobLease(services.database, job.id, job.attempt), job).trim()


def test_a_job_keeps_as_many_checkpoints_as_it_asks_for(
    services: Services, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    trim(services, job)
    assert listed_steps(services) == [4, 5]
    assert stored_steps(services, job, "state") == [4, 5], "two can be resumed from"
    assert stored_steps(services, job, "model") == [1, 2, 3, 4, 5], "someone may be downloading one"
    with services.database.write() as session:
        session.execute(update(Checkpoint).where(Checkpoint.step_number == 4).values(step_number=3))
    monkeypatch.setattr(checkpoints, "DELETE_DELAY_SECONDS", 0.0)
    retention = Checkpoints(services.storage, JobLease(services.database, job.id, job.attempt), job)
    retention.keep = 1
    retention.trim()
    assert listed_steps(services) == [5]
    assert stored_steps(services, job, "model") == [1, 2, 3, 5], (
        "the newly deleted one is gone; the others go when the job ends"
    )


def test_a_checkpoint_that_a_new_job_starts_from_stays(services: Services, job: Job) -> None:
    """The new job looks the checkpoint up before the trim and uses it after. The trim waits for the row's lock."""
    name = NAME.format(2)
    trimming = threading.Thread(target=trim, args=(services, job))
    with services.database.write() as session:
        assert models.find(session, "default", name, lock=True) is not None
        trimming.start()
        if services.settings.database_url.startswith("postgresql"):
            waiting = text(
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%FOR UPDATE%'"
            )

            def blocked() -> bool:
                with services.database.read() as observer:
                    return bool(observer.scalar(waiting))

            wait_until(blocked, "the trimming thread to wait")
        values = {column.name: getattr(job, column.name) for column in Job.__table__.columns}
        session.add(Job(**values | {"id": "ftjob-second", "model": name, "status": Status.VALIDATING, "attempt": 0}))
    trimming.join()
    assert listed_steps(services) == [2, 4, 5]


def stored_bytes(client: TestClient) -> int:
    size: int = client.get("/v1/projects/default").json()["storage_bytes"]
    return size


def finish(services: Services, job: Job, days_ago: float = 0.0) -> None:
    assert end(services, job.id, job.attempt)
    with services.database.write() as session:
        then = database_now() - days_ago * 86400
        session.execute(update(Job).where(Job.id == job.id).values(finished_at=then))
        session.execute(update(Checkpoint).values(created_at=then - 60))


def test_checkpoints_count_as_stored_as_long_as_they_are(client: TestClient, services: Services, job: Job) -> None:
    assert stored_bytes(client) == 10, "five models and five states"
    trim(services, job)
    assert stored_bytes(client) == 4, "two of each"
    finish(services, job)
    assert stored_bytes(client) == 2, "nobody resumes an ended job"
    client.delete(f"/v1/models/{NAME.format(5)}")
    assert stored_bytes(client) == 1


def test_a_project_over_its_storage_limit_starts_no_job(client: TestClient, services: Services, job: Job) -> None:
    body = {"model": "tiny", "training_file": upload(client)}
    services.projects.limit("default", Limits(max_storage_bytes=stored_bytes(client)))
    assert client.post("/v1/fine_tuning/jobs", json=body).status_code == 200, "at the limit"
    services.projects.limit("default", Limits(max_storage_bytes=stored_bytes(client) - 1))
    assert error_of(client.post("/v1/fine_tuning/jobs", json=body), 403)["code"] == "storage_limit_reached"


def test_a_checkpoint_can_be_deleted_once_nothing_needs_it(client: TestClient, services: Services, job: Job) -> None:
    path = f"/v1/models/{NAME.format(2)}"
    error = error_of(client.delete(path), 409)
    assert error["code"] == "model_in_use" and job.id in error["message"], "its job may resume from it"
    finish(services, job)
    user = make_job(services, name="user", model=NAME.format(2))
    assert user in error_of(client.delete(path), 409)["message"]
    client.post(f"/v1/fine_tuning/jobs/{user}/cancel")
    other = {"Authorization": f"Bearer {key_of(services, 'other')}"}
    assert error_of(client.delete(path, headers=other), 404)["code"] == "model_not_found"
    assert client.delete(path).json()["deleted"]
    assert listed_steps(services) == stored_steps(services, job, "model") == [1, 3, 4, 5]
    error_of(client.delete(path), 404)


def test_checkpoints_go_with_their_model(client: TestClient, services: Services, job: Job) -> None:
    finish(services, job)
    with services.database.write() as session:
        session.add(
            Model(
                name="ft:tiny:default::12345678", kind="adapter", project="default", created_at=database_now(),
                base_model="tiny", job_id=job.id, prefix=f"jobs/{job.id}/attempt-1/model", bytes=1, details={},
            )
        )  # fmt: skip
    make_job(services, name="user", model=NAME.format(3))
    assert client.delete("/v1/models/ft:tiny:default::12345678").json()["deleted"]
    assert listed_steps(services) == stored_steps(services, job, "model") == [3], "a job needs it"


def test_old_checkpoints_of_ended_jobs_are_deleted(services: Services, job: Job) -> None:
    days = services.settings.retain_checkpoints_days
    finish(services, job, 2 * days)
    retain_checkpoints(services)
    assert listed_steps(services) == [1, 2, 3, 4, 5], "an operator has as many days to decide otherwise"
    for age, kept in ((days - 1, [1, 2, 3, 4, 5]), (days + 1, [3])):
        with services.database.write() as session:
            session.execute(update(Chore).values(due_at=0.0, cursor=str(now(session) - (days + 1) * 86400)))
            session.execute(update(Job).where(Job.id == job.id).values(status=Status.RUNNING, lease_owner="test"))
        finish(services, job, age)
        if age > days:
            make_job(services, name="user", model=NAME.format(3))
        retain_checkpoints(services)
        assert listed_steps(services) == stored_steps(services, job, "model") == kept
    assert days == 30, "the documented default"

"""Which checkpoints of a running job are kept: rows and objects, on both databases."""

import threading
from pathlib import Path

import pytest
from sqlalchemy import select, text, update

from app.database import database_now
from app.jobs.states import Status
from app.jobs.tables import Checkpoint, Job
from app.models import repository as models
from app.services import Services
from tests.helpers.jobs import claim, get, make_job
from tests.helpers.servers import wait_until
from worker import checkpoints
from worker.checkpoints import Checkpoints
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
                    metrics={}, model_name=NAME.format(step), prefix=prefix,
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

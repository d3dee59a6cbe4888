"""Pruning deletes the objects that no row needs, and no others."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, update

from app import chores, counted_objects
from app.chores import Chore
from app.database import database_now, new_id
from app.derived_artifacts.tables import DerivedArtifact
from app.errors import Conflict
from app.files.tables import File
from app.installation import Installation, database_installation, store_installation
from app.jobs import events as job_events
from app.jobs.states import Status
from app.jobs.tables import Checkpoint, Job, JobEvent
from app.models.tables import Model
from app.prune import prune, prune_slice
from app.services import Services
from app.uploads.tables import Upload, UploadPart
from tests.helpers.api import upload
from tests.helpers.jobs import make_job
from worker.housekeeping import forget_old_events, prune_objects


def test_pruning_keeps_only_the_objects_that_a_row_needs(
    client: TestClient, services: Services, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file_id = upload(client)
    ended = make_job(services, name="ended", status=Status.SUCCEEDED)
    running = make_job(services, name="running", status=Status.RUNNING)
    needed = {f"files/{file_id}"}
    unneeded = {"files/file-none", "uploads/upload-none/part-none", f"uploads/upload-1/{new_id('part')}"}
    with services.database.write() as session:
        session.add(
            Model(
                name="ft:tiny:default::x", kind="adapter", project="default", created_at=database_now(), bytes=1,
                base_model="tiny", job_id=ended, prefix=f"jobs/{ended}/attempt-2/model", details={},
            )
        )  # fmt: skip
        session.add(
            Checkpoint(
                id="ftckpt-1", job_id=ended, created_at=database_now(), stage="dpo", step_number=5, metrics={},
                model_name="ft:tiny:default::x:ckpt-step-5", prefix=f"jobs/{ended}/attempt-1/checkpoints/5",
            )
        )  # fmt: skip
        session.add(
            Upload(
                id="upload-1", project="default", created_at=database_now(), expires_at=database_now() + 60,
                filename="x", purpose="fine-tune", bytes=5, status="pending",
            )
        )  # fmt: skip
        session.flush()
        session.add(UploadPart(id="part-1", upload_id="upload-1", created_at=database_now(), bytes=5))
        for name, status, result in (
            ("done", "done", {"prefix": "merged/task-done/attempt-2"}),
            ("making", "pending", None),
        ):
            session.add(
                DerivedArtifact(
                    id=f"task-{name}", kind="merge", subject=name, owner=name, project="default", arguments={},
                    created_at=database_now(), status=status, result=result, attempt=2, eligible_at=0.0,
                    lost_attempts=0,
                )
            )  # fmt: skip
    needed |= {
        f"jobs/{ended}/attempt-2/model/adapter_model.safetensors",
        f"jobs/{ended}/attempt-1/checkpoints/5/model/adapter_model.safetensors",
        f"jobs/{ended}/attempt-1/trainer.log",
        f"jobs/{running}/attempt-1/checkpoints/9/optimizer.safetensors",
        "uploads/upload-1/part-1",
        "merged/task-done/attempt-2/model.safetensors",
        "merged/task-making/attempt-1/model.safetensors",
        "cache/tokens/x/y",
    }
    unneeded |= {
        f"jobs/{ended}/attempt-1/checkpoints/5/optimizer.safetensors",
        f"jobs/{ended}/attempt-1/checkpoints/6/model/adapter_model.safetensors",
        f"jobs/{ended}/attempt-2/model-of-another/x",
        "jobs/ftjob-none/attempt-1/model/x",
        "merged/task-done/attempt-1/model.safetensors",
        "merged/task-none/attempt-1/model.safetensors",
    }
    with services.database.write() as session:
        job_events.add(session, ended, "told")
    for key in (needed | unneeded) - {f"files/{file_id}"}:
        services.storage.put_bytes(key, b"x")
    (cached := tmp_path / "cached").write_bytes(b"cached")
    before = services.projects.get("default").storage_bytes
    counted_objects.put(services.storage, services.database, "default", "cache/tokens/x/y", cached)
    assert services.projects.get("default").storage_bytes == before + 6
    assert prune(services, delete=True) == (len(needed | unneeded), 0), (
        "young objects stay: their rows may not be committed yet"
    )
    assert prune(services, delete=False, min_age=0.0) == (len(needed), len(unneeded))
    assert prune(services, delete=True, min_age=0.0) == (len(needed), len(unneeded))
    remaining = {
        key for prefix in ("files", "uploads", "jobs", "merged", "cache") for key, _ in services.storage.list(prefix)
    }
    assert remaining == needed
    monkeypatch.setattr("app.prune.CACHE_SECONDS", 0.0)
    assert prune(services, delete=True, min_age=0.0) == (len(needed) - 1, 1)
    assert services.storage.list("cache") == []
    assert services.projects.get("default").storage_bytes == before


def test_a_deleted_file_keeps_its_bytes_until_housekeeping(client: TestClient, services: Services) -> None:
    """An unfinished job may still read it. `purge_deleted_files` decides."""
    file_id = upload(client)
    client.delete(f"/v1/files/{file_id}")
    with services.database.read() as session:
        assert session.get_one(File, file_id).deleted_at is not None
    assert prune(services, delete=True, min_age=0.0) == (1, 0)


def test_pruning_refuses_the_store_of_another_installation(client: TestClient, services: Services) -> None:
    """An empty database needs no object. It would delete everything in the store of another installation."""
    upload(client)
    assert prune(services, delete=True, min_age=0.0) == (1, 0)
    with services.database.write() as session:
        session.execute(update(Installation).values(id="another"))
    with pytest.raises(Conflict, match="another installation"):
        prune(services, delete=True, min_age=0.0)
    with pytest.raises(Conflict, match="another installation"):
        prune_objects(services)
    assert len(services.storage.list("files")) == 1
    ready = client.get("/readyz")
    assert (ready.status_code, list(ready.json()["problems"])) == (503, ["storage"])


def make_due(services: Services) -> None:
    with services.database.write() as session:
        session.execute(update(Chore).values(due_at=0.0))


def test_one_worker_prunes_slice_by_slice(services: Services) -> None:
    """The store is listed in pieces, by whoever comes first. The cursor is in the database."""
    assert prune_slice(services, "", delete=True, min_age=0.0, limit=3).cursor == "", "an empty store is claimed"
    unneeded = [f"{prefix}/{name}" for prefix in ("files", "jobs", "merged") for name in "abcd"]
    for key in unneeded:
        services.storage.put_bytes(key, b"x")
    left, cursor, slices = len(unneeded), "", 0
    while True:
        pruned = prune_slice(services, cursor, delete=True, min_age=0.0, limit=3)
        left, slices, cursor = left - pruned.unneeded, slices + 1, pruned.cursor
        assert sum(len(services.storage.list(prefix)) for prefix in ("files", "jobs", "merged")) == left
        if not cursor:
            break
    assert (left, slices) == (0, 5), "four full slices, and one that finds the end"


def test_a_chore_is_done_by_one_worker_at_a_time(services: Services) -> None:
    assert chores.take(services.database, "sweep the floor", 60.0) == ""
    assert chores.take(services.database, "sweep the floor", 60.0) is None, "another worker has it"
    chores.note(services.database, "sweep the floor", "the kitchen", 60.0)
    assert chores.take(services.database, "sweep the floor", 60.0) is None, "it is not due"
    make_due(services)
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda _: chores.take(services.database, "sweep the floor", 60.0), range(16)))
    assert sorted(taken, key=str) == [None] * 15 + ["the kitchen"]
    with services.database.write() as session:
        session.execute(update(Chore).values(due_at=database_now() + 1000.0))
    assert chores.take(services.database, "sweep the floor", 60.0) is not None, "the clock was set back"


def test_a_database_does_not_claim_a_store_whose_objects_it_does_not_know(services: Services) -> None:
    services.storage.put_bytes("files/file-of-another", b"x")
    with pytest.raises(Conflict, match="another installation"):
        prune_objects(services)
    assert services.storage.list("files") and store_installation(services.storage) is None
    services.storage.delete("files/file-of-another")
    make_due(services)
    prune_objects(services)
    assert store_installation(services.storage) == database_installation(services.database), "an empty store is claimed"


def test_events_of_old_jobs_are_deleted_and_their_results_stay(services: Services) -> None:
    old = make_job(services, name="old", status=Status.SUCCEEDED, metrics={"loss": 0.5})
    new, running = make_job(services, name="new", status=Status.FAILED), make_job(services, name="running")
    with services.database.write() as session:
        for job in (old, new, running):
            for number in range(3):
                job_events.add(session, job, f"event {number}", type="metrics", data={"step": number})
        session.execute(update(Job).where(Job.id == old).values(finished_at=database_now() - 100 * 86400))
        session.execute(update(Job).where(Job.id == new).values(finished_at=database_now() - 86400))
    assert prune(services, delete=True) == (0, 0)
    log = f"jobs/{old}/attempt-1/trainer.log"
    services.storage.put_bytes(log, b"x")
    assert forget_old_events(services.database, 365 * 86400) == 0
    assert forget_old_events(services.database, 30 * 86400) == 3
    with services.database.read() as session:
        assert set(session.scalars(select(JobEvent.job_id))) == {new, running}
        assert session.get_one(Job, old).metrics == {"loss": 0.5}
    assert prune(services, delete=True, min_age=0.0) == (0, 1)

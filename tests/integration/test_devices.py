"""The queue knows devices: a job waits for one that has the memory it needs, and says what it waits for."""

import threading
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.broker import Lane
from app.jobs import queue as job_queue
from app.jobs.states import Status
from app.jobs.tables import Job
from app.models import repository as models
from app.projects.tables import Project
from app.services import Services
from app.spec.version import SPEC_VERSION
from app.workers import repository as workers
from tests.helpers.api import upload
from tests.helpers.jobs import check_files, get, make_job
from tests.helpers.tiny_model import make_tiny_model
from worker.base_models import BaseModels, describe
from worker.device import Device, choose, without
from worker.device_health import DeviceHealth
from worker.lease import JobLease
from worker.processes import ForkServer
from worker.trainer.events import Failed
from worker.training_run import Training

GIGABYTE = 10**9
SMALL, LARGE = 24 * GIGABYTE, 80 * GIGABYTE


def report(services: Services, name: str, memory_bytes: int, **details: Any) -> None:
    """A GPU worker that serves the base model `tiny` on a device with this memory."""
    device = {"kind": "cuda", "name": "GPU", "memory_bytes": memory_bytes}
    with services.database.write() as session:
        known = {"device": device, "spec_version": SPEC_VERSION, **details}
        workers.report(session, name, Lane.GPU, ["tiny"], known)


def claim_with(services: Services, memory_bytes: int) -> Job | None:
    with services.database.write() as session:
        return job_queue.claim(session, Status.QUEUED, "test", ["tiny"], memory_bytes)


def test_a_device_claims_only_jobs_that_fit_it(services: Services) -> None:
    """A job behind one that is too large for a device is claimed by it. A job of unknown size may go anywhere."""
    large = make_job(services, name="large", memory_bytes=40 * GIGABYTE, priority=2)
    unknown = make_job(services, name="unknown", priority=1)
    small = make_job(services, name="small", memory_bytes=SMALL)
    assert [job.id for job in (claim_with(services, SMALL), claim_with(services, SMALL)) if job] == [unknown, small]
    assert claim_with(services, SMALL) is None
    claimed = claim_with(services, LARGE)
    assert claimed is not None and claimed.id == large


def claim_on(services: Services, worker: str, free: int | tuple[int, ...], total: int | tuple[int, ...]) -> str | None:
    """The id of the job that `worker` claims with so many free devices: on one machine, or on one, on two, and so on."""
    with services.database.write() as session:
        by_nodes = [(count,) if isinstance(count, int) else count for count in (free, total)]
        devices = job_queue.Devices(*by_nodes)
        job = job_queue.claim(session, Status.QUEUED, f"gpu@{worker}:1", ["tiny"], LARGE, devices=devices)
        return None if job is None else job.id


def test_a_job_takes_as_many_free_devices_as_it_wants(services: Services) -> None:
    jobs = {
        make_job(services, name="wide", least_devices=4, most_devices=4): (4, 4),
        make_job(services, name="elastic", least_devices=2, most_devices=8): (5, 5),
        make_job(services, name="more", least_devices=1, most_devices=2): (4, 2),
        make_job(services, name="one"): (3, 1),
    }
    for job_id, (free, taken) in jobs.items():
        assert claim_on(services, "a", free, 8) == job_id
        with services.database.read() as session:
            assert session.get_one(Job, job_id).devices == taken


def test_a_wide_job_starves_neither_itself_nor_others(services: Services) -> None:
    """One worker keeps its devices free for it. The other workers go on with the jobs behind it."""
    wide = make_job(services, name="wide", least_devices=4, most_devices=4, priority=1)
    narrow = [make_job(services, name=f"narrow-{number}") for number in range(3)]
    assert claim_on(services, "small", 2, 2) == narrow[0]  # it can never run the wide job
    assert claim_on(services, "a", 3, 4) is None  # reserved: nothing behind it starts here
    assert claim_on(services, "a", 3, 4) is None
    assert claim_on(services, "b", 2, 4) == narrow[1]
    urgent = make_job(services, name="urgent", priority=2)
    assert claim_on(services, "a", 3, 4) == urgent  # what comes before it still does
    assert claim_on(services, "b", 3, 4) == narrow[2]
    assert claim_on(services, "a", 4, 4) == wide


def test_a_reserved_job_starts_on_any_worker_that_has_enough_free_devices(services: Services) -> None:
    wide = make_job(services, name="wide", least_devices=4, most_devices=4)
    assert claim_on(services, "busy for days", 3, 8) is None
    assert claim_on(services, "b", 4, 4) == wide


def test_a_job_takes_devices_on_as_many_machines_as_it_allows(services: Services) -> None:
    """A cluster of three machines with four devices each has 4 on one, 8 on two, and 12 on all."""
    total, narrow = (4, 8, 12), {"least_devices": 4, "most_devices": 16}
    taken = {
        make_job(services, name="one", nodes=1, **narrow): 4,
        make_job(services, name="two", nodes=2, **narrow): 8,
        make_job(services, name="all", nodes=3, **narrow): 12,
        make_job(services, name="more", nodes=9, **narrow): 12,
    }
    for job_id, devices in taken.items():
        assert claim_on(services, "ray", total, total) == job_id
        with services.database.read() as session:
            assert session.get_one(Job, job_id).devices == devices
    wide = make_job(services, name="wide", nodes=2, least_devices=8, most_devices=8)
    assert claim_on(services, "one machine", 4, 4) is None  # it can never run it
    assert claim_on(services, "ray", (4, 7, 8), total) is None  # eight are free, on three machines
    assert claim_on(services, "ray", (4, 8, 8), total) == wide
    assert claim_on(services, "ray", (4, 8, 8), total) is None


@pytest.mark.parametrize(
    ("free", "count", "nodes", "machines"),
    [
        ("aaabbc", 1, 1, "c"),  # the smallest that is enough
        ("aaabbc", 2, 1, "bb"),
        ("aaabbc", 4, 2, "aaac"),
        ("aaabbc", 5, 3, "aaabb"),
        ("aaabbc", 6, 3, "aaabbc"),
    ],
)
def test_devices_are_chosen_on_few_machines(free: str, count: int, nodes: int, machines: str) -> None:
    devices = [Device("cuda", "GPU", LARGE, machine=name) for name in free]
    assert "".join(sorted(str(device.machine) for device in choose(devices, count, nodes))) == machines


def test_devices_of_machines_that_were_still_to_start_stay_taken(services: Services) -> None:
    planned = [Device("cuda", "device", LARGE, machine="new-0", is_planned=True)] * 4
    there = [Device("cuda", "GPU", LARGE, machine=name) for name in "aaaabbbb"]
    assert len(without([*there, *planned], planned)) == 8  # not there yet
    assert len(without(there, planned)) == 4  # one of both is the machine that was planned
    assert without(there, [*there[:4], *there[:1]]) == there[4:]  # the first machine was lost, or is taken twice


def test_the_reservation_of_a_worker_that_is_gone_ends(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_queue, "RESERVATION_SECONDS", -1.0)
    job_queue._claiming.cache_clear()
    try:
        wide = make_job(services, name="wide", least_devices=4, most_devices=4)
        assert claim_on(services, "gone", 1, 4) is None
        assert claim_on(services, "b", 4, 4) == wide
    finally:
        job_queue._claiming.cache_clear()


def test_a_job_that_wants_more_devices_than_any_worker_has_is_refused(
    client: TestClient, services: Services, tmp_path: Path
) -> None:
    report(services, "small", SMALL, devices=2)
    with services.database.write() as session:
        folder = make_tiny_model(tmp_path / "tiny")
        models.register(session, "tiny", "v1", describe("tiny", folder).details)
    body = {"model": "tiny", "training_file": upload(client), "resources": {"gpus": {"min": 3, "max": 8}}}
    answer = client.post("/v1/fine_tuning/jobs", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("does_not_fit", "resources.gpus")
    assert "wants 3 devices, and the largest worker has 2. Lower 'resources.gpus'." in error["message"]
    report(services, "cluster", SMALL, devices=2, machines=[2, 2])
    refused = client.post("/v1/fine_tuning/jobs", json=body).json()["error"]
    assert "2 machines have so many: raise 'resources.nodes'." in refused["message"]
    accepted_body = body | {"resources": {"gpus": 3, "nodes": 2}}
    spread = get(services, client.post("/v1/fine_tuning/jobs", json=accepted_body).json()["id"])
    assert (spread.least_devices, spread.nodes) == (3, 2)
    with services.database.write() as session:
        workers.leave(session, "cluster")
    evaluation = {
        "type": "preference",
        "candidate": {"model": "tiny"},
        "baseline": {"model": "tiny"},
        "data": body["training_file"],
    }
    answer = client.post("/v1/evaluations", json=evaluation | {"resources": {"gpus": 3}})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "resources.gpus"
    accepted = client.post("/v1/evaluations", json=evaluation | {"resources": {"gpus": {"max": 4}}}).json()
    row = get(services, accepted["id"])
    assert (row.least_devices, row.most_devices) == (1, 4)
    alone = get(services, client.post("/v1/evaluations", json=evaluation).json()["id"])
    assert (alone.least_devices, alone.most_devices) == (1, 1) and "resources" not in alone.spec
    job = client.post("/v1/fine_tuning/jobs", json=body | {"resources": {"gpus": 2}}).json()
    assert job["resources"] == {"gpus": 2, "nodes": 1} and job["devices"] is None
    plain = client.post("/v1/fine_tuning/jobs", json=body | {"resources": {"gpus": "auto"}}).json()
    assert plain["resources"] is None


def test_a_wide_job_says_that_no_worker_is_wide_enough(client: TestClient, services: Services) -> None:
    job_id = make_job(services, least_devices=4, most_devices=4)
    report(services, "small", LARGE, devices=2)
    assert waits_for(client, job_id) == "a worker with 4 devices; the largest has 2"
    spread = make_job(services, name="spread", least_devices=5, most_devices=5, nodes=2)
    report(services, "cluster", LARGE, devices=2, machines=[2, 2, 2])
    assert waits_for(client, spread) == "a worker with 5 devices on at most 2 machines; the largest has 4"


def test_the_forecast_counts_the_devices_of_a_worker(client: TestClient, services: Services) -> None:
    """Two narrow jobs run side by side on a worker with two devices. The wide one starts when both have ended."""
    report(services, "gpu@a:1", LARGE, devices=2)
    running = make_job(services, name="running", estimated_seconds=100.0)
    assert claim_on(services, "a", 2, 2) == running
    narrow = make_job(services, name="narrow", estimated_seconds=500.0)
    wide = make_job(services, name="wide", least_devices=2, most_devices=2, estimated_seconds=100.0)
    jobs = {name: client.get(f"/v1/fine_tuning/jobs/{job_id}").json() for name, job_id in (("n", narrow), ("w", wide))}
    now = jobs["n"]["estimated_start"]
    assert jobs["w"]["estimated_start"] - now in range(498, 503)


def waits_for(client: TestClient, job_id: str) -> str | None:
    text: str | None = client.get(f"/v1/fine_tuning/jobs/{job_id}").json()["waiting_for"]
    return text


def test_a_queued_job_says_what_it_waits_for(client: TestClient, services: Services) -> None:
    job_id = make_job(services, memory_bytes=40 * GIGABYTE)
    assert waits_for(client, job_id) == "a GPU worker that serves tiny"
    report(services, "small", SMALL)
    assert waits_for(client, job_id) == "a device with 40.0 GB of memory; the largest has 24.0 GB"
    report(services, "large", LARGE, problem="lost")
    assert waits_for(client, job_id) == "a GPU worker whose device works: it is out of service"
    report(services, "large", LARGE)
    assert waits_for(client, job_id) is None
    with services.database.write() as session:
        session.get_one(Project, "default").max_running_jobs = 0
    assert waits_for(client, job_id) == "the end of a running job: the project may run 0 at a time"
    job = client.get(f"/v1/fine_tuning/jobs/{job_id}").json()
    assert job["queue_position"] == 1


def test_the_check_of_a_jobs_files_says_what_memory_it_needs(client: TestClient, services: Services) -> None:
    """A longer row needs more. A job of an unknown base model needs nothing known."""
    folder: Path = services.settings.models_dir / "small"
    make_tiny_model(folder)
    needs = []
    for length in (10, 8000):
        with services.database.write() as session:
            models.register(session, "small", "r1", describe("small", folder).details)
        row = b'{"prompt": "%s", "chosen": "yes", "rejected": "no"}\n' % (b"w " * length)
        body = {"model": "small", "training_file": upload(client, row)}
        job_id = client.post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()["id"]
        check_files(services)
        needs.append(get(services, job_id).memory_bytes)
    assert needs[0] is not None and needs[1] is not None and 0 < needs[0] < needs[1]


def test_a_job_that_names_no_number_of_devices_gets_the_fewest_on_which_it_fits(
    client: TestClient, services: Services
) -> None:
    folder: Path = services.settings.models_dir / "tiny"
    make_tiny_model(folder)
    row = b'{"prompt": "w", "chosen": "yes", "rejected": "no"}\n'
    taken = []
    for layers in (4, 400):  # the second one fills 20 GB as nf4
        details = describe("tiny", folder).details
        details["shape"] |= {"layers": layers, "linears": [["up_proj", 8192, 12_288, layers]]}
        with services.database.write() as session:
            models.register(session, "tiny", "r1", details)
        report(services, "wide", 12 * GIGABYTE, devices=4)
        body = {"model": "tiny", "training_file": upload(client, row)}
        job_id = client.post("/v1/fine_tuning/jobs", json=body).json()["id"]
        check_files(services)
        job = get(services, job_id)
        taken.append((job.least_devices, job.most_devices))
        assert job.memory_bytes is not None and job.memory_bytes < 12 * GIGABYTE
        if layers == 400:
            answer = client.post("/v1/fine_tuning/jobs", json=body | {"parallel": {"shard": False}})
            assert answer.status_code == 400 and answer.json()["error"]["code"] == "does_not_fit"
    assert taken == [(1, 1), (4, 4)]


@pytest.mark.parametrize("another", [None, SMALL, LARGE])
def test_a_job_that_runs_out_of_memory_waits_for_a_larger_device_if_there_is_one(
    services: Services, another: int | None
) -> None:
    job_id = make_job(services)
    report(services, "mine", SMALL)
    if another is not None:
        report(services, "another", another)
    job = claim_with(services, SMALL)
    assert job is not None
    health = DeviceHealth("cpu")
    assert health.device is not None
    health.devices = [type(health.device)("cuda", "GPU of 24 GB", SMALL)]
    attempt = Training(services, BaseModels(services.settings), job, threading.Event(), ForkServer(), health)
    attempt.outcome = Failed("out_of_memory", "The model does not fit.", "model")
    with JobLease(services.database, job_id, job.attempt) as attempt.lease:
        attempt._finish(1)
    row = get(services, job_id)
    if another == LARGE:
        assert (row.status, row.lost_attempts, row.memory_bytes) == (Status.QUEUED, 0, SMALL + 1)
        assert claim_with(services, SMALL) is None and claim_with(services, LARGE) is not None
    else:
        assert row.status == Status.FAILED and row.error is not None and row.error["code"] == "out_of_memory"

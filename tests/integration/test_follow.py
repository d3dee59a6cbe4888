"""Events as a stream, and metrics as series."""

import json
import random
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.jobs import events as job_events
from app.jobs.downsample import downsample
from app.jobs.states import Status
from app.services import Services
from tests.helpers.api import error_of, key_of
from tests.helpers.jobs import make_job


def events_of(text: str) -> list[dict[str, Any]]:
    """Parse a text/event-stream by the rules of the standard."""
    events = []
    for block in text.split("\n\n"):
        fields: dict[str, Any] = {}
        for line in block.splitlines():
            name, _, value = line.partition(": ")
            if name:
                fields[name] = value
        if "data" in fields:
            events.append(fields | {"data": json.loads(fields["data"])})
    return events


@pytest.fixture
def job_id(services: Services) -> str:
    """A job that ran for 30 steps, the last ten of them twice, and ended."""
    job_id = make_job(services, status=Status.SUCCEEDED)
    with services.database.write() as session:
        for step in [*range(1, 31), *range(21, 31)]:
            data = {
                "step": step,
                "stage": "sft" if step <= 10 else "dpo",
                "total_steps": 30,
                "loss": float(step),
                "train_loss": float(step),
            }
            job_events.add(session, job_id, f"Step {step}", type="metrics", data=data)
        job_events.add(session, job_id, "done")
    return job_id


def test_a_stream_has_every_event_and_the_state_and_ends_with_the_job(client: TestClient, job_id: str) -> None:
    answer = client.get(f"/v1/fine_tuning/jobs/{job_id}/stream")
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = events_of(answer.text)
    assert [event["event"] for event in events] == ["metrics"] * 40 + ["message", "job"]
    assert events[-1]["data"]["status"] == "succeeded" and "id" not in events[-1]
    listing = client.get(f"/v1/fine_tuning/jobs/{job_id}/events", params={"limit": 100}).json()["data"]
    assert [event["data"] for event in events[:-1]] == listing[::-1]


def test_a_stream_resumes_after_the_last_event_id(client: TestClient, job_id: str) -> None:
    whole = events_of(client.get(f"/v1/fine_tuning/jobs/{job_id}/stream").text)
    resumed = client.get(f"/v1/fine_tuning/jobs/{job_id}/stream", headers={"Last-Event-ID": whole[24]["id"]})
    assert events_of(resumed.text) == whole[25:]
    unknown = client.get(f"/v1/fine_tuning/jobs/{job_id}/stream", headers={"Last-Event-ID": "ftevent-none"})
    assert error_of(unknown, 404)["param"] == "Last-Event-ID"
    error_of(client.get("/v1/fine_tuning/jobs/ftjob-none/stream"), 404)


def test_a_browser_opens_a_stream_with_a_token(client: TestClient, services: Services, job_id: str) -> None:
    url = f"/v1/fine_tuning/jobs/{job_id}"
    grant = client.post(f"{url}/stream_token").json()
    client.headers.pop("Authorization")
    assert len(events_of(client.get(grant["url"]).text)) == 42
    assert (
        error_of(client.get(f"{url}/stream", params={"token": grant["token"] + "0"}), 401)["code"]
        == "invalid_stream_token"
    )
    error_of(client.get(f"{url}?token={grant['token']}"), 401)
    error_of(client.get(f"{url}/stream"), 401)
    stranger = {"Authorization": f"Bearer {key_of(services, 'other')}"}
    error_of(client.post(f"{url}/stream_token", headers=stranger), 404)


def test_a_metric_series_has_each_step_once(client: TestClient, job_id: str) -> None:
    metrics = client.get(f"/v1/fine_tuning/jobs/{job_id}/metrics").json()
    assert metrics["stages"] == {"sft": 1, "dpo": 11}
    assert list(metrics["series"]) == ["loss"]
    assert metrics["series"]["loss"] == [{"step": step, "value": float(step)} for step in range(1, 31)]
    thinned = client.get(f"/v1/fine_tuning/jobs/{job_id}/metrics", params={"points": 5, "names": ["loss"]}).json()
    assert len(thinned["series"]["loss"]) == 5
    assert client.get(f"/v1/fine_tuning/jobs/{job_id}/metrics", params={"names": ["kl"]}).json()["series"] == {}


def test_thinning_keeps_the_ends_the_order_and_the_peaks() -> None:
    generator = random.Random(0)
    points = [(step, generator.random()) for step in range(5000)]
    points[1234], points[4321] = (1234, 50.0), (4321, -50.0)
    thin = downsample(points, 100)
    assert len(thin) == 100
    assert thin[0] == points[0] and thin[-1] == points[-1]
    assert thin == sorted(thin) and set(thin) <= set(points)
    assert (1234, 50.0) in thin and (4321, -50.0) in thin
    for limit in range(3, 40):
        assert len(downsample(points[:37], limit)) == min(limit, 37)

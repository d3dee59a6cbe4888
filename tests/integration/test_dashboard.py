"""Evaluations and sweeps on the dashboard. The test in a real browser is in tests/acceptance."""

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from app.jobs.states import Status
from app.jobs.tables import Job
from app.services import Services
from app.settings import Settings
from tests.helpers.api import upload
from tests.helpers.evaluations import ENDPOINT_JUDGE, evaluation_body

METRICS = {"win_rate": 0.625, "win_rate/error": 0.05, "win_rate/low": 0.52, "win_rate/high": 0.71, "comparisons": 80.0}


@pytest.fixture
def viewer(client: TestClient, settings: Settings) -> TestClient:
    """A client that has signed in, for the API too."""
    signed = client.post("/dashboard/login", data={"key": settings.admin_key}, follow_redirects=False)
    assert signed.status_code == 303
    return client


def end(services: Services, job_id: str, **columns: object) -> None:
    with services.database.write() as session:
        session.execute(update(Job).where(Job.id == job_id).values(status=Status.SUCCEEDED, **columns))


def test_an_evaluation_is_shown_with_its_intervals(viewer: TestClient, services: Services) -> None:
    assert "No evaluations yet" in viewer.get("/dashboard/evaluations").text
    request = evaluation_body(
        viewer, type="win_rate", judge=ENDPOINT_JUDGE, name="<b>wins</b>", baseline={"answers": "chosen"}
    )
    evaluation = viewer.post("/v1/evaluations", json=request).json()["id"]
    verdict = {"metric": "win_rate/low", "min": 0.6, "max": None, "value": 0.52, "met": False}
    end(services, evaluation, metrics=METRICS, gates=[verdict])
    listing = viewer.get("/dashboard/evaluations").text
    assert evaluation in listing and "win_rate 0.6250  (0.5200 to 0.7100)" in listing and "chosen answers" in listing
    page = viewer.get(f"/dashboard/evaluations/{evaluation}").text
    assert "&lt;b&gt;wins&lt;/b&gt;" in page and "0.52 to 0.71" in page and "win_rate/error" not in page
    assert "<td>win_rate/low</td><td>0.6</td>" in page and f"Created evaluation: {evaluation}" in page
    live = viewer.get(f"/dashboard/evaluations/{evaluation}", headers={"HX-Request": "true"}).text
    assert 'data-status="succeeded"' in live and "<html" not in live
    assert viewer.get("/dashboard/evaluations/eval-none").status_code == 404


def test_a_sweep_is_shown_with_its_frontier(viewer: TestClient, services: Services) -> None:
    assert "No sweeps yet" in viewer.get("/dashboard/sweeps").text
    classifier = upload(viewer, b'{"terms": {"good": [1, 1]}, "intercept": 0}')
    judge = {"type": "classifier", "classifier": {"file": classifier}}
    file = upload(viewer)
    evaluation = {"name": "frontier", "type": "reward_kl", "data": file, "judge": judge}
    job = {"model": "tiny", "training_file": file, "method": {"type": "dpo"}, "evaluations": [evaluation]}
    sweep = viewer.post("/v1/sweeps", json={"job": job, "grid": {"beta": [0.1, 0.5, 1.0]}}).json()
    page = viewer.get(f"/dashboard/sweeps/{sweep['id']}").text
    assert page.count("/dashboard/jobs/ftjob-") == 3 and "<img" not in page
    assert viewer.get(f"/dashboard/sweeps/{sweep['id']}/frontier").status_code == 404
    for member, (kl, reward) in zip(sweep["jobs"], [(5.0, 0.9), (2.0, 0.7), (3.0, 0.6)], strict=True):
        end(services, member["id"])
        end(services, member["evaluations"]["frontier"]["id"], metrics={"kl": kl, "reward": reward})
    page = viewer.get(f"/dashboard/sweeps/{sweep['id']}").text
    assert 'data-status="succeeded"' in page and "evaluations/frontier/kl" in page
    assert (page.count("<td>yes</td>"), page.count("<td>no</td>")) == (2, 1), "the Pareto set"
    picture = viewer.get(page.partition('<img class="frontier" src="')[2].partition('"')[0])
    assert picture.headers["content-type"].startswith("image/svg+xml") and picture.text.count("<circle") > 3
    assert "beta: 0.1, 0.5, 1.0" in viewer.get("/dashboard/sweeps").text
    job_page = viewer.get(f"/dashboard/jobs/{sweep['jobs'][0]['id']}").text
    assert f"/dashboard/evaluations/{sweep['jobs'][0]['evaluations']['frontier']['id']}" in job_page
    assert f"/dashboard/sweeps/{sweep['id']}" in job_page


def test_evaluations_of_another_project_are_not_shown(
    client: TestClient, settings: Settings, services: Services
) -> None:
    evaluation = client.post("/v1/evaluations", json=evaluation_body(client)).json()["id"]
    client.post("/v1/projects", json={"id": "other"}).raise_for_status()
    key = client.post("/v1/keys", json={"name": "k", "project": "other"}).json()["key"]
    client.post("/dashboard/login", data={"key": key}, follow_redirects=False)
    assert client.get(f"/dashboard/evaluations/{evaluation}").status_code == 404
    assert evaluation not in client.get("/dashboard/evaluations").text

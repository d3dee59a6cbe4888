"""Lists by metadata: the same jobs with labels, without them, and while a worker writes them."""

from itertools import product
from typing import Any

from fastapi.testclient import TestClient
from sqlalchemy import select, update

from app.jobs.labels import label
from app.jobs.tables import Job, JobLabel
from app.services import Services
from tests.helpers.api import upload
from tests.helpers.jobs import make_job
from worker.housekeeping import label_jobs

TEAMS, STAGES = ("a", "b", None), ("x", "y", None)


def listed(client: TestClient, params: dict[str, str], limit: int) -> list[str]:
    """The ids of all pages."""
    found: list[str] = []
    while True:
        page: dict[str, Any] = {"limit": limit, **params} | ({"after": found[-1]} if found else {})
        answer = client.get("/v1/fine_tuning/jobs", params=page).json()
        found += [job["id"] for job in answer["data"]]
        if not answer["has_more"]:
            return found


def test_pages_by_metadata_are_the_same_before_and_after_the_labelling(client: TestClient, services: Services) -> None:
    metadata_of: dict[str, dict[str, str]] = {}
    for number, (team, stage) in enumerate(product(TEAMS, STAGES)):
        pairs = {name: value for name, value in (("team", team), ("stage", stage)) if value is not None}
        for copy in range(3):
            job_id = make_job(services, name=f"{number}-{copy}", job_metadata=pairs or None)
            metadata_of[job_id] = pairs
    newest_first = list(metadata_of)[::-1]

    def expected(**wanted: str) -> list[str]:
        return [job_id for job_id in newest_first if wanted.items() <= metadata_of[job_id].items()]

    def check() -> None:
        for limit in (2, 100):
            assert listed(client, {}, limit) == newest_first
            assert listed(client, {"metadata": "null"}, limit) == [job for job in newest_first if not metadata_of[job]]
            for team, stage in product("ab", "xy"):
                assert listed(client, {"metadata[team]": team}, limit) == expected(team=team)
                both = {"metadata[team]": team, "metadata[stage]": stage}
                assert listed(client, both, limit) == expected(team=team, stage=stage)
            assert (
                listed(client, {"metadata[team]": "c"}, limit) == listed(client, {"metadata[eam]": "ta"}, limit) == []
            )

    check()
    with services.database.write() as session:
        some = session.scalars(select(Job).where(Job.id.in_(newest_first[::2])))

        for job in some:
            label(session, job)
    check()
    label_jobs(services)
    check()
    with services.database.read() as session:
        assert session.scalars(select(Job).where(Job.labelled.is_(False))).all() == []


def test_a_new_job_has_its_labels_at_once(client: TestClient, services: Services) -> None:
    body = {"model": "tiny", "training_file": upload(client), "metadata": {"team": "a", "": "empty", "long": "v" * 512}}
    job_id = client.post("/v1/fine_tuning/jobs", json=body).json()["id"]
    with services.database.write() as session:
        assert len(session.scalars(select(JobLabel).where(JobLabel.job_id == job_id)).all()) == 3
        session.execute(update(Job).values(job_metadata={"team": "the row is not read"}))
    assert listed(client, {"metadata[team]": "a", "metadata[long]": "v" * 512}, 20) == [job_id]

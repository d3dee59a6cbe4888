"""People label: who gets which item, what a verdict writes, and what the other people see."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, update

from app.database import database_now, new_id
from app.jobs import queue as job_queue
from app.jobs.states import Status
from app.jobs.tables import Job
from app.keys.schemas import KeySpec, Scope
from app.labellings import queue as label_queue
from app.labellings.people import shown_order
from app.labellings.tables import LabelItem, LabelVerdict
from app.services import Services
from app.spec.datasets.check import examples, survey
from app.spec.labelling import LabellingSpec
from tests.helpers.api import error_of, key_of, upload
from tests.helpers.jobs import make_job

ANSWERS = ["short", "a longer one", "the longest of all"]


def labelling(services: Services, *, items: int = 3, answers: int = 2, **people: Any) -> str:
    """A labelling that waits for people."""
    spec = LabellingSpec.model_validate(
        {
            "data": "file-1", "writers": [{"model": "tiny"}], "sampling": {"samples": answers},
            "labellers": [{"people": people}], "quantization": "none",
        }
    )  # fmt: skip
    job_id = make_job(
        services, id=new_id("labelling"), kind="labelling", spec=spec.resolved().to_store(), status=Status.QUEUED
    )
    with services.database.write() as session:
        session.execute(update(Job).where(Job.id == job_id).values(awaits="people"))
        label_queue.add(
            session, job_id, [(k, {"prompt": f"prompt {k}", "answers": ANSWERS[:answers]}) for k in range(items)]
        )
    return job_id


class Annotator:
    """A person with a key that may only label."""

    def __init__(self, client: TestClient, services: Services, job_id: str, name: str) -> None:
        created = services.keys.create(KeySpec(name=name, scopes=[Scope.LABEL]))
        self.id, self.name, self.headers = created.id, name, {"Authorization": f"Bearer {created.key}"}
        self.client, self.path, self.job_id = client, f"/v1/labellings/{job_id}", job_id

    def next(self) -> dict[str, Any]:
        answer = self.client.post(f"{self.path}/next", headers=self.headers)
        assert answer.status_code == 200, answer.text
        given: dict[str, Any] = answer.json()
        return given

    def say(self, item: int, status: int = 200, **verdict: Any) -> dict[str, Any]:
        answer = self.client.post(f"{self.path}/verdicts", json={"item": item, **verdict}, headers=self.headers)
        assert answer.status_code == status, answer.text
        said: dict[str, Any] = answer.json()
        return said

    def prefer_longer(self) -> int | None:
        """Rank the next item; returns its number."""
        task = self.next()["task"]
        if task is None:
            return None
        places = sorted(range(len(task["answers"])), key=lambda place: -len(task["answers"][place]))
        self.say(task["item"], ranking=[[place] for place in places])
        return int(task["item"])


def test_two_people_never_get_one_item_and_each_gets_the_same_until_the_verdict(
    client: TestClient, services: Services
) -> None:
    job_id = labelling(services, items=2)
    anna, ben, cleo = (Annotator(client, services, job_id, name) for name in ("anna", "ben", "cleo"))
    first = anna.next()["task"]
    assert first == anna.next()["task"] and first["item"] == 0, "a reload gives the same item"
    assert ben.next()["task"]["item"] == 1
    given = cleo.next()
    assert given["task"] is None and given["open"], "the others have all items"
    error = cleo.say(0, 409, ranking=[[0], [1]])["error"]
    assert error["code"] == "not_given"
    with services.database.write() as session:  # anna's time runs out
        session.execute(update(LabelItem).where(LabelItem.number == 0).values(reserved_until=database_now() - 1))
    assert cleo.next()["task"]["item"] == 0
    assert anna.next()["task"] is None
    assert anna.say(0, 409, ranking=[[0], [1]])["error"]["code"] == "not_given"


def test_an_item_goes_to_as_many_people_as_are_wanted_and_then_a_worker_goes_on(
    client: TestClient, services: Services
) -> None:
    job_id = labelling(services, items=2, verdicts=2)
    anna, ben, cleo = (Annotator(client, services, job_id, name) for name in ("anna", "ben", "cleo"))
    assert [anna.prefer_longer(), anna.prefer_longer(), anna.prefer_longer()] == [0, 1, None]
    assert claimed(services) is None, "no worker takes it while people label"
    assert client.get(f"/v1/labellings/{job_id}").json()["waiting_for"] == "people"
    assert ben.next()["task"]["item"] == 0
    assert [cleo.prefer_longer(), ben.prefer_longer()] == [1, 0]
    state = client.get(f"/v1/labellings/{job_id}/people").json()
    assert state["open"] is False and (state["verdicts"], state["wanted"], state["items"]) == (4, 4, 2)
    assert [(one["name"], one["verdicts"]) for one in state["annotators"]] == [("anna", 2), ("ben", 1), ("cleo", 1)]
    assert ben.next()["open"] is False
    job = claimed(services)
    assert job is not None and job.id == job_id
    with services.database.read() as session:
        verdicts = label_queue.verdicts(session, job_id)
    assert {number: [one.annotator for one in found] for number, found in verdicts.items()} == {
        0: ["anna", "ben"], 1: ["anna", "cleo"]
    }  # fmt: skip
    assert all(one.ranking == [[1], [0]] for found in verdicts.values() for one in found), "the longer one is place 1"


def claimed(services: Services) -> Job | None:
    with services.database.write() as session:
        return job_queue.claim(session, Status.QUEUED, "test", ["tiny"])


def test_the_order_of_answers_is_drawn_for_each_person(client: TestClient, services: Services) -> None:
    job_id = labelling(services, items=12, answers=3, verdicts=2)
    people = [Annotator(client, services, job_id, name) for name in ("anna", "ben")]
    shown = []
    for person in people:
        orders = []
        while (task := person.next()["task"]) is not None:
            orders.append([ANSWERS.index(answer) for answer in task["answers"]])
            assert orders[-1] == shown_order(job_id, task["item"], person.id, 3)
            person.say(task["item"], ranking=[[2], [0, 1]])
        shown.append(orders)
    assert shown[0] != shown[1] and len({tuple(order) for orders in shown for order in orders}) > 3
    with services.database.read() as session:
        for number, found in label_queue.verdicts(session, job_id).items():
            for orders, verdict in zip(shown, found, strict=True):
                best, *others = orders[number][2], orders[number][0], orders[number][1]
                assert verdict.ranking == [[best], sorted(others)]


def test_undo_brings_an_item_back_and_keeps_the_old_verdict(client: TestClient, services: Services) -> None:
    job_id = labelling(services, items=3)
    anna = Annotator(client, services, job_id, "anna")
    assert anna.prefer_longer() == 0
    assert anna.next()["task"]["item"] == 1
    back = client.post(f"{anna.path}/verdicts/undo", headers=anna.headers).json()
    assert back["task"]["item"] == 0 and back["done"] == 0
    anna.say(0, skip=True)
    assert anna.next()["task"]["item"] == 1, "what was skipped does not come back"
    listed = client.get(f"/v1/labellings/{job_id}/verdicts").json()["data"]
    assert [(one["item"], one["skipped"], one["withdrawn_at"] is None) for one in listed] == [
        (0, False, False), (0, True, True)
    ]  # fmt: skip
    ben = Annotator(client, services, job_id, "ben")
    assert ben.next()["task"]["item"] == 0, "a skipped item goes to somebody else"
    error_of(client.post(f"{ben.path}/verdicts/undo", headers=ben.headers), 404)


def test_a_flagged_item_goes_to_nobody_else(client: TestClient, services: Services) -> None:
    job_id = labelling(services, items=2)
    anna, ben = (Annotator(client, services, job_id, name) for name in ("anna", "ben"))
    assert anna.next()["task"]["item"] == 0
    anna.say(0, flag="it has a name in it")
    assert ben.next()["task"] is None, "anna has the other one"
    assert client.get(f"/v1/labellings/{job_id}/people").json()["flagged"] == 1
    assert anna.prefer_longer() == 1
    assert claimed(services) is not None, "nothing is left to be labelled"


def test_a_verdict_that_is_sent_twice_counts_once(client: TestClient, services: Services) -> None:
    job_id = labelling(services, items=2)
    anna = Annotator(client, services, job_id, "anna")
    anna.next()
    first, again = (anna.say(0, ranking=[[1], [0]]) for _ in range(2))
    assert first["task"]["item"] == again["task"]["item"] == 1
    assert anna.say(0, 409, ranking=[[0], [1]])["error"]["code"] == "already_labelled"
    with services.database.read() as session:
        assert len(session.scalars(select(LabelVerdict.id)).all()) == 1


@pytest.mark.parametrize(
    "verdict",
    [
        {},
        {"ranking": [[0]]},
        {"ranking": [[0], [0, 1]]},
        {"ranking": [[0], [2]]},
        {"ranking": []},
        {"ranking": [[]]},
        {"ranking": [[-1], [0]]},
        {"skip": True, "flag": "both"},
        {"skip": False},
        {"flag": ""},
        {"flag": "x" * 2001},
    ],
)
def test_a_bad_verdict_is_refused(verdict: dict[str, Any], client: TestClient, services: Services) -> None:
    anna = Annotator(client, services, labelling(services), "anna")
    anna.next()
    anna.say(0, 400, **verdict)
    assert anna.next()["task"]["item"] == 0


def test_a_key_that_may_only_label_sees_nothing_else(client: TestClient, services: Services) -> None:
    job_id = labelling(services)
    anna = Annotator(client, services, job_id, "anna")
    anna.prefer_longer()
    for path in ("", "/verdicts", "/people", "/events", "/report"):
        error = error_of(client.get(anna.path + path, headers=anna.headers), 403)
        assert error["code"] == "insufficient_scope", path
    for path in ("/v1/files", "/v1/models", "/v1/fine_tuning/jobs", "/v1/labellings", "/metrics"):
        error_of(client.get(path, headers=anna.headers), 403)
    error_of(client.post(f"{anna.path}/close", headers=anna.headers), 403)


def test_a_key_that_may_read_or_write_may_not_label(client: TestClient, services: Services) -> None:
    job_id = labelling(services)
    for scopes in ([Scope.READ], [Scope.READ, Scope.WRITE]):
        headers = {"Authorization": f"Bearer {key_of(services, 'default', *scopes)}"}
        error_of(client.post(f"/v1/labellings/{job_id}/next", headers=headers), 403)
        session = TestClient(client.app, base_url=str(client.base_url), follow_redirects=False)
        session.post("/dashboard/login", data={"key": headers["Authorization"].removeprefix("Bearer ")})
        answer = session.get(f"/dashboard/label/{job_id}")
        assert answer.status_code == 403 and "scope &#39;label&#39;" in answer.text
    stranger = {"Authorization": f"Bearer {key_of(services, 'other', Scope.LABEL)}"}
    error_of(client.post(f"/v1/labellings/{job_id}/next", headers=stranger), 404)


def test_a_paused_or_closed_labelling_gives_nothing(client: TestClient, services: Services) -> None:
    job_id = labelling(services)
    anna = Annotator(client, services, job_id, "anna")
    anna.next()
    client.post(f"/v1/labellings/{job_id}/pause").raise_for_status()
    assert anna.next() == anna.next() | {"open": False, "task": None}
    assert anna.say(0, 409, ranking=[[0], [1]])["error"]["code"] == "not_waiting_for_people"
    client.post(f"/v1/labellings/{job_id}/resume").raise_for_status()
    assert anna.prefer_longer() == 0
    closed = client.post(f"/v1/labellings/{job_id}/close").raise_for_status().json()
    assert closed["awaits"] is None
    error_of(client.post(f"/v1/labellings/{job_id}/close"), 409)
    assert anna.next()["open"] is False
    assert claimed(services) is not None
    cancelled = labelling(services)
    client.post(f"/v1/labellings/{cancelled}/cancel").raise_for_status()
    assert Annotator(client, services, cancelled, "ben").next()["open"] is False


def test_a_labelling_without_people_has_no_items(client: TestClient, services: Services) -> None:
    spec = LabellingSpec.model_validate(
        {
            "data": "file-1", "own_answers": True,
            "labellers": [{"judge": {"type": "model", "model": "tiny"}}],
        }
    )  # fmt: skip
    job_id = make_job(services, id=new_id("labelling"), kind="labelling", spec=spec.resolved().to_store())
    for path in ("people", "verdicts", "export?format=argilla"):
        assert error_of(client.get(f"/v1/labellings/{job_id}/{path}"), 404)["code"] == "people_not_found"


def test_the_last_two_verdicts_at_once_end_the_labelling(client: TestClient, services: Services) -> None:
    """Each of two people has one of the last items. Whoever is second sees that nothing is left."""
    for _ in range(5):
        job_id = labelling(services, items=2)
        people = [Annotator(client, services, job_id, name) for name in ("anna", "ben")]
        items = [person.next()["task"]["item"] for person in people]
        barrier = threading.Barrier(2)

        def say(
            number: int, people: list[Annotator] = people, items: list[int] = items, barrier: Any = barrier
        ) -> None:
            barrier.wait()
            people[number].say(items[number], ranking=[[0], [1]])

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(say, range(2)))
        with services.database.read() as session:
            assert session.get_one(Job, job_id).awaits is None
        client.post(f"/v1/labellings/{job_id}/cancel")


def test_many_people_at_once_get_each_item_once(client: TestClient, services: Services) -> None:
    job_id = labelling(services, items=20)
    people = [Annotator(client, services, job_id, f"person {k}") for k in range(4)]

    def work(person: Annotator) -> list[int]:
        done = []
        while (item := person.prefer_longer()) is not None:
            done.append(item)
        return done

    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(work, people))
    assert sorted(item for items in done for item in items) == list(range(20))
    assert client.get(f"/v1/labellings/{job_id}").json()["awaits"] is None


@pytest.mark.parametrize(("form", "kind"), [("label_studio", "label_studio"), ("argilla", "argilla")])
def test_an_export_is_a_file_that_trains(form: str, kind: str, client: TestClient, services: Services) -> None:
    """An export for another tool says who won, also once it has come back from that tool."""
    job_id = labelling(services, items=2, answers=3, verdicts=2)
    for name in ("anna", "ben"):
        person = Annotator(client, services, job_id, name)
        while person.prefer_longer() is not None:
            pass
    exported = client.get(f"/v1/labellings/{job_id}/export", params={"format": form})
    assert exported.headers["content-type"] == "application/json"
    records = exported.json()
    report = survey(io.BytesIO(exported.content))
    assert report.error is None and report.format == kind
    read = list(examples(io.BytesIO(exported.content)))
    if form == "argilla":
        assert [example.responses for example in read] == [tuple(reversed(ANSWERS))] * 2
        assert [example.scores for example in read] == [(1.0, 0.5, 0.0)] * 2
        assert records[0]["ranking.responses.users"] == ["anna", "ben"]
    else:
        longer = [("a longer one", "short"), ("the longest of all", "short"), ("the longest of all", "a longer one")]
        assert [example.responses for example in read] == longer * 2
        assert records[0]["data"]["annotators"] == ["anna", "ben"]
    error_of(client.get(f"/v1/labellings/{job_id}/export", params={"format": "excel"}), 400)


def test_the_audit_has_verdicts_and_not_each_look_at_an_item(client: TestClient, services: Services) -> None:
    anna = Annotator(client, services, labelling(services), "anna")
    anna.prefer_longer()
    actions = [event["action"] for event in client.get("/v1/audit").json()["data"] if event["actor"] == anna.id]
    assert actions == ["POST /v1/labellings/{labelling_id}/verdicts"]


def test_undo_takes_no_item_away_from_somebody_else(client: TestClient, services: Services) -> None:
    job_id = labelling(services, items=2, verdicts=2)
    anna, ben = (Annotator(client, services, job_id, name) for name in ("anna", "ben"))
    assert anna.prefer_longer() == 0
    assert ben.next()["task"]["item"] == 0
    back = client.post(f"{anna.path}/verdicts/undo", headers=anna.headers).json()
    assert back["task"]["item"] == 1 and back["done"] == 0, "the verdict is taken back, and the item is with Ben"
    assert ben.prefer_longer() == 0


def test_a_cancelled_labelling_cannot_be_closed(client: TestClient, services: Services) -> None:
    job_id = labelling(services)
    client.post(f"/v1/labellings/{job_id}/cancel").raise_for_status()
    error = error_of(client.post(f"/v1/labellings/{job_id}/close"), 409)
    assert error["code"] == "not_waiting_for_people"
    assert client.get(f"/v1/labellings/{job_id}").json()["awaits"] is None


def test_a_labelling_that_waits_for_people_is_no_work_that_waits(client: TestClient, services: Services) -> None:
    """An autoscaler counts queued jobs, and a project may have so many."""
    labelling(services)
    text = client.get("/metrics").text
    assert 'dpo_jobs{status="queued"} 0.0' in text and 'dpo_jobs{status="paused"} 1.0' in text
    client.post("/v1/projects/default", json={"max_queued_jobs": 1}).raise_for_status()
    body = {"model": "tiny", "training_file": upload(client)}
    assert client.post("/v1/fine_tuning/jobs", json=body).status_code == 200


def test_the_page_changes_nothing_while_nothing_may_be_changed_and_the_audit_has_its_verdicts(
    client: TestClient, services: Services
) -> None:
    job_id = labelling(services)
    anna = Annotator(client, services, job_id, "anna")
    page = TestClient(client.app, base_url=str(client.base_url), follow_redirects=False)
    page.post("/dashboard/login", data={"key": anna.headers["Authorization"].removeprefix("Bearer ")})
    path = f"/dashboard/label/{job_id}"
    assert page.get(path).status_code == 200
    client.post("/v1/operations", json={"read_only": "backup"}).raise_for_status()
    for answer in (page.get(path), page.post(path, data={"item": "0", "verdict": "0 1"})):
        assert answer.status_code == 503 and "backup" in answer.text
    client.post("/v1/operations", json={"read_only": None}).raise_for_status()
    assert page.post(path, data={"item": "0", "verdict": "0 1"}).status_code == 303
    assert page.post(path, data={"item": "0", "verdict": "undo"}).status_code == 303
    events = client.get("/v1/audit").json()["data"]
    actions = [event["action"] for event in events if event["actor"] == anna.id]
    path = "POST /v1/labellings/{labelling_id}/verdicts"
    assert actions == [f"{path}/undo", path]
    for verdict in ("", "0", "a b", "0 0", "0 1 2", "0,1,2"):
        answer = page.post(f"/dashboard/label/{job_id}", data={"item": "0", "verdict": verdict})
        assert answer.status_code == 400 and 'role="alert"' in answer.text, verdict

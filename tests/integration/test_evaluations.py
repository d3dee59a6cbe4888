"""Evaluations over HTTP, without a worker: refused fields, defaults, listings and claims."""

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text, update

from app.broker import Lane
from app.database import database_now
from app.jobs import queue as job_queue
from app.jobs.kinds import EVALUATION_JOB, TRAINING_JOB
from app.jobs.states import Status
from app.jobs.tables import Checkpoint, Job
from app.migrate import migrate
from app.models import repository as models
from app.models.tables import Model
from app.services import Services
from app.spec.evaluation import EvaluationSpec
from app.spec.job import JobSpec
from app.spec.version import SPEC_VERSION
from app.webhooks.tables import WebhookEndpoint
from app.workers import repository as workers
from tests.helpers.api import error_of, upload
from tests.helpers.evaluations import CANDIDATE, ENDPOINT_JUDGE, endpoint_judge, evaluation_body
from tests.helpers.jobs import check_files, make_job
from worker.evaluation_run import rendering_of

SCORED = {"type": "reward_model", "model": "ft:tiny:default::reward"}


def judge_with(**fields: object) -> dict[str, Any]:
    return {"type": "endpoint", "endpoint": ENDPOINT_JUDGE["endpoint"] | fields}


def nested(levels: int) -> dict[str, object]:
    value: dict[str, object] = {}
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.fixture
def trained_model(services: Services) -> str:
    """A model that was trained here from `tiny`, and a reward model."""
    job_id = make_job(services, status=Status.SUCCEEDED)
    with services.database.write() as session:
        for name, kind in (("ft:tiny:default::made", "adapter"), ("ft:tiny:default::reward", "reward")):
            session.add(
                Model(
                    name=name, kind=kind, project="default", created_at=database_now(), base_model="tiny", bytes=2,
                    job_id=job_id, prefix=f"jobs/{job_id}/attempt-1/model", details={"adapter": None, "foundation": None},
                )
            )  # fmt: skip
    return "ft:tiny:default::made"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"type": "win"}, "type"),
        ({"candidate": None}, "candidate"),
        ({"candidate": {"model": "none"}}, "candidate.model"),
        ({"candidate": {}}, "candidate.model"),
        ({"candidate": {"model": "tiny", "file": "file-1"}}, "candidate.file"),
        ({"candidate": {"answers": "chosen"}}, "candidate.model"),
        ({"candidate": {"model": "ft:tiny:default::reward"}}, "candidate.model"),
        ({"baseline": None}, "baseline"),
        ({"data": "file-none"}, "data"),
        ({"judge": SCORED}, "judge"),
        ({"sampling": {}}, "sampling"),
        ({"beta": 0}, "beta"),
        ({"max_rows": 0}, "max_rows"),
        ({"temperature": 1}, "temperature"),
        ({"type": "agreement"}, "candidate"),
        ({"type": "reward_kl", "judge": ENDPOINT_JUDGE}, "judge.type"),
        ({"type": "win_rate", "judge": {"type": "endpoint"}}, "judge.endpoint"),
        ({"type": "win_rate", "judge": ENDPOINT_JUDGE | {"model": "tiny"}}, "judge.model"),
        ({"type": "win_rate", "judge": ENDPOINT_JUDGE | {"question": "rude"}}, "judge.question"),
        ({"type": "win_rate", "judge": ENDPOINT_JUDGE | {"template": "{prompt} {a}"}}, "judge.template"),
        ({"type": "win_rate", "judge": SCORED | {"question": "dialogue"}}, "judge.question"),
        ({"type": "win_rate", "judge": {"type": "model", "model": "none"}}, "judge.model"),
        ({"type": "win_rate", "judge": {"type": "model", "model": SCORED["model"]}}, "judge.model"),
        ({"type": "win_rate", "judge": judge_with(parameters={"stop": "\ud800"})}, "judge.endpoint.parameters"),
        ({"type": "win_rate", "judge": judge_with(parameters={"seed": 2**70})}, "judge.endpoint.parameters"),
        ({"type": "win_rate", "judge": endpoint_judge("https://1.1.1.1/v1?version=1")}, "judge.endpoint.base_url"),
        ({"type": "win_rate", "judge": judge_with(parameters={"stream": True})}, "judge.endpoint.parameters.stream"),
        ({"type": "win_rate", "judge": judge_with(parameters=nested(300))}, "judge.endpoint.parameters"),
        ({"type": "win_rate", "judge": judge_with(api_key="k" * 2049)}, "judge.endpoint.api_key"),
        ({"type": "win_rate", "judge": ENDPOINT_JUDGE, "gates": [{"metric": "judge/cost", "max": 1}]}, "gates.0.metric"),
        ({"type": "win_rate", "gates": [{"metric": "win_rate", "min": 1}]}, "gates.0.metric"),
        ({"type": "reward_kl", "sampling": {"temperatures": [0.7, 0.70000001]}}, "sampling.temperatures"),
        ({"type": "win_rate", "judge": endpoint_judge("http://judge.example/v1")}, "judge.endpoint.base_url"),
        ({"type": "win_rate", "judge": endpoint_judge("https://127.0.0.1/v1")}, "judge.endpoint.base_url"),
        ({"type": "win_rate", "judge": endpoint_judge("https://169.254.169.254/v1")}, "judge.endpoint.base_url"),
        ({"type": "win_rate", "judge": endpoint_judge("file:///etc/passwd")}, "judge.endpoint.base_url"),
        ({"type": "reward_kl", "judge": SCORED, "sampling": {"temperatures": [1, 1]}}, "sampling.temperatures"),
        ({"type": "reward_kl", "judge": SCORED, "sampling": {"temperatures": [-1]}}, "sampling.temperatures.0"),
        ({"type": "reward_kl", "judge": SCORED, "sampling": {"top_p": 0}}, "sampling.top_p"),
        ({"type": "reward_kl", "judge": {"type": "reward_model", "model": "tiny"}}, "judge.model"),
        ({"type": "reward_kl", "judge": {"type": "reward_model"}}, "judge.model"),
        ({"type": "win_rate", "judge": SCORED, "baseline": None}, "baseline"),
        ({"type": "win_rate", "judge": SCORED, "baseline": {"file": "file-none"}}, "baseline.file"),
        (
            {"type": "win_rate", "judge": {"type": "classifier", "classifier": {"file": "file-none"}}},
            "judge.classifier.file",
        ),
        (
            {
                "type": "win_rate", "judge": SCORED, "sampling": {},
                "candidate": {"answers": "chosen"}, "baseline": {"answers": "rejected"},
            },
            "sampling",
        ),
    ],
)  # fmt: skip
def test_a_bad_evaluation_is_refused_with_the_parameter(
    fields: dict[str, object], param: str, client: TestClient, trained_model: str
) -> None:
    content = json.dumps(evaluation_body(client, **fields))  # escaped: half a surrogate pair has no UTF-8
    answer = client.post("/v1/evaluations", content=content, headers={"Content-Type": "application/json"})
    error = error_of(answer, 400)
    assert error["param"] == param and error["message"]


def test_omitted_fields_come_from_the_candidates_training(
    client: TestClient, services: Services, trained_model: str
) -> None:
    evaluation = client.post(
        "/v1/evaluations", json=evaluation_body(client, candidate={"model": trained_model}, baseline=None)
    ).json()
    assert (
        evaluation["baseline"] == {"model": "tiny"}
        and evaluation["quantization"] == "nf4"
        and evaluation["beta"] == 0.1
    )
    assert (
        evaluation["object"] == "evaluation" and evaluation["status"] == "validating_files" and evaluation["seed"] >= 0
    )
    explicit = evaluation_body(client, candidate={"model": trained_model}, beta=0.5, quantization="none", seed=4)
    evaluation = client.post("/v1/evaluations", json=explicit).json()
    assert (evaluation["beta"], evaluation["quantization"], evaluation["seed"]) == (0.5, "none", 4)


def test_evaluations_and_trainings_have_separate_lists_and_one_queue(client: TestClient, services: Services) -> None:
    file = upload(client)
    training = client.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": file}).json()["id"]
    evaluation = client.post(
        "/v1/evaluations", json=evaluation_body(client, priority=1, metadata={"team": "a"})
    ).json()["id"]
    assert [item["id"] for item in client.get("/v1/fine_tuning/jobs").json()["data"]] == [training]
    assert [item["id"] for item in client.get("/v1/evaluations").json()["data"]] == [evaluation]
    assert client.get("/v1/evaluations", params={"metadata[team]": "b"}).json()["data"] == []
    error_of(client.get(f"/v1/evaluations/{training}"), 404)
    error_of(client.get(f"/v1/fine_tuning/jobs/{evaluation}"), 404)
    error_of(client.get(f"/v1/evaluations/{evaluation}/report"), 404)
    error_of(client.get("/v1/evaluations", params={"after": training}), 404)
    for _ in range(2):
        check_files(services)
    with services.database.write() as session:
        first = job_queue.claim(session, Status.QUEUED, "test", ["tiny"])
        second = job_queue.claim(session, Status.QUEUED, "test", ["tiny"])
    assert first is not None and second is not None
    assert (first.kind, second.kind) == (EVALUATION_JOB.name, TRAINING_JOB.name), "by priority"
    assert client.get(f"/v1/evaluations/{evaluation}/events").json()["data"][0]["message"] == "Evaluation started."


def test_a_judges_key_is_sealed_and_not_shown(client: TestClient, services: Services) -> None:
    evaluation = client.post(
        "/v1/evaluations", json=evaluation_body(client, type="win_rate", judge=ENDPOINT_JUDGE)
    ).json()
    assert (
        evaluation["judge"]["endpoint"]["base_url"] == "https://1.1.1.1/v1"
        and "api_key" not in evaluation["judge"]["endpoint"]
    )
    with services.database.read() as session:
        stored = session.get_one(Job, evaluation["id"]).spec["judge"]["endpoint"]["api_key"]
        events = session.execute(text("select message, data from job_events")).all()
    assert "sk-of-the-judge" not in stored + str(events) + client.get("/v1/evaluations").text
    assert services.secret_box.open(stored) == "sk-of-the-judge"
    longest = judge_with(api_key="k" * 2048)
    evaluation = client.post("/v1/evaluations", json=evaluation_body(client, type="win_rate", judge=longest)).json()
    with services.database.read() as session:
        EvaluationSpec.stored(session.get_one(Job, evaluation["id"]).spec)  # the sealed key is longer


def test_a_resent_evaluation_is_created_once(client: TestClient) -> None:
    headers, request = {"Idempotency-Key": "once"}, evaluation_body(client)
    ids = {client.post("/v1/evaluations", json=request, headers=headers).json()["id"] for _ in range(2)}
    assert len(ids) == 1


def test_any_worker_claims_an_evaluation_without_models(client: TestClient, services: Services) -> None:
    classifier = upload(client, b'{"terms": {"good": [1, 1]}, "intercept": 0}')
    request = evaluation_body(
        client, type="win_rate", candidate={"answers": "chosen"}, baseline={"answers": "rejected"},
        judge={"type": "classifier", "classifier": {"file": classifier}},
    )  # fmt: skip
    evaluation = client.post("/v1/evaluations", json=request).json()["id"]
    with services.database.write() as session:
        session.execute(update(Job).where(Job.id == evaluation).values(status=Status.QUEUED))
        claimed = job_queue.claim(session, Status.QUEUED, "test", ["another"])
    assert claimed is not None and claimed.id == evaluation


def test_only_a_worker_with_all_its_base_models_claims_an_evaluation(client: TestClient, services: Services) -> None:
    with services.database.write() as session:
        models.register(session, "other", "r1", {"architecture": "LlamaForCausalLM"})
    evaluation = client.post("/v1/evaluations", json=evaluation_body(client, baseline={"model": "other"})).json()["id"]
    with services.database.write() as session:
        session.execute(update(Job).where(Job.id == evaluation).values(status=Status.QUEUED))
        workers.report(session, "one", Lane.GPU, ["tiny"], {"spec_version": SPEC_VERSION})
        workers.report(session, "two", Lane.GPU, ["other"], {"spec_version": SPEC_VERSION})
    assert client.get(f"/v1/evaluations/{evaluation}").json()["estimated_start"] is None, "no worker can run it"
    with services.database.write() as session:
        workers.report(session, "two", Lane.GPU, ["other", "tiny"], {"spec_version": SPEC_VERSION})
    assert client.get(f"/v1/evaluations/{evaluation}").json()["estimated_start"] is not None
    with services.database.write() as session:
        for served in (["tiny"], ["other"], []):
            assert job_queue.claim(session, Status.QUEUED, "test", served) is None
        claimed = job_queue.claim(session, Status.QUEUED, "test", ["ti*", "other"])
    assert claimed is not None and claimed.id == evaluation


def test_only_a_worker_with_its_reference_claims_a_training(client: TestClient, services: Services) -> None:
    with services.database.write() as session:
        models.register(session, "other", "r1", {"architecture": "LlamaForCausalLM"})
    method = {"type": "dpo", "dpo": {"hyperparameters": {"reference_model": "other"}}}
    request = {"model": "tiny", "training_file": upload(client), "method": method}
    job = client.post("/v1/fine_tuning/jobs", json=request).json()["id"]
    with services.database.write() as session:
        session.execute(update(Job).where(Job.id == job).values(status=Status.QUEUED))
        assert job_queue.claim(session, Status.QUEUED, "test", ["tiny"]) is None
        claimed = job_queue.claim(session, Status.QUEUED, "test", ["other", "tiny"])
    assert claimed is not None and claimed.id == job


def test_the_candidates_reference_is_the_default_baseline(
    client: TestClient, services: Services, trained_model: str
) -> None:
    """After SFT in the same job no such model is stored. The job's start model would flatter the candidate."""
    with services.database.write() as session:
        model = session.get_one(Model, trained_model)
        job = session.get_one(Job, model.job_id)
        dpo = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "reference_model": None}}}
        job.spec = job.spec | {"method": dpo, "sft": {}}
    request = evaluation_body(client, candidate={"model": trained_model}, baseline=None)
    error = error_of(client.post("/v1/evaluations", json=request), 400)
    assert error["param"] == "baseline" and "SFT" in error["message"]
    with services.database.write() as session:
        job = session.get_one(Job, model.job_id)
        dpo["dpo"]["hyperparameters"]["reference_model"] = "tiny"  # type: ignore[index]
        job.spec = job.spec | {"method": dpo}
    evaluation = client.post("/v1/evaluations", json=request).json()
    assert evaluation["baseline"] == {"model": "tiny"} and evaluation["beta"] == 0.2


def test_a_file_is_read_with_the_mapping_of_its_upload(client: TestClient) -> None:
    mapping = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    content = b'{"q": "a", "good": "b", "bad": "c"}\n'
    answer = client.post(
        "/v1/files",
        files={"file": ("p.jsonl", content)},
        data={"purpose": "evals", "mapping": json.dumps(mapping)},
    )
    evaluation = client.post("/v1/evaluations", json=evaluation_body(client, data=answer.json()["id"])).json()
    assert {name: value for name, value in evaluation["mapping"].items() if value} == mapping


def test_a_deleted_report_is_not_found(client: TestClient, services: Services) -> None:
    evaluation = client.post("/v1/evaluations", json=evaluation_body(client)).json()["id"]
    with services.database.write() as session:
        finish = update(Job).where(Job.id == evaluation)
        session.execute(finish.values(status=Status.SUCCEEDED, result_files=["file-gone", "file-too"]))
    for route in ("report", "download"):
        error = error_of(client.get(f"/v1/evaluations/{evaluation}/{route}"), 404)
        assert error["code"] == "report_not_found" and "deleted" in error["message"]


def test_a_downgrade_deletes_evaluations_and_their_subscriptions(client: TestClient, services: Services) -> None:
    """The previous version cannot read evaluations, nor webhooks that subscribe to them."""
    training = make_job(services, name="kept")
    client.post("/v1/evaluations", json=evaluation_body(client))
    with services.database.write() as session:
        for number, events in enumerate((["evaluation.failed"], ["evaluation.failed", "fine_tuning.job.succeeded"])):
            session.add(
                WebhookEndpoint(
                    id=f"whe-{number}", project="default", url="https://example.com/", events=events,
                    sealed_secret="x", created_at=database_now(),
                )
            )  # fmt: skip
    migrate(services.database, "0003")
    with services.database.engine.connect() as connection:
        assert list(connection.execute(text("SELECT id FROM jobs")).scalars()) == [training]
        subscriptions = [
            str(events) for events in connection.execute(text("SELECT events FROM webhook_endpoints")).scalars()
        ]
    assert len(subscriptions) == 2 and not any("evaluation" in events for events in subscriptions)
    migrate(services.database, "head")
    assert client.get("/v1/evaluations").json()["data"] == []


@pytest.mark.parametrize("baseline", [None, "reference"])
def test_the_reference_of_a_job_with_sft_is_its_last_sft_checkpoint(
    client: TestClient, services: Services, baseline: str | None
) -> None:
    """The caller need not know the step at which SFT ended. A wrong guess would silently measure something else."""
    stages = {"sft": {}, "method": {"type": "dpo", "dpo": {}}}
    spec = JobSpec.model_validate({"model": "tiny", "training_file": "file-1", **stages}).resolved()
    job_id = make_job(services, status=Status.SUCCEEDED, spec=spec.model_dump(mode="json"))
    name = "ft:tiny:default::both"
    with services.database.write() as session:
        session.add(
            Model(
                name=name, kind="adapter", project="default", created_at=database_now(), base_model="tiny", bytes=2,
                job_id=job_id, prefix=f"jobs/{job_id}/model", details={"adapter": None, "foundation": None},
            )
        )  # fmt: skip
        for step, stage in ((3, "sft"), (6, "sft"), (9, "dpo")):
            session.add(
                Checkpoint(
                    id=f"ftckpt-{step}", job_id=job_id, created_at=database_now(), stage=stage, step_number=step,
                    metrics={}, model_name=f"{name}:ckpt-step-{step}", prefix="x",
                )
            )  # fmt: skip
    sft_checkpoint = f"{name}:ckpt-step-6"
    for candidate, expected in (
        (name, sft_checkpoint),
        (f"{name}:ckpt-step-9", sft_checkpoint),
        (sft_checkpoint, "tiny"),
    ):
        fields = evaluation_body(client, type="reward_kl", candidate={"model": candidate}, baseline=baseline)
        answer = client.post("/v1/evaluations", json=fields)
        assert answer.status_code == 200, answer.text
        assert answer.json()["baseline"] == {"model": expected}, "an SFT checkpoint is compared with its start model"


def test_only_a_model_that_was_trained_here_has_a_reference(client: TestClient, trained_model: str) -> None:
    answer = client.post(
        "/v1/evaluations", json=evaluation_body(client, candidate={"model": trained_model}, baseline="reference")
    )
    assert answer.json()["baseline"] == {"model": "tiny"}
    assert (
        error_of(client.post("/v1/evaluations", json=evaluation_body(client, baseline="reference")), 400)["param"]
        == "baseline"
    )
    answers = {"type": "win_rate", "judge": ENDPOINT_JUDGE, "candidate": {"answers": "chosen"}, "baseline": "reference"}
    assert error_of(client.post("/v1/evaluations", json=evaluation_body(client, **answers)), 400)["param"] == "baseline"
    reference_itself = evaluation_body(client, candidate={"reference": True})
    assert error_of(client.post("/v1/evaluations", json=reference_itself), 400)["param"] == "candidate.reference"


def test_each_side_is_rendered_as_it_was_trained_and_pairs_are_rendered_alike(
    services: Services, trained_model: str
) -> None:
    with services.database.write() as session:
        job = session.get_one(Job, session.get_one(Model, trained_model).job_id)
        job.spec = job.spec | {"chat_template": False, "date": "2026-02-03"}
    spec = EvaluationSpec.model_validate(
        {
            "type": "win_rate",
            "candidate": CANDIDATE,
            "baseline": {"model": trained_model},
            "data": "f",
            "date": "2026-05-06",
        }
    )
    with services.database.read() as session:
        baseline = rendering_of(spec, "default", "baseline", trained_model, session)
        assert (baseline["chat_template"], baseline["date"]) == (False, "2026-02-03")
        assert rendering_of(spec, "default", "candidate", "tiny", session)["date"] == "2026-05-06"
        pairs = spec.model_copy(update={"type": "preference"})
        assert rendering_of(pairs, "default", "baseline", trained_model, session) == vars(spec.rendering)
        without_template = spec.model_copy(update={"chat_template": False})
        judge = rendering_of(without_template, "default", "judge", "tiny", session)
        assert (judge["chat_template"], judge["date"]) == (None, "2026-05-06"), "a judge uses its own default"


def test_a_stored_spec_has_no_fields_that_the_previous_version_does_not_know(
    client: TestClient, services: Services
) -> None:
    evaluation = client.post("/v1/evaluations", json=evaluation_body(client)).json()["id"]
    job = client.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": upload(client)}).json()["id"]
    with services.database.read() as session:
        assert set(session.get_one(Job, evaluation).spec["candidate"]) == {"model", "file", "mapping", "answers"}
        spec = session.get_one(Job, job).spec
    assert not {"more_training_files", "double_quantization", "compute_dtype"} & set(spec)
    assert "modules_to_save" not in spec["adapter"]

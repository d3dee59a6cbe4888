"""The HTTP contract: wire shapes, errors, and that a refused request leaves nothing behind."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from app.database import database_now
from app.jobs import queries
from app.keys.schemas import KeySpec
from app.keys.service import generate, well_formed
from app.keys.tables import ApiKey
from app.migrate import migrate
from app.models import repository as models
from app.models.tables import Model
from app.services import Services
from tests.helpers.api import ROW, error_of, key_of, objects, rows, upload

# -- keys and hosts -------------------------------------------------------------------------------------------

PRIVATE = [
    ("POST", "/v1/files"),
    ("GET", "/v1/files"),
    ("GET", "/v1/files/x/content"),
    ("DELETE", "/v1/files/x"),
    ("POST", "/v1/fine_tuning/jobs"),
    ("GET", "/v1/fine_tuning/jobs/x/events"),
    ("GET", "/v1/fine_tuning/jobs/x/logs"),
    ("GET", "/v1/models/x/download"),
    ("DELETE", "/v1/models/x"),
    ("GET", "/v1/unknown"),
]


@pytest.mark.parametrize(("method", "path"), PRIVATE)
def test_every_route_needs_a_valid_key(client: TestClient, method: str, path: str) -> None:
    for header in ("", "Bearer ", "Bearer dpo_wrong", f"Bearer {generate()}", "Basic abc"):
        error = error_of(client.request(method, path, headers={"Authorization": header}), 401)
        assert error["code"] in ("missing_api_key", "invalid_api_key")


def test_a_new_key_is_valid_until_it_expires(client: TestClient, services: Services) -> None:
    key = services.keys.create(KeySpec(name="ci")).key
    assert well_formed(key)
    assert client.get("/v1/files", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    old = services.keys.create(KeySpec(name="old", expires_in=1000))
    expired = old.key
    with services.database.write() as session:
        session.execute(update(ApiKey).where(ApiKey.id == old.id).values(expires_at=database_now() - 1))
    error_of(client.get("/v1/files", headers={"Authorization": f"Bearer {expired}"}), 401)
    mistyped = key[:-1] + ("0" if key[-1] != "0" else "1")
    assert not well_formed(mistyped)


def test_a_key_of_another_project_sees_nothing(client: TestClient, services: Services) -> None:
    file_id = upload(client)
    stranger = {"Authorization": f"Bearer {key_of(services, 'other')}"}
    error_of(client.get(f"/v1/files/{file_id}", headers=stranger), 404)
    error_of(client.get(f"/v1/files/{file_id}/content", headers=stranger), 404)
    error_of(client.delete(f"/v1/files/{file_id}", headers=stranger), 404)
    assert client.get("/v1/files", headers=stranger).json()["data"] == []
    body = {"model": "tiny", "training_file": file_id}
    assert error_of(client.post("/v1/fine_tuning/jobs", json=body, headers=stranger), 400)["param"] == "training_file"


def test_public_paths_need_no_key_but_a_known_host(client: TestClient) -> None:
    for path in ("/healthz", "/readyz", "/openapi.json", "/docs"):
        assert client.get(path, headers={"Authorization": ""}).status_code == 200
        answer = client.get(path, headers={"Host": "evil.example"})
        if path in ("/healthz", "/readyz"):
            assert answer.status_code == 200, "probes may use any address of the service"
        else:
            assert error_of(answer, 400)["code"] == "invalid_host"
    assert error_of(client.get("/v1/files", headers={"Host": "evil.example"}), 400)["code"] == "invalid_host"


# -- files ----------------------------------------------------------------------------------------------------


def test_a_file_comes_back_byte_for_byte(client: TestClient, services: Services) -> None:
    content = ROW * 400_000  # 18 MB: several parts of the object store's multipart upload
    file_id = upload(client, content)
    description = client.get(f"/v1/files/{file_id}").json()
    assert description["bytes"] == len(content)
    assert description["purpose"] == "fine-tune"
    assert client.get(f"/v1/files/{file_id}/content").content == content
    assert client.delete(f"/v1/files/{file_id}").json() == {"id": file_id, "object": "file", "deleted": True}
    error_of(client.get(f"/v1/files/{file_id}"), 404)
    error_of(client.delete(f"/v1/files/{file_id}"), 404)


def test_files_are_listed_in_pages(client: TestClient) -> None:
    ids = [upload(client) for _ in range(5)]
    first = client.get("/v1/files", params={"limit": 2, "order": "asc"}).json()
    assert [item["id"] for item in first["data"]] == ids[:2]
    assert first["has_more"] and first["first_id"] == ids[0] and first["last_id"] == ids[1]
    second = client.get("/v1/files", params={"limit": 3, "order": "asc", "after": ids[1]}).json()
    assert [item["id"] for item in second["data"]] == ids[2:]
    assert not second["has_more"]
    newest = client.get("/v1/files").json()
    assert [item["id"] for item in newest["data"]] == ids[::-1]
    assert error_of(client.get("/v1/files", params={"after": "file-none"}), 404)["param"] == "after"
    assert error_of(client.get("/v1/files", params={"limit": 0}), 400)["param"] == "limit"


def test_files_are_listed_by_their_content(client: TestClient) -> None:
    first, second = upload(client), upload(client, ROW * 2)
    for file_id, content in ((first, ROW), (second, ROW * 2)):
        digest = hashlib.sha256(content).hexdigest()
        (file,) = client.get("/v1/files", params={"sha256": digest}).json()["data"]
        assert (file["id"], file["sha256"]) == (file_id, digest)
    assert client.get("/v1/files", params={"sha256": "0" * 64}).json()["data"] == []
    assert error_of(client.get("/v1/files", params={"sha256": "short"}), 400)["param"] == "sha256"


HEADERS = {"content-type": "multipart/form-data; boundary=xx"}
PART = '--xx\r\nContent-Disposition: form-data; name="{}"{}\r\n\r\n{}\r\n'
PURPOSE = PART.format("purpose", "", "fine-tune")
EXPIRY = PART.format("expires_after[anchor]", "", "created_at") + PART.format("expires_after[seconds]", "", "{}")
FILE = PART.format("file", '; filename="p.jsonl"', "abc")


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (FILE + "--xx--", "missing_required_parameter", "purpose"),
        (PURPOSE + "--xx--", "missing_required_parameter", "file"),
        (PURPOSE + FILE, "invalid_multipart", None),
        ((PURPOSE + FILE + "--xx--")[:-60], "invalid_multipart", None),
        ("", "invalid_multipart", None),
        ("no boundary at all", "invalid_multipart", None),
        (PURPOSE + FILE + FILE + "--xx--", "invalid_multipart", None),
        (PART.format("purpose", "", "fine-tune-results") + FILE + "--xx--", "invalid_value", "purpose"),
        (PURPOSE + PART.format("file", '; filename="p"', "") + "--xx--", "empty_file", "file"),
        (PURPOSE + FILE + PART.format("colour", "", "red") + "--xx--", "unknown_parameter", "colour"),
        (PURPOSE + FILE + PART.format("expires_after[seconds]", "", "9") + "--xx--", "missing_required_parameter", "expires_after.anchor"),
        (PURPOSE + FILE + EXPIRY.format(3599) + "--xx--", "invalid_value", "expires_after.seconds"),
        (PURPOSE + FILE + EXPIRY.format("soon") + "--xx--", "invalid_value", "expires_after.seconds"),
        (PURPOSE + FILE + PART.format("mapping", "", "{") + "--xx--", "invalid_json", "mapping"),
        (PURPOSE + FILE + PART.format("mapping", "", '{"colour": "red"}') + "--xx--", "unknown_parameter", "mapping.colour"),
    ],
)  # fmt: skip
def test_a_bad_upload_is_refused_and_leaves_nothing(
    client: TestClient, services: Services, body: str, code: str, param: str | None
) -> None:
    error = error_of(client.post("/v1/files", content=body, headers=HEADERS), 400)
    assert (error["code"], error["param"]) == (code, param)
    assert rows(services) == (0, 0)
    assert objects(services) == 0


def test_an_upload_that_is_not_multipart_is_refused(client: TestClient, services: Services) -> None:
    assert error_of(client.post("/v1/files", json={}), 400)["code"] == "invalid_content_type"
    long = {"content-type": "multipart/form-data; boundary=" + "x" * 5000}
    assert error_of(client.post("/v1/files", content=b"", headers=long), 400)["code"] == "invalid_multipart"
    assert objects(services) == 0


# -- jobs -----------------------------------------------------------------------------------------------------


def test_a_job_is_stored_with_its_defaults_written_out(client: TestClient) -> None:
    file_id = upload(client)
    body = {
        "model": "tiny",
        "training_file": file_id,
        "method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": "auto"}}},
        "sft": {},
        "metadata": {"team": "search"},
        "suffix": "x",
        "seed": 5,
    }
    job = client.post("/v1/fine_tuning/jobs", json=body).json()
    assert job["object"] == "fine_tuning.job"
    assert job["status"] == "validating_files"
    assert job["method"]["dpo"]["hyperparameters"]["beta"] == 0.2
    assert job["hyperparameters"] == {"batch_size": 16, "learning_rate_multiplier": 1.0, "n_epochs": 1}
    assert (job["adapter"]["r"], job["quantization"], job["seed"]) == (16, "nf4", 5)
    assert job["error"] is None and job["result_files"] == [] and not job["paused"]
    assert client.get(f"/v1/fine_tuning/jobs/{job['id']}").json() == job
    events = client.get(f"/v1/fine_tuning/jobs/{job['id']}/events").json()["data"]
    assert [event["message"] for event in events] == [f"Created fine-tuning job: {job['id']}"]
    listing = client.get("/v1/fine_tuning/jobs", params={"metadata[team]": "search"}).json()["data"]
    assert [item["id"] for item in listing] == [job["id"]]
    assert client.get("/v1/fine_tuning/jobs", params={"metadata[team]": "ads"}).json()["data"] == []


def test_a_job_that_ended_cannot_be_cancelled_again(client: TestClient) -> None:
    job = client.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": upload(client)}).json()
    cancelled = client.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel").json()
    assert cancelled["status"] == "cancelled" and cancelled["finished_at"]
    second = client.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")
    assert error_of(second, 409)["code"] == "job_already_ended"
    assert second.headers["x-should-retry"] == "false"


DPO = {"type": "dpo"}
BAD_JOBS: list[tuple[dict[str, object], str, str]] = [
    ({"model": "gpt-4o-mini"}, "model_not_found", "model"),
    ({"model": "../tiny"}, "model_not_found", "model"),
    ({"model": "/etc"}, "model_not_found", "model"),
    ({"model": ""}, "invalid_value", "model"),
    ({"model": 5}, "invalid_value", "model"),
    ({"training_file": "file-none"}, "file_not_found", "training_file"),
    ({"training_file": "../../etc/passwd"}, "file_not_found", "training_file"),
    ({"validation_file": "file-none"}, "file_not_found", "validation_file"),
    ({"method": DPO, "sft": {"training_file": "file-none"}}, "file_not_found", "sft.training_file"),
    ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0}}}}, "invalid_value", "method.dpo.hyperparameters.beta"),
    ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": -1}}}}, "invalid_value", "method.dpo.hyperparameters.beta"),
    ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 101}}}}, "invalid_value", "method.dpo.hyperparameters.beta"),
    ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": "0.1"}}}}, "invalid_value", "method.dpo.hyperparameters.beta"),
    ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"loss": "ppo"}}}}, "invalid_value", "method.dpo.hyperparameters.loss"),
    ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"loss": "hinge", "label_smoothing": 0.1}}}}, "invalid_value", "method.dpo.hyperparameters.label_smoothing"),
    ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"reference_model": "no-such"}}}}, "model_not_found", "method.dpo.hyperparameters.reference_model"),
    ({"method": {"type": "reinforcement"}}, "invalid_value", "method.reinforcement"),
    ({"method": {"type": "dpo", "supervised": {}}}, "invalid_value", "method.supervised"),
    ({"method": {"type": "supervised"}, "sft": {}}, "invalid_value", "sft"),
    ({"hyperparameters": {"n_epochs": 1}, "method": DPO}, "invalid_value", "hyperparameters"),
    ({"hyperparameters": {"n_epochs": 51}}, "invalid_value", "hyperparameters.n_epochs"),
    ({"hyperparameters": {"batch_size": True}}, "invalid_value", "hyperparameters.batch_size"),
    ({"traning_file": "x"}, "unknown_parameter", "traning_file"),
    ({"gates": [{"metric": "eval/lss", "max": 1}]}, "invalid_value", "gates.0.metric"),
    ({"gates": [{"metric": "loss"}]}, "invalid_value", "gates.0.min"),
    ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integration_not_configured", "integrations.0.type"),
    ({"integrations": [{"type": "wandb"}]}, "missing_required_parameter", "integrations.0.wandb"),
    ({"timeout_seconds": 0}, "invalid_value", "timeout_seconds"),
    ({"mapping": {}}, "invalid_value", "mapping.prompt"),
    ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"max_steps": 10**40}}}}, "invalid_value", "method.dpo.hyperparameters.max_steps"),
    ({"mapping": {"colour": "red"}}, "unknown_parameter", "mapping.colour"),
    ({"sft": {"mapping": {"prompt": "a"}}, "method": {"type": "dpo"}}, "invalid_value", "sft.mapping"),
    ({"adapter": {"r": 0}}, "invalid_value", "adapter.r"),
    ({"evaluation": {}}, "unsupported_parameter", "evaluation"),
    ({"adapter": {"target_modules": ["lm_head"]}}, "invalid_value", "adapter.target_modules"),
    ({"method": DPO, "sft": {"validation_file": "file-none"}}, "invalid_value", "sft.validation_file"),
    ({"adapter": "none", "quantization": "nf4"}, "invalid_value", "quantization"),
    ({"validation_split": 0, "method": {"type": "dpo", "dpo": {"hyperparameters": {"early_stopping": {}}}}}, "invalid_value", "method.dpo.hyperparameters.early_stopping"),
    ({"validation_split": 0, "method": DPO, "sft": {"hyperparameters": {"early_stopping": {}}}}, "invalid_value", "sft.hyperparameters.early_stopping"),
    ({"adapter": "none", "quantization": "int8"}, "invalid_value", "quantization"),
    ({"quantization": "fp8"}, "invalid_value", "quantization"),
    ({"suffix": "../x"}, "invalid_value", "suffix"),
    ({"seed": -1}, "invalid_value", "seed"),
    ({"metadata": {"k": 5}}, "invalid_value", "metadata.k"),
    ({"metadata": {"k": "a\x00b"}}, "invalid_value", "metadata.k"),
    ({"model": "tiny\x00"}, "invalid_value", "model"),
    ({"validation_split": 0.9}, "invalid_value", "validation_split"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "code", "param"), BAD_JOBS, ids=[str(case[0])[:60] for case in BAD_JOBS])
def test_a_bad_job_is_refused_with_the_parameter_and_leaves_nothing(
    client: TestClient, services: Services, change: dict[str, object], code: str, param: str
) -> None:
    body = {"model": "tiny", "training_file": upload(client)} | change
    error = error_of(client.post("/v1/fine_tuning/jobs", json=body), 400)
    assert (error["code"], error["param"]) == (code, param)
    assert rows(services) == (1, 0)


def test_every_training_file_is_checked_and_kept_while_the_job_needs_it(client: TestClient, services: Services) -> None:
    first, second = upload(client), upload(client, ROW + b"\n")
    body = {"model": "tiny", "training_file": first, "more_training_files": [second], "method": {"type": "dpo"}}
    job = client.post("/v1/fine_tuning/jobs", json=body).json()
    assert job["more_training_files"] == [second]
    with services.database.read() as session:
        assert [bool(queries.users_of(session, name)) for name in (first, second, "file-other")] == [True, True, False]
    missing = body | {"more_training_files": ["file-none"]}
    error = error_of(client.post("/v1/fine_tuning/jobs", json=missing), 400)
    assert (error["code"], error["param"]) == ("file_not_found", "more_training_files.0")
    twice = body | {"more_training_files": [first]}
    assert error_of(client.post("/v1/fine_tuning/jobs", json=twice), 400)["param"] == "more_training_files"


@pytest.mark.parametrize(
    ("method", "fields", "param"),
    [
        ("gptq", {}, "model"),
        ("fp8", {"quantization": "none"}, "model"),
        ("bnb-4bit", {"quantization": "int8"}, "quantization"),
        ("bnb-4bit", {"quantization": "none"}, "quantization"),
        ("bnb-8bit", {"adapter": "none"}, "adapter"),
        ("bnb-8bit", {"double_quantization": False}, "double_quantization"),
    ],
)
def test_a_quantised_base_is_refused_for_options_that_it_does_not_support(
    client: TestClient, services: Services, method: str, fields: dict[str, object], param: str
) -> None:
    with services.database.write() as session:
        models.register(session, "small", "r1", {"prequantized": method})
    body = {"model": "small", "training_file": upload(client), **fields}
    error = error_of(client.post("/v1/fine_tuning/jobs", json=body), 400)
    assert (error["code"], error["param"]) == ("unsupported_model", param)
    assert "small" in error["message"]


@pytest.mark.parametrize(("method", "quantization"), [("bnb-4bit", "nf4"), ("bnb-8bit", "int8")])
def test_a_quantised_base_keeps_its_quantization(
    client: TestClient, services: Services, method: str, quantization: str
) -> None:
    with services.database.write() as session:
        models.register(session, "small", "r1", {"prequantized": method})
    job = client.post("/v1/fine_tuning/jobs", json={"model": "small", "training_file": upload(client)}).json()
    assert job["quantization"] == quantization


def test_a_misspelt_field_gets_a_suggestion(client: TestClient) -> None:
    answer = client.post("/v1/fine_tuning/jobs", json={"model": "tiny", "traning_file": "x"})
    assert "Did you mean 'training_file'?" in answer.json()["error"]["message"]


def test_a_deleted_file_cannot_be_trained_on(client: TestClient, services: Services) -> None:
    file_id = upload(client)
    client.delete(f"/v1/files/{file_id}")
    body = {"model": "tiny", "training_file": file_id}
    assert error_of(client.post("/v1/fine_tuning/jobs", json=body), 400)["param"] == "training_file"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b'{"model": NaN}',
        b"null",
        b'{"model": "\\ud800", "training_file": "x"}',
        b'{"\\ud800": 1}',
        b'{"model": "a", "training_file": "b", "method": {"\\ud800": 1}}',
    ],
)
def test_a_body_that_is_not_a_valid_json_object_is_refused(
    client: TestClient, services: Services, content: bytes
) -> None:
    headers = {"content-type": "application/json"}
    error_of(client.post("/v1/fine_tuning/jobs", content=content, headers=headers), 400)
    assert rows(services) == (0, 0)


def test_a_zero_byte_is_a_client_error_on_every_database(client: TestClient) -> None:
    assert client.get("/v1/files/%00").status_code in (400, 404)
    assert client.get("/v1/files", params={"after": "\x00"}).status_code in (400, 404), "PostgreSQL and SQLite"
    error_of(client.post("/v1/fine_tuning/jobs", json={"model": "\x00", "training_file": "x"}), 400)
    assert upload(client) and client.get("/v1/files").status_code == 200


def test_errors_outside_of_routes_have_the_contracts_shape(client: TestClient) -> None:
    assert error_of(client.get("/v1/nothing"), 404)["code"] == "unknown_url"
    assert error_of(client.get("/"), 404)["code"] == "unknown_url"
    assert error_of(client.put("/v1/files"), 405)["code"] == "method_not_allowed"
    huge = b'{"model": "' + b"x" * 2_000_000 + b'"}'
    assert error_of(client.post("/v1/fine_tuning/jobs", content=huge), 413)["code"] == "body_too_large"

    def stream() -> Iterator[bytes]:
        yield from (b"x" * 100_000 for _ in range(30))

    headers = {"content-type": "application/json"}
    assert (
        error_of(client.post("/v1/fine_tuning/jobs", content=stream(), headers=headers), 413)["code"]
        == "body_too_large"
    )


@pytest.mark.parametrize(
    "path",
    ["/v1/fine_tuning/jobs/ftjob-x", "/v1/fine_tuning/jobs/ftjob-x/events", "/v1/fine_tuning/jobs/ftjob-x/checkpoints",
     "/v1/fine_tuning/jobs/ftjob-x/logs", "/v1/files/file-x", "/v1/files/file-x/content", "/v1/models/none",
     "/v1/models/org%2Fnone", "/v1/models/none/download"],
)  # fmt: skip
def test_a_missing_object_is_404(client: TestClient, path: str) -> None:
    assert error_of(client.get(path), 404)["code"].endswith("_not_found")


# -- models ---------------------------------------------------------------------------------------------------


def test_a_models_name_may_have_slashes(client: TestClient, services: Services) -> None:
    with services.database.write() as session:
        models.register(session, "org/tiny", "r1", {})
        models.register_hub(session, "meta-llama/*")
    assert client.get("/v1/models/org%2Ftiny").json()["id"] == "org/tiny"
    assert {item["id"] for item in client.get("/v1/models").json()["data"]} == {"tiny", "org/tiny"}
    error_of(client.delete("/v1/models/tiny"), 400)
    error_of(client.get("/v1/models/tiny/download"), 400)
    body = {"model": "meta-llama/Llama-2-7b-hf", "training_file": upload(client)}
    assert client.post("/v1/fine_tuning/jobs", json=body).status_code == 200
    body["model"] = "meta-llama/../../etc"
    assert error_of(client.post("/v1/fine_tuning/jobs", json=body), 400)["code"] == "model_not_found"


def test_models_come_in_pages_and_base_models_first(client: TestClient, services: Services) -> None:
    with services.database.write() as session:
        models.register(session, "base-2", "r1", {})
        for number in range(7):
            model = Model(
                name=f"ft:tiny:default::{number}", kind="adapter", project="default", created_at=1e9 + number // 2,
                base_model="tiny", bytes=1, details={},
            )  # fmt: skip
            session.add(model)
    own = [f"ft:tiny:default::{number}" for number in (6, 5, 4, 3, 2, 1, 0)]
    for limit in (1, 2, 3, 9, 1000):
        names, more = list[str](), True
        while more:
            after = {"after": names[-1]} if names else {}
            answer = client.get("/v1/models", params={"limit": limit, **after}).json()
            names += [model["id"] for model in answer["data"]]
            more = answer["has_more"]
            assert answer["last_id"] == names[-1]
        assert (set(names[:2]), names[2:]) == ({"tiny", "base-2"}, own)
    assert error_of(client.get("/v1/models", params={"after": "none"}), 404)["code"] == "model_not_found"
    error_of(client.get("/v1/models", params={"limit": 1001}), 400)


def test_readiness_says_what_is_wrong(client: TestClient, services: Services, tmp_path: Path) -> None:
    assert client.get("/readyz").json() == {"status": "ok", "problems": {}, "warnings": {}}
    migrate(services.database, "base")
    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert "dpo migrate" in answer.json()["problems"]["database"]


@pytest.mark.parametrize("path", [(), ("method", "dpo"), ("method", "dpo", "hyperparameters"), ("sft",), ("mapping",)])
def test_a_request_cannot_bring_a_chat_template(client: TestClient, path: tuple[str, ...]) -> None:
    """A template is a program, so only the operator's base models may bring one."""
    body: dict[str, Any] = {"model": "tiny", "training_file": upload(client), "method": {"type": "dpo", "dpo": {}}}
    inner = body
    for name in path:
        inner = inner.setdefault(name, {})
    inner["chat_template"] = "{{ messages }}"
    error = error_of(client.post("/v1/fine_tuning/jobs", json=body), 400)
    # On the job itself `chat_template` is a switch: whether the base model's template is used.
    expected = "unknown_parameter" if path else "invalid_value"
    assert (error["code"], error["param"]) == (expected, ".".join([*path, "chat_template"]))


def test_a_405_names_every_method_of_its_path(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    for path, operations in paths.items():
        concrete = re.sub(r"\{.*?\}", "x", path)
        answer = client.request("PATCH", concrete)
        allowed = set(answer.headers["allow"].split(", "))
        # The name of a model may have slashes. A longer path may be a name too, with the methods of a model.
        more = {"GET", "DELETE"} if path.startswith("/v1/models/") else set[str]()
        for other, others in paths.items():  # /v1/labellings/estimate may be the path of a labelling too
            if re.fullmatch(re.sub(r"\{.*?\}", "[^/]+", other), concrete):
                more |= {method.upper() for method in others}
        assert answer.status_code == 405 and allowed - {"HEAD"} == {method.upper() for method in operations} | more, (
            path
        )
        assert answer.headers["allow"] in answer.json()["error"]["message"]

"""Our OpenAPI document beside OpenAI's, field by field, for every path and schema of the fine-tuning contract.

`tests/data/openai-fine-tuning.openapi.json` is an excerpt of openai/openai-openapi of 2026-08-21 (MIT licence).
"""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from app.main import create_app
from app.settings import Settings

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
EXCERPT = Path(__file__).parents[1] / "data" / "openai-fine-tuning.openapi.json"


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    document: dict[str, Any] = create_app(Settings(home=tmp_path_factory.mktemp("home"))).openapi()
    return document


@pytest.fixture(scope="module")
def theirs() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(EXCERPT.read_text())
    return document


NAMES = {"fine_tuning_job_id": "job_id", "model": "name"}
"""What path parameters are called here."""
OBJECTS = {
    "OpenAIFile": "FileObject", "Upload": "UploadObject", "UploadPart": "PartObject", "FineTuningJob": "JobObject",
    "FineTuningJobEvent": "EventObject", "FineTuningJobCheckpoint": "CheckpointObject", "Model": "ModelObject",
    "DeleteFileResponse": "FileDeleted", "DeleteModelResponse": "ModelDeleted", "FineTuningIntegration": "Integration",
}  # fmt: skip
BODIES = {
    "CreateFineTuningJobRequest": "JobSpec", "CreateUploadRequest": "UploadSpec", "CompleteUploadRequest": "UploadCompletion",
    "FineTuneDPOHyperparameters": "DPOHyperparameters", "FineTuneSupervisedHyperparameters": "SupervisedHyperparameters",
    "FileExpirationAfter": "ExpiresAfter",
}  # fmt: skip


def place(path: str) -> str:
    for name, own in NAMES.items():
        path = path.replace("{" + name + "}", "{" + own + "}")
    return f"/v1{path}"


def test_every_path_of_the_contract_is_here_but_checkpoint_permissions(
    ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    """Checkpoint permissions share checkpoints between OpenAI organisations: the one group that has no meaning here."""
    for path, methods in theirs["paths"].items():
        if "/permissions" in path:
            assert place(path) not in ours["paths"]
            continue
        for method, operation in methods.items():
            own = ours["paths"][place(path)][method]
            asked = {parameter["name"] for parameter in operation.get("parameters", []) if parameter["in"] == "query"}
            have = {parameter["name"] for parameter in own.get("parameters", []) if parameter["in"] == "query"}
            assert asked - have <= {"metadata"}, (path, method)  # metadata[key]=value: no parameter has such a name


def types(schema: dict[str, Any], document: dict[str, Any]) -> set[str]:
    """The JSON types that a schema allows."""
    if "$ref" in schema:
        return types(document["components"]["schemas"][schema["$ref"].split("/")[-1]], document)
    found: set[str] = set()
    for key in ("anyOf", "oneOf", "allOf"):
        for part in schema.get(key, []):
            found |= types(part, document)
    if "type" in schema:
        given = schema["type"]
        found |= set(given) if isinstance(given, list) else {given}
    for value in [*schema.get("enum", []), *([schema["const"]] if "const" in schema else [])]:
        found.add({str: "string", int: "integer", bool: "boolean", float: "number"}.get(type(value), "null"))
    if "properties" in schema:
        found.add("object")
    if schema.get("nullable"):
        found.add("null")
    return found


@pytest.mark.parametrize(("name", "own"), OBJECTS.items())
def test_every_field_of_an_answer_is_here_with_its_type(
    name: str, own: str, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    expected = theirs["components"]["schemas"][name]
    found = ours["components"]["schemas"][own]["properties"]
    for field, schema in expected["properties"].items():
        assert field in found, f"{name}.{field}"
        allowed, given = types(schema, theirs), types(found[field], ours)
        if "number" in allowed:
            allowed |= {"integer"}
        # Null stands for a field that an answer of theirs leaves out.
        assert given - {"null"} <= allowed or not allowed, (field, given, allowed)
        if "enum" in schema and "enum" in found[field]:
            assert set(found[field]["enum"]) <= set(schema["enum"]) | {"evals"}, field
    for field in expected.get("required", []):
        assert field in found


@pytest.mark.parametrize(("name", "own"), BODIES.items())
def test_every_field_of_a_request_is_taken(name: str, own: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    expected = theirs["components"]["schemas"][name]
    found = ours["components"]["schemas"][own]
    assert set(expected["properties"]) <= set(found["properties"])
    assert set(found.get("required", [])) <= set(expected.get("required", [])), "we ask for no more"
    for field, schema in expected["properties"].items():
        allowed, taken = types(schema, theirs), types(found["properties"][field], ours)
        wanted = {kind for kind in allowed if kind != "null"}
        if "number" in taken:
            taken |= {"integer"}
        # "auto" is taken for every number and means the default; JSON Schema cannot say that of a validator.
        assert wanted - {"string"} <= taken, (field, wanted, taken)


def test_every_operation_says_what_it_does_and_how_it_fails(ours: dict[str, Any]) -> None:
    operations = [
        (path, method, operation) for path, methods in ours["paths"].items() for method, operation in methods.items()
    ]
    assert len(operations) >= 45
    for path, method, operation in operations:
        assert operation.get("description"), (method, path)
        if path.startswith("/v1/"):
            errors = {"400", "401", "403", "404", "429"}
            assert errors <= operation["responses"].keys(), (method, path)
            for status in errors:
                schema = operation["responses"][status]["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorResponse"}


def test_every_body_has_an_example_that_is_one(ours: dict[str, Any]) -> None:
    from jsonschema import Draft202012Validator

    for name in (
        *OBJECTS.values(),
        *BODIES.values(),
        "DatasetReport",
        "Estimate",
        "MetricSeries",
        "KeySpec",
        "ProjectSpec",
    ):
        schema = ours["components"]["schemas"][name]
        if "example" in schema and name in (
            "JobSpec",
            "UploadSpec",
            "UploadCompletion",
            "KeySpec",
            "ProjectSpec",
            "Estimate",
        ):
            whole = schema | {
                "components": ours["components"],
                "$schema": "https://json-schema.org/draft/2020-12/schema",
            }
            Draft202012Validator(whole).validate(schema["example"])
    with_examples = [name for name, schema in ours["components"]["schemas"].items() if "example" in schema]
    assert len(with_examples) >= 15


def generator(name: str) -> ModuleType:
    """A program of docs/reference, which is no package."""
    spec = importlib.util.spec_from_file_location(name, REFERENCE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_api_reference_is_what_the_service_says(ours: dict[str, Any]) -> None:
    """`python docs/reference/generate.py` writes it."""
    assert (REFERENCE / "api.md").read_text() == generator("generate").text(ours)


@pytest.mark.parametrize("page", ["losses.md", "metrics.md"])
def test_the_tables_of_losses_and_metrics_are_what_the_registries_say(page: str) -> None:
    """`python docs/reference/generate_tables.py` writes them."""
    assert (REFERENCE / page).read_text() == generator("generate_tables").TABLES[page]()

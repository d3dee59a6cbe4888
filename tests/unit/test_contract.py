"""Our OpenAPI document against OpenAI's: every path and field of the fine-tuning contract.

`tests/data/openai-fine-tuning.openapi.json` is an excerpt of openai/openai-openapi of 2026-08-21 (MIT licence).
"""

import json
from pathlib import Path

import pytest

from app.spec.json_types import JsonObject
from docs.generate import api

EXCERPT = Path(__file__).parents[1] / "data" / "openai-fine-tuning.openapi.json"


@pytest.fixture(scope="module")
def ours() -> JsonObject:
    return api.document()


@pytest.fixture(scope="module")
def theirs() -> JsonObject:
    document: JsonObject = json.loads(EXCERPT.read_text())
    return document


PARAMETER_NAMES = {"fine_tuning_job_id": "job_id", "model": "name"}
"""OpenAI's path parameters that have another name here."""
RESPONSE_SCHEMAS = {
    "OpenAIFile": "FileObject", "Upload": "UploadObject", "UploadPart": "PartObject", "FineTuningJob": "JobObject",
    "FineTuningJobEvent": "EventObject", "FineTuningJobCheckpoint": "CheckpointObject", "Model": "ModelObject",
    "DeleteFileResponse": "FileDeleted", "DeleteModelResponse": "ModelDeleted", "FineTuningIntegration": "Integration",
}  # fmt: skip
REQUEST_SCHEMAS = {
    "CreateFineTuningJobRequest": "JobSpec", "CreateUploadRequest": "UploadSpec", "CompleteUploadRequest": "UploadCompletion",
    "FineTuneDPOHyperparameters": "DPOHyperparameters", "FineTuneSupervisedHyperparameters": "SupervisedHyperparameters",
    "FileExpirationAfter": "ExpiresAfter",
}  # fmt: skip


def our_path(path: str) -> str:
    for name, our_name in PARAMETER_NAMES.items():
        path = path.replace("{" + name + "}", "{" + our_name + "}")
    return f"/v1{path}"


def test_every_path_of_the_contract_exists_except_checkpoint_permissions(ours: JsonObject, theirs: JsonObject) -> None:
    """Permissions share checkpoints between OpenAI organisations. They have no meaning here."""
    for path, methods in theirs["paths"].items():
        if "/permissions" in path:
            assert our_path(path) not in ours["paths"]
            continue
        for method, operation in methods.items():
            our_operation = ours["paths"][our_path(path)][method]
            their_parameters = {
                parameter["name"] for parameter in operation.get("parameters", []) if parameter["in"] == "query"
            }
            our_parameters = {
                parameter["name"] for parameter in our_operation.get("parameters", []) if parameter["in"] == "query"
            }
            assert their_parameters - our_parameters <= {"metadata"}, (
                path,
                method,
            )  # metadata[key]=value: no single parameter has this name


def types(schema: JsonObject, document: JsonObject) -> set[str]:
    """The JSON types that a schema allows."""
    if "$ref" in schema:
        return types(document["components"]["schemas"][schema["$ref"].split("/")[-1]], document)
    allowed: set[str] = set()
    for key in ("anyOf", "oneOf", "allOf"):
        for option in schema.get(key, []):
            allowed |= types(option, document)
    if "type" in schema:
        declared = schema["type"]
        allowed |= set(declared) if isinstance(declared, list) else {declared}
    for value in [*schema.get("enum", []), *([schema["const"]] if "const" in schema else [])]:
        allowed.add({str: "string", int: "integer", bool: "boolean", float: "number"}.get(type(value), "null"))
    if "properties" in schema:
        allowed.add("object")
    if schema.get("nullable"):
        allowed.add("null")
    return allowed


@pytest.mark.parametrize(("name", "our_name"), RESPONSE_SCHEMAS.items())
def test_every_response_field_of_the_contract_exists_with_its_type(
    name: str, our_name: str, ours: JsonObject, theirs: JsonObject
) -> None:
    their_schema = theirs["components"]["schemas"][name]
    our_properties = ours["components"]["schemas"][our_name]["properties"]
    for field, schema in their_schema["properties"].items():
        assert field in our_properties, f"{name}.{field}"
        their_types, our_types = types(schema, theirs), types(our_properties[field], ours)
        if "number" in their_types:
            their_types |= {"integer"}
        # Our null stands for a field that OpenAI's response leaves out.
        assert our_types - {"null"} <= their_types or not their_types, (field, our_types, their_types)
        if "enum" in schema and "enum" in our_properties[field]:
            assert set(our_properties[field]["enum"]) <= set(schema["enum"]) | {"evals"}, field
    for field in their_schema.get("required", []):
        assert field in our_properties


@pytest.mark.parametrize(("name", "our_name"), REQUEST_SCHEMAS.items())
def test_every_request_field_of_the_contract_is_accepted(
    name: str, our_name: str, ours: JsonObject, theirs: JsonObject
) -> None:
    their_schema = theirs["components"]["schemas"][name]
    our_schema = ours["components"]["schemas"][our_name]
    assert set(their_schema["properties"]) <= set(our_schema["properties"])
    assert set(our_schema.get("required", [])) <= set(their_schema.get("required", [])), "we require no more"
    for field, schema in their_schema["properties"].items():
        their_types, our_types = types(schema, theirs), types(our_schema["properties"][field], ours)
        needed_types = {kind for kind in their_types if kind != "null"}
        if "number" in our_types:
            our_types |= {"integer"}
        # Every number also accepts "auto" for its default. A validator does that, so that our schema does not say so.
        assert needed_types - {"string"} <= our_types, (field, needed_types, our_types)


def test_every_operation_documents_its_purpose_and_its_errors(ours: JsonObject) -> None:
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


def test_the_example_of_every_body_fits_its_schema(ours: JsonObject) -> None:
    from jsonschema import Draft202012Validator

    for name in (
        *RESPONSE_SCHEMAS.values(),
        *REQUEST_SCHEMAS.values(),
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
            full_schema = schema | {
                "components": ours["components"],
                "$schema": "https://json-schema.org/draft/2020-12/schema",
            }
            Draft202012Validator(full_schema).validate(schema["example"])
    with_examples = [name for name, schema in ours["components"]["schemas"].items() if "example" in schema]
    assert len(with_examples) >= 15

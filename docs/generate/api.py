"""The page of the HTTP API, from the OpenAPI document of the service."""

import json
import tempfile
from pathlib import Path

from app.keys.schemas import Scope
from app.main import create_app
from app.settings import Settings
from app.spec.json_types import JsonObject
from docs.generate.markdown import codes, table

INTRODUCTION = """# The HTTP API

Generated from the service's own OpenAPI document (`/openapi.json`, browsable at `/docs`).

Send `Authorization: Bearer KEY` with every request. A route needs a key with the scope in its row, or none:

{scopes}
A key belongs to a project and sees nothing of another one. An object of another project answers 404, as one that does
not exist.

Errors are `{{"error": {{message, type, param, code}}}}`. [Error codes](errors.md) lists them with their statuses.

Creates take `Idempotency-Key`. Lists are pages: `limit` is their size, and `after` is the last id of the page before.

Unknown fields and unknown query parameters are refused by name. Bodies may have `Content-Encoding: gzip`. The content
of a file may be asked for in parts (`Range`), and its headers alone by `HEAD`.

The official `AzureOpenAI` client works too. `/openai/files?api-version=…` stands for `/v1/files`, and `api-key: KEY`
for `Authorization: Bearer KEY`. The value of `api-version` has no meaning here.

OpenAI's checkpoint permissions are the only group of its contract that is not available here.

## Routes
"""
SCOPES = {
    Scope.READ: "See everything of the project, download its files and models",
    Scope.WRITE: "Create, change and delete what belongs to the project; includes `read`",
    Scope.ADMIN: "Manage the projects, keys and workers of the whole installation; includes both",
}


def document() -> JsonObject:
    """The OpenAPI document of the service."""
    with tempfile.TemporaryDirectory() as home:
        openapi: JsonObject = create_app(Settings(home=Path(home))).openapi()
    return openapi


def _kind(schema: JsonObject) -> str:
    """A schema in a few words."""
    if "$ref" in schema:
        name = schema["$ref"].split("/")[-1]
        return f"[{name}](#{name.lower()})"
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(_kind(part) for part in schema[key]))
    if "allOf" in schema:
        return _kind(schema["allOf"][0])
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return codes(schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    if isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_kind(schema['additionalProperties'])}"
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[name]:g}" for name, sign in limits.items() if name in schema]
    return " ".join([schema.get("type", "anything"), ", ".join(bounds)]).strip()


def page() -> str:
    """The routes and the objects, as Markdown."""
    openapi = document()
    scopes = table(("scope", "what its key may do"), [(f"`{scope}`", text) for scope, text in SCOPES.items()])
    rows = [
        _route(path, method, operation)
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    ]
    lines = [
        INTRODUCTION.format(scopes=scopes),
        table(("route", "purpose", "scope", "takes", "answers"), rows).rstrip(),
    ]
    lines += ["", "## Objects", ""]
    for name, schema in sorted(openapi["components"]["schemas"].items()):
        lines += [f"### {name}", ""]
        if schema.get("description"):
            lines += [" ".join(schema["description"].split()), ""]
        required = set(schema.get("required", []))
        for field, property_schema in schema.get("properties", {}).items():
            default = property_schema.get("default")
            shown = field not in required and default not in (None, [], {})
            note = f", default `{json.dumps(default)}`" if shown else ""
            description = " ".join(property_schema.get("description", "").split())
            line = f"- `{field}`: {_kind(property_schema)}{note}"
            lines.append(f"{line}. {description}" if description else line)
        if "enum" in schema:
            lines.append(_kind(schema))
        if "example" in schema:
            lines += ["", "```json", json.dumps(schema["example"], indent=2, ensure_ascii=False), "```"]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _route(path: str, method: str, operation: JsonObject) -> tuple[str, ...]:
    """The row of a route."""
    body = next(iter((operation.get("requestBody") or {}).get("content", {}).items()), None)
    takes = [f"`{parameter['name']}`" for parameter in operation.get("parameters", []) if parameter["in"] == "query"]
    if body is not None:
        takes.append(_kind(body[1]["schema"]) if body[0] == "application/json" else "a form")
    answer: tuple[str, JsonObject] = next(
        iter(operation["responses"].get("200", {}).get("content", {}).items()), ("", {})
    )
    schema = answer[1].get("schema")
    answers = _kind(schema) if schema and answer[0] == "application/json" else f"`{answer[0]}`"
    scope = operation["security"][0]["key"][0] if operation["security"] else "none"
    description = " ".join((operation.get("description") or "").split())
    return f"`{method.upper()} {path}`", description, scope, ", ".join(takes), answers

"""`python docs/reference/generate.py`: write api.md from the OpenAPI document. A test checks that it is up to date."""

import json
import tempfile
from pathlib import Path

from app.main import create_app
from app.settings import Settings
from app.spec.json_types import JsonObject

PLACE = Path(__file__).with_name("api.md")

INTRODUCTION = """# The HTTP API

Generated from the service's own OpenAPI document (`/openapi.json`, browsable at `/docs`).

Every route under `/v1` needs `Authorization: Bearer KEY`. GET needs a key with the scope `read`, and other methods need
`write`. `/v1/projects` and `/v1/keys` need `admin`.

Errors are `{"error": {message, type, param, code}}`:

| status | meaning |
|---|---|
| 400 | The request is not valid |
| 401 | The key is missing or not valid |
| 403 | The key lacks the scope, or a limit is reached |
| 404 | The object does not exist, or belongs to another project |
| 409 | The object's state does not allow it. A retry does not help |
| 413 | The body is too large |
| 415 | The body is compressed, and not by gzip |
| 416 | The file ends before the range that is asked for |
| 429 | Too many requests. Wait for `Retry-After` seconds |
| 5xx | A fault of the service |

Creates take `Idempotency-Key`. Lists are pages: `limit` is their size, and `after` is the last id of the page before.

Unknown fields and unknown query parameters are refused by name. Bodies may have `Content-Encoding: gzip`. The content
of a file may be asked for in parts (`Range`), and its headers alone by `HEAD`.

The official `AzureOpenAI` client works too. `/openai/files?api-version=…` stands for `/v1/files`, and `api-key: KEY`
for `Authorization: Bearer KEY`. The value of `api-version` has no meaning here.

OpenAI's checkpoint permissions are the only group of its contract that is not available here.

## Routes

| route | purpose | takes | answers |
|---|---|---|---|"""


def document() -> JsonObject:
    """The OpenAPI document of the service."""
    with tempfile.TemporaryDirectory() as home:
        openapi: JsonObject = create_app(Settings(home=Path(home))).openapi()
    return openapi


def kind(schema: JsonObject) -> str:
    """A schema in a few words."""
    if "$ref" in schema:
        name = schema["$ref"].split("/")[-1]
        return f"[{name}](#{name.lower()})"
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(kind(part) for part in schema[key]))
    if "allOf" in schema:
        return kind(schema["allOf"][0])
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {kind(schema.get('items', {}))}"
    if isinstance(schema.get("additionalProperties"), dict):
        return f"object of {kind(schema['additionalProperties'])}"
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[name]:g}" for name, sign in limits.items() if name in schema]
    return " ".join([schema.get("type", "anything"), ", ".join(bounds)]).strip()


def text(openapi: JsonObject) -> str:
    """The OpenAPI document as Markdown."""
    lines = [INTRODUCTION]
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            body = next(iter((operation.get("requestBody") or {}).get("content", {}).items()), None)
            takes = [
                f"`{parameter['name']}`" for parameter in operation.get("parameters", []) if parameter["in"] == "query"
            ]
            if body is not None:
                takes.append(kind(body[1]["schema"]) if body[0] == "application/json" else "a form")
            answer = next(iter(operation["responses"].get("200", {}).get("content", {}).items()), ("", {}))
            schema = answer[1].get("schema")
            answers = kind(schema) if schema and answer[0] == "application/json" else f"`{answer[0]}`"
            description = " ".join((operation.get("description") or "").split())
            lines.append(f"| `{method.upper()} {path}` | {description} | {', '.join(takes)} | {answers} |")
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
            line = f"- `{field}`: {kind(property_schema)}{note}"
            lines.append(f"{line}. {description}" if description else line)
        if "enum" in schema:
            lines.append(kind(schema))
        if "example" in schema:
            lines += ["", "```json", json.dumps(schema["example"], indent=2, ensure_ascii=False), "```"]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PLACE.write_text(text(document()))

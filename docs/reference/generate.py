"""`python docs/reference/generate.py`: write api.md from the OpenAPI document. A test holds it up to date."""

import json
import tempfile
from pathlib import Path
from typing import Any

from app.main import create_app
from app.settings import Settings

PLACE = Path(__file__).with_name("api.md")

INTRODUCTION = """# The HTTP API

Generated from the service's own OpenAPI document (`/openapi.json`, browsable at `/docs`).

Every route under `/v1` needs `Authorization: Bearer KEY`: reading a key with the scope `read`, changing `write`,
`/v1/projects` and `/v1/keys` `admin`. Errors are `{"error": {message, type, param, code}}`: 400 what was sent, 401 the
key, 403 its scope or a limit, 404 not there or not yours, 409 not in this state (never worth a retry), 413 too large,
429 too fast (`Retry-After`), 5xx ours. Creates take `Idempotency-Key`. Lists are pages: `limit`, `after` the last id.

OpenAI's checkpoint permissions are the one group of its contract that is not here.

## Routes

| route | | takes | answers |
|---|---|---|---|"""


def document() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as home:
        found: dict[str, Any] = create_app(Settings(home=Path(home))).openapi()
    return found


def kind(schema: dict[str, Any]) -> str:
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


def text(found: dict[str, Any]) -> str:
    """The document as Markdown."""
    lines = [INTRODUCTION]
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            body = next(iter((operation.get("requestBody") or {}).get("content", {}).items()), None)
            takes = [f"`{one['name']}`" for one in operation.get("parameters", []) if one["in"] == "query"]
            if body is not None:
                takes.append(kind(body[1]["schema"]) if body[0] == "application/json" else "a form")
            answer = next(iter(operation["responses"].get("200", {}).get("content", {}).items()), ("", {}))
            schema = answer[1].get("schema")
            given = kind(schema) if schema and answer[0] == "application/json" else f"`{answer[0]}`"
            said = " ".join((operation.get("description") or "").split())
            lines.append(f"| `{method.upper()} {path}` | {said} | {', '.join(takes)} | {given} |")
    lines += ["", "## Objects", ""]
    for name, schema in sorted(found["components"]["schemas"].items()):
        lines += [f"### {name}", ""]
        if schema.get("description"):
            lines += [" ".join(schema["description"].split()), ""]
        required = set(schema.get("required", []))
        for field, part in schema.get("properties", {}).items():
            default = part.get("default")
            shown = field not in required and default not in (None, [], {})
            note = f", default `{json.dumps(default)}`" if shown else ""
            said = " ".join(part.get("description", "").split())
            lines.append(f"- `{field}`: {kind(part)}{note}" + (f". {said}" if said else ""))
        if "enum" in schema:
            lines.append(kind(schema))
        if "example" in schema:
            lines += ["", "```json", json.dumps(schema["example"], indent=2, ensure_ascii=False), "```"]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PLACE.write_text(text(document()))

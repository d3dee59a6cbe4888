"""Request bodies of evaluations."""

from typing import Any

from fastapi.testclient import TestClient

from tests.helpers.api import upload

CANDIDATE, BASELINE = {"model": "tiny"}, {"model": "tiny"}


def endpoint_judge(url: str) -> dict[str, Any]:
    """A judge behind an HTTP endpoint."""
    return {"type": "endpoint", "endpoint": {"base_url": url, "model": "m", "api_key": "sk-of-the-judge"}}


ENDPOINT_JUDGE = endpoint_judge("https://1.1.1.1/v1")


def evaluation_body(client: TestClient, **fields: Any) -> dict[str, Any]:
    """The body of a preference evaluation, changed by `fields`. A field that is None is left out."""
    values = {"type": "preference", "candidate": CANDIDATE, "baseline": BASELINE, "data": upload(client), **fields}
    return {name: value for name, value in values.items() if value is not None}

"""A change of a spec is a new version of it, so that workers of the version before leave such jobs to others."""

import hashlib
import json

from app.spec.evaluation import EvaluationSpec
from app.spec.job import JobSpec
from app.spec.labelling import LabellingSpec
from app.spec.version import SPEC_VERSION

KNOWN = {
    1: "5206284dac41ecab",
    2: "1be907c3b7f34253",
    3: "83a817ce06f3be0f",
    4: "34e3b14596145985",
    5: "4d3e573cc8283e38",
    6: "30743a6cfb2a92d6",
    7: "e0f38c8c4d345de9",
}
"""By version: the hash of the schemas."""


def schemas() -> str:
    """The schemas of the specs without their texts, which workers do not read."""

    def without_texts(node: object) -> object:
        if isinstance(node, dict):
            return {
                name: without_texts(value) for name, value in node.items() if name not in ("description", "example")
            }
        return [without_texts(value) for value in node] if isinstance(node, list) else node

    specs = [without_texts(spec.model_json_schema()) for spec in (JobSpec, EvaluationSpec, LabellingSpec)]
    return hashlib.sha256(json.dumps(specs, sort_keys=True).encode()).hexdigest()[:16]


def test_the_schemas_change_only_with_their_version() -> None:
    hint = (
        "The schema of a spec has changed. If a worker of the version before would ignore the change, raise SPEC_VERSION. "
        "Then write the new hash here."
    )
    assert KNOWN.get(SPEC_VERSION) == schemas(), hint

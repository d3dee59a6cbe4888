"""The stages of a pipeline: label, train, check."""

from typing import Any

GRADER = {"type": "string_check", "name": "g", "input": "{{sample.output_text}}", "reference": "b", "operation": "eq"}
LABEL: dict[str, Any] = {
    "name": "label",
    "labelling": {
        "data": "file-1", "writers": [{"model": "${policy}"}], "sampling": {"samples": 2},
        "labellers": [{"grader": GRADER}],
    },
}  # fmt: skip
DPO: dict[str, Any] = {
    "name": "dpo", "job": {"model": "${policy}", "training_file": "${label.file}", "method": {"type": "dpo"}},
}  # fmt: skip
CHECK: dict[str, Any] = {
    "name": "check",
    "evaluation": {"type": "preference", "candidate": {"model": "${dpo.model}"}, "baseline": {"model": "tiny"}, "data": "f"},
}  # fmt: skip
POLICY = {"policy": {"first": "tiny", "then": "${dpo.model}"}}


def changed(stage: dict[str, Any], kind: str, **fields: Any) -> dict[str, Any]:
    return stage | {kind: stage[kind] | fields}

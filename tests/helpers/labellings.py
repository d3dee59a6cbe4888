"""A labeller for tests."""

from typing import Any


def by_likeness(**fields: Any) -> dict[str, Any]:
    """A labeller that prefers answers with the letters of the prompt. Hardly two answers have the same score."""
    grader = {
        "type": "text_similarity", "name": "likeness", "evaluation_metric": "fuzzy_match",
        "input": "{{sample.output_text}}", "reference": "{{item.prompt}}",
    }  # fmt: skip
    return {"grader": grader, **fields}

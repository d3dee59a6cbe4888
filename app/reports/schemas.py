"""Dataset reports on the wire."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Issue(BaseModel):
    """A row that is left out."""

    line: int
    field: str | None
    reason: str


class FileError(Issue):
    """The first row that cannot be understood."""

    message: str


class Histogram(BaseModel):
    """Lengths of some texts; `histogram` has `from`, `to` (not included) and `count` for each power of two."""

    count: int
    mean: float
    max: int
    histogram: list[dict[str, int]]


class DuplicateRow(BaseModel):
    """A row that says what an earlier one says."""

    line: int
    first_line: int


class Duplicates(BaseModel):
    """Kept rows that repeat an earlier one, and the first hundred of them."""

    rows: int
    lines: list[DuplicateRow]


class Sample(BaseModel):
    """A row as the model sees it: `prompt` is shared, `responses` hang on it; what is scored is in `scored`."""

    line: int
    prompt: str
    responses: list[str]
    scored: list[str]
    tokens: int


class Tokens(BaseModel):
    """Lengths in tokens of a model, from at most 10,000 rows."""

    model: str
    max_length: int
    method: Literal["supervised", "dpo"]
    sampled_rows: int
    rows: int
    """Rows of the whole file as the method sees them: a ranked list counts as its pairs."""
    examples: int
    """What they were made of: whole examples are held out for validation."""
    lengths: dict[str, Histogram]
    tokens_per_row: float
    """Mean of the tokens that are computed for a row: its prompt once, and all of its answers."""
    longest_row: int
    scored_tokens_per_row: float
    truncated_share: float
    """The share of rows that `max_length` cuts."""
    samples: list[Sample]


class Report(BaseModel):
    """What the dataset check found. Lengths are in characters, under `tokens` in tokens."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "file_id": "file-abc123",
                "object": "file.report",
                "valid": True,
                "format": "preference",
                "kind": "preference",
                "rows": 1000,
                "kept": 994,
                "dropped": {"identical_responses": 4, "empty_chosen": 1, "empty_rejected": 1},
                "issues": [{"line": 307, "field": None, "reason": "identical_responses"}],
                "error": None,
                "duplicates": {"rows": 0, "lines": []},
                "conversations": 0,
                "with_tools": 0,
                "characters": {
                    "prompt": {
                        "count": 994,
                        "mean": 312.4,
                        "max": 2041,
                        "histogram": [{"from": 256, "to": 512, "count": 402}],
                    }
                },
                "chosen_longer_rate": 0.58,
                "labels": None,
                "warnings": [],
                "tokens": None,
            }
        }
    )

    file_id: str
    object: Literal["file.report"] = "file.report"
    valid: bool
    format: str | None
    kind: str | None
    rows: int
    kept: int
    dropped: dict[str, int]
    issues: list[Issue]
    error: FileError | None
    duplicates: Duplicates
    conversations: int
    with_tools: int
    characters: dict[str, Histogram]
    chosen_longer_rate: float | None
    labels: dict[str, int] | None
    warnings: list[str]
    tokens: Tokens | None = None
    """Where a model was asked for."""


class Pending(BaseModel):
    """Not ready: ask again after `Retry-After` seconds."""

    status: Literal["pending"] = "pending"
    detail: dict[str, Any] | None = None

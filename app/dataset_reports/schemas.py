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
    mapping: dict[str, Any] | None = None
    """The mapping that comes nearest to reading the file, to be looked at and given to it."""


class Histogram(BaseModel):
    """Lengths of some texts; `histogram` has `from`, `to` (not included) and `count` for each power of two."""

    count: int
    mean: float
    max: int
    histogram: list[dict[str, int]]


class TokenLengths(Histogram):
    """Lengths in tokens before anything is cut; `percentiles` has the length that so many percent do not exceed."""

    percentiles: dict[str, int] = {}


class Cut(BaseModel):
    """What a `max_length` would cut of the rows that were looked at."""

    max_length: int
    longer: int
    """Rows that are longer, which `truncation: drop` leaves out."""
    prompts_cut: int
    answers_cut: int


class RefusedRows(BaseModel):
    """Rows that the model's chat template would not write whole."""

    reason: str
    rows: int
    detail: str


class LabelValue(BaseModel):
    """A value of a column of verdicts or labels, what it was taken to mean (null: nothing), and in how many rows."""

    value: str
    means: str | None
    rows: int


class LabelValues(BaseModel):
    """What the values of a column of verdicts or labels mean."""

    column: str
    values: list[LabelValue]


class ShownAnswer(BaseModel):
    """An answer, and what it counts for: chosen, rejected, rank 2, desirable, …"""

    counts_for: str
    text: str


class ShownRow(BaseModel):
    """A row for a person's eyes: long texts are cut."""

    line: int
    prompt: str
    answers: list[ShownAnswer]


class DuplicateRow(BaseModel):
    """A row that says what an earlier one says, or the opposite."""

    line: int
    first_line: int


class Duplicates(BaseModel):
    """Kept rows that repeat an earlier one, or contradict it, and the first hundred of them."""

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
    lengths: dict[str, TokenLengths]
    """Of prompts, of each side's answers, and under `whole` of a prompt with its longest answer."""
    tokens_per_row: float
    """Mean of the tokens that are computed for a row: its prompt once, and all of its answers."""
    longest_row: int
    scored_tokens_per_row: float
    truncated_share: float
    """The share of rows that `max_length` cuts, or leaves out."""
    cut_by: list[Cut] = []
    """What each `max_length` would cut."""
    refused: list[RefusedRows] = []
    control_text: int = 0
    """Rows in which text looks like a control token of the model; it is trained as text."""
    templated: int = 0
    """Rows whose prompt a chat template had written already; it is taken as it is."""
    samples: list[Sample]
    warnings: list[str] = []


class DatasetReport(BaseModel):
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
                "contradictions": {"rows": 0, "lines": []},
                "unread": {"source": 1000},
                "conversations": 0,
                "with_tools": 0,
                "with_reasoning": 0,
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
                "values": None,
                "samples": [
                    {
                        "line": 1,
                        "prompt": "Where is my order?",
                        "answers": [
                            {"counts_for": "chosen", "text": "Let me look."},
                            {"counts_for": "rejected", "text": "Ask the post office."},
                        ],
                    }
                ],
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
    contradictions: Duplicates = Duplicates(rows=0, lines=[])
    unread: dict[str, int] = {}
    """Columns, and members of messages, that nothing reads, with the rows that have them."""
    conversations: int
    with_tools: int
    with_reasoning: int = 0
    characters: dict[str, Histogram]
    chosen_longer_rate: float | None
    labels: dict[str, int] | None
    values: LabelValues | None = None
    """Of verdicts and labels."""
    samples: list[ShownRow] = []
    """The first three kept rows, of labels one of each, by which an inversion is seen."""
    warnings: list[str]
    tokens: Tokens | None = None
    """Where a model was asked for."""

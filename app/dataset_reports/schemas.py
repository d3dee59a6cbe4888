"""Dataset reports on the wire."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from app.spec.job import MethodType
from app.spec.json_types import JsonObject


class Issue(BaseModel):
    """A row that is left out."""

    line: int
    field: str | None
    reason: str


class FileError(Issue):
    """The first row that cannot be understood."""

    message: str
    mapping: JsonObject | None = None
    """The mapping that comes closest to reading the file. Check it, then upload the file with it."""


class Histogram(BaseModel):
    """Lengths of texts. `histogram` has a bin per power of two: `from`, `to` (exclusive) and `count`."""

    count: int
    mean: float
    max: int
    histogram: list[dict[str, int]]


class TokenLengths(Histogram):
    """Lengths in tokens before cutting. In `percentiles`, `p95` is the length that 95 percent do not exceed."""

    percentiles: dict[str, int] = {}


class Cut(BaseModel):
    """The counted rows that a `max_length` would cut."""

    max_length: int
    longer: int
    """Rows that are longer. `truncation: drop` leaves them out."""
    prompts_cut: int
    answers_cut: int


class RefusedRows(BaseModel):
    """Rows that are left out because the model's chat template does not write all of their text."""

    reason: str
    rows: int
    detail: str


class LabelValue(BaseModel):
    """A value in a verdict or label column, its meaning (null: none), and the number of rows that have it."""

    value: str
    means: str | None
    rows: int


class LabelValues(BaseModel):
    """The meanings of the values in a verdict or label column."""

    column: str
    values: list[LabelValue]


class ShownAnswer(BaseModel):
    """An answer and its role: chosen, rejected, rank 2, desirable, …"""

    counts_for: str
    text: str


class ShownRow(BaseModel):
    """A row for people to read. Long texts are cut."""

    line: int
    prompt: str
    answers: list[ShownAnswer]


class DuplicateRow(BaseModel):
    """A row that repeats or contradicts the row at `first_line`."""

    line: int
    first_line: int


class Duplicates(BaseModel):
    """The number of kept rows that repeat (or contradict) an earlier one, and the first hundred of them."""

    rows: int
    lines: list[DuplicateRow]


class Sample(BaseModel):
    """A row as the model sees it: the shared `prompt`, its `responses`, and the part of each that is `scored`."""

    line: int
    prompt: str
    responses: list[str]
    scored: list[str]
    tokens: int


class Tokens(BaseModel):
    """Lengths in a model's tokens, from at most 10,000 examples."""

    model: str
    max_length: int
    method: MethodType
    sampled_rows: int
    rows: int
    """Rows of the whole file as the method sees them. A ranked list counts as its pairs."""
    examples: int
    """Examples that the rows were made of. Validation holds out whole examples."""
    lengths: dict[str, TokenLengths]
    """Lengths of prompts, of each side's answers, and (as `whole`) of a prompt with its longest answer."""
    tokens_per_row: float
    """Mean tokens computed per row: its prompt once, and all of its answers."""
    longest_row: int
    scored_tokens_per_row: float
    truncated_share: float
    """The share of rows that `max_length` cuts or leaves out."""
    cut_by: list[Cut] = []
    """The rows that other values of `max_length` would cut."""
    refused: list[RefusedRows] = []
    control_text: int = 0
    """Rows with text that looks like a control token of the model. It is trained as text."""
    templated: int = 0
    """Rows whose prompt is already in the form of a chat template. It is used as it is."""
    samples: list[Sample]
    warnings: list[str] = []


class DatasetReport(BaseModel):
    """The dataset check's report. Lengths are in characters, those in `tokens` in tokens."""

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
    """Columns and keys of messages that nothing reads, each with the number of rows that have it."""
    conversations: int
    with_tools: int
    with_reasoning: int = 0
    characters: dict[str, Histogram]
    chosen_longer_rate: float | None
    labels: dict[str, int] | None
    values: LabelValues | None = None
    """The values of the verdict or label column and their meanings, if the file has one."""
    samples: list[ShownRow] = []
    """The first three kept rows. A labelled file shows both labels, so that swapped labels are noticed."""
    warnings: list[str]
    tokens: Tokens | None = None
    """Only if the request named a model."""

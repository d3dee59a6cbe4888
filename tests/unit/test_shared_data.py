"""Real preference data, if it is in the folder `DPO_SHARED` (default ../shared)."""

import csv
import gzip
import io
import json
import os
from pathlib import Path

import pytest

from app.spec.datasets.check import check, examples, survey
from app.spec.datasets.example import Kind
from app.spec.datasets.mapping import Mapping
from app.spec.datasets.report import Report

DATA = Path(os.environ.get("DPO_SHARED", "../shared")) / "data"
pytestmark = pytest.mark.skipif(not DATA.exists(), reason=f"the real datasets are not at {DATA} (DPO_SHARED)")


def report_of(name: str, need: Kind = Kind.PREFERENCE) -> Report:
    with (DATA / name).open("rb") as file:
        return check(file, need)


def lines(report: Report, reason: str) -> list[int]:
    return [issue["line"] for issue in report.issues if issue["reason"] == reason]


def test_the_known_defects_of_hh_are_found() -> None:
    report = report_of("preference/hh-rlhf/helpful-base.test.jsonl.gz")
    assert (report.format, report.rows) == ("transcripts", 2354)
    assert lines(report, "identical_responses") == [722, 2169]
    assert lines(report, "empty_rejected") == [121, 741, 1215, 2064]
    assert len(lines(report, "histories_differ")) == 9
    assert report.kept == 2354 - 15


def test_the_known_defects_of_ultrafeedback_are_found() -> None:
    report = report_of("preference/ultrafeedback/clean.jsonl")
    assert (report.rows, report.kept) == (1000, 994)
    assert lines(report, "identical_responses") == [307, 656, 911, 998]
    assert lines(report, "empty_rejected") == [479]
    assert lines(report, "empty_chosen") == [834]


def test_labelled_answers_are_read_whole_and_serve_sft_too() -> None:
    report = report_of("preference/sharegpt/kto_en_demo.json", Kind.LABELLED)
    assert (report.format, report.kind) == ("labelled_chat", Kind.LABELLED)
    assert report.kept == report_of("preference/sharegpt/kto_en_demo.json", Kind.SUPERVISED).kept > 100


def test_stack_exchange_pairs_become_questions_and_answers() -> None:
    with (DATA / "preference/stack-exchange/stack_exchange_paired_tiny.json").open("rb") as file:
        pairs = list(examples(file))
    assert len(pairs) == 25
    assert all(isinstance(example.prompt, str) and example.prompt.startswith("Question: ") for example in pairs)
    assert all(isinstance(example.prompt, str) and example.prompt.endswith("\n\nAnswer: ") for example in pairs)


@pytest.mark.parametrize(
    ("name", "rows"), [("openai-format/orca_dpo_pairs.validation.jsonl", 284), ("openai-format/dpo_chat.jsonl", 12)]
)
def test_openai_preferences_are_read_whole(name: str, rows: int) -> None:
    report = report_of(name)
    assert (report.format, report.kept) == ("openai_preference", rows)


def count_rows(name: str) -> int:
    """Number of rows, counted without our reader."""
    path = DATA / name
    content = gzip.decompress(path.read_bytes()) if name.endswith(".gz") else path.read_bytes()
    text = content.decode()
    if name.endswith(".csv"):
        return len(list(csv.DictReader(io.StringIO(text))))
    return len(json.loads(text)) if text.lstrip().startswith("[") else sum(1 for row in text.split("\n") if row.strip())


TLDR = Mapping(prompt="{context}", completion="ref_text")
EVERY_FILE = {
    "openai-format/Text-GSM8K.chat_train.jsonl": ("openai_chat", {}),
    "openai-format/Text-GSM8K.chat_validation.jsonl": ("openai_chat", {}),
    "openai-format/Tool-Calling.stock_toolcall_training.jsonl": ("openai_chat", {}),
    "openai-format/dpo_chat.jsonl": ("openai_preference", {}),
    "openai-format/orca_dpo_pairs.validation.jsonl": ("openai_preference", {}),
    "openai-format/weather_chat_fine_tuning.jsonl": ("openai_chat", {}),
    "preference/hh-rlhf/harmless-base.test.jsonl.gz": ("transcripts", {"empty_chosen": 4, "histories_differ": 5}),
    "preference/hh-rlhf/helpful-base.test.jsonl.gz": (
        "transcripts", {"identical_responses": 2, "empty_rejected": 4, "histories_differ": 9},
    ),
    "preference/human-judged/faireval_human.json": ("judged", {}),
    "preference/human-judged/mtbench_human.json": ("judged", {}),
    "preference/sharegpt/dpo_en_demo.json": ("sharegpt_preference", {}),
    "preference/sharegpt/dpo_zh_demo.json": ("sharegpt_preference", {}),
    "preference/sharegpt/kto_en_demo.json": ("labelled_chat", {}),
    "preference/stack-exchange/stack_exchange_paired_tiny.json": ("stack_exchange_paired", {}),
    "preference/ultrafeedback/clean.jsonl": (
        "preference", {"identical_responses": 4, "empty_rejected": 1, "empty_chosen": 1},
    ),
    "preference/ultrafeedback/eval_clean.jsonl": ("preference", {"identical_responses": 1}),
    "sentiment/imdb-train.jsonl.gz": ("text", {}),
    "sentiment/imdb-unsup.jsonl.gz": ("text", {}),
    "sft/alpaca_en_demo.json": ("alpaca", {}),
    "sft/alpaca_zh_demo.json": ("alpaca", {}),
    "sft/tldr_samples.csv": ("prompt_completion", {}),
}  # fmt: skip
"""Format and dropped rows of each file, as its README says and a look at the rows confirmed."""


def test_no_file_of_the_collection_is_left_out() -> None:
    files = {str(path.relative_to(DATA)) for path in DATA.rglob("*.*") if path.suffix not in (".md", ".txt")}
    assert files == set(EVERY_FILE)


@pytest.mark.parametrize("name", sorted(EVERY_FILE))
def test_every_file_is_read_whole_and_no_defect_is_invented(name: str) -> None:
    format, dropped = EVERY_FILE[name]
    with (DATA / name).open("rb") as file:
        report = survey(file, TLDR if name.endswith(".csv") else None)
    assert report.error is None
    assert (report.format, report.rows) == (format, count_rows(name))
    assert report.kept + sum(report.dropped.values()) == report.rows
    assert report.dropped == dropped
    summary = report.as_json()
    assert summary["characters"]["prompt"]["count"] == report.kept


def test_duplicates_of_imdb_are_counted() -> None:
    """The README says 96. The test counts equal texts."""
    with (DATA / "sentiment/imdb-train.jsonl.gz").open("rb") as file:
        report = survey(file)
    with gzip.open(DATA / "sentiment/imdb-train.jsonl.gz", "rt") as file:
        texts = [json.loads(line)["text"] for line in file]
    assert report.duplicates == len(texts) - len(set(texts)) == 96
    duplicate = report.duplicate_lines[0]
    assert texts[duplicate["line"] - 1] == texts[duplicate["first_line"] - 1]


def test_human_verdicts_put_the_better_answer_first() -> None:
    path = DATA / "preference/human-judged/mtbench_human.json"
    rows = json.loads(path.read_text())
    with path.open("rb") as file:
        judged = list(examples(file))
    assert all(example.responses[0] == row[f"output_{row['label']}"] for example, row in zip(judged, rows, strict=True))


def test_chinese_text_is_read_unchanged() -> None:
    path = DATA / "sft/alpaca_zh_demo.json"
    with path.open("rb") as file:
        example = next(iter(examples(file)))
    assert example.responses == (json.loads(path.read_text())[0]["output"],)


def test_tool_calls_are_read() -> None:
    with (DATA / "openai-format/weather_chat_fine_tuning.jsonl").open("rb") as file:
        chats = list(examples(file))
    turns_with_calls = [
        turn for example in chats if isinstance(example.prompt, list) for turn in example.prompt if "tool_calls" in turn
    ]
    assert turns_with_calls and all(
        isinstance(turn["tool_calls"][0]["function"]["arguments"], dict) for turn in turns_with_calls
    )
    assert all(example.tools for example in chats)

"""Real preference data, where it is there: `DPO_SHARED` names its folder (default ../shared)."""

import os
from pathlib import Path

import pytest

from app.datasets.check import Report, check, examples
from app.datasets.example import Kind
from app.datasets.reader import DatasetError

DATA = Path(os.environ.get("DPO_SHARED", "../shared")) / "data"
pytestmark = pytest.mark.skipif(not DATA.exists(), reason=f"the real datasets are not at {DATA} (DPO_SHARED)")


def report_of(name: str, need: Kind = Kind.PREFERENCE) -> Report:
    with (DATA / name).open("rb") as file:
        return check(file, need)


def lines(report: Report, reason: str) -> list[int]:
    return [issue["line"] for issue in report.issues if issue["reason"] == reason]


def test_hh_defects_are_found_where_they_are_known_to_be() -> None:
    report = report_of("preference/hh-rlhf/helpful-base.test.jsonl.gz")
    assert (report.format, report.rows) == ("transcripts", 2354)
    assert lines(report, "identical_responses") == [722, 2169]
    assert lines(report, "empty_rejected") == [121, 741, 1215, 2064]
    assert len(lines(report, "histories_differ")) == 9
    assert report.kept == 2354 - 15


def test_ultrafeedback_defects_are_found_where_they_are_known_to_be() -> None:
    report = report_of("preference/ultrafeedback/clean.jsonl")
    assert (report.rows, report.kept) == (1000, 994)
    assert lines(report, "identical_responses") == [307, 656, 911, 998]
    assert lines(report, "empty_rejected") == [479]
    assert lines(report, "empty_chosen") == [834]


def test_labelled_answers_read_whole_and_serve_sft_too() -> None:
    report = report_of("preference/sharegpt/kto_en_demo.json", Kind.LABELLED)
    assert (report.format, report.kind) == ("labelled_chat", Kind.LABELLED)
    assert report.kept == report_of("preference/sharegpt/kto_en_demo.json", Kind.SUPERVISED).kept > 100


def test_stack_exchange_pairs_become_questions_and_answers() -> None:
    with (DATA / "preference/stack-exchange/stack_exchange_paired_tiny.json").open("rb") as file:
        found = list(examples(file, Report()))
    assert len(found) == 25
    assert all(isinstance(e.prompt, str) and e.prompt.startswith("Question: ") for e in found)
    assert all(isinstance(e.prompt, str) and e.prompt.endswith("\n\nAnswer: ") for e in found)


@pytest.mark.parametrize(
    ("name", "rows"), [("openai-format/orca_dpo_pairs.validation.jsonl", 284), ("openai-format/dpo_chat.jsonl", 12)]
)
def test_openai_preferences_read_whole(name: str, rows: int) -> None:
    report = report_of(name)
    assert (report.format, report.kept) == ("openai_preference", rows)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("openai-format/Tool-Calling.stock_toolcall_training.jsonl", "tools"),
        ("openai-format/weather_chat_fine_tuning.jsonl", "tools"),
        ("preference/human-judged/mtbench_human.json", None),
        ("sft/alpaca_en_demo.json", None),
    ],
)
def test_what_is_not_built_yet_is_refused_with_a_line(name: str, field: str | None) -> None:
    with pytest.raises(DatasetError) as caught:
        report_of(name, Kind.SUPERVISED)
    assert caught.value.line >= 1 and caught.value.field == field

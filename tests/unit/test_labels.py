"""Verdicts and labels: what their values mean, in every spelling; and what is asked and never guessed."""

import csv
import io
import json
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from pydantic import ValidationError

from app.spec.datasets.check import examples, survey
from app.spec.datasets.errors import DatasetError
from app.spec.datasets.example import Example
from app.spec.datasets.mapping import Mapping

Rows = list[dict[str, Any]]


def lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows: Rows) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def columns(rows: Rows) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


WRITERS = {"JSON Lines": lines, "CSV": table, "Parquet": columns}


def read(content: bytes, mapping: dict[str, Any] | None = None) -> list[Example]:
    return list(examples(io.BytesIO(content), None if mapping is None else Mapping.model_validate(mapping)))


def compared(names: tuple[str, str], column: str, *values: object) -> Rows:
    """Rows whose first answer is called "one" and whose second "two"."""
    return [
        {"prompt": f"q{k}", names[0]: f"one{k}", names[1]: f"two{k}", column: value} for k, value in enumerate(values)
    ]


VERDICTS: list[tuple[tuple[str, str], str, list[object], str]] = [
    (("response_0", "response_1"), "better_response_id", [0, 1, 1, 0], "1221"),
    (("output_1", "output_2"), "label", [1, 2, 2, 1], "1221"),
    (("output_1", "output_2"), "label", ["1", "2.0", "2", "1.0"], "1221"),
    (("output_1", "output_2"), "label", ["2", "2", "2", "1"], "2221"),
    (("answer_a", "answer_b"), "winner", ["A", "B", "b ", "a"], "1221"),
    (("response_a", "response_b"), "winner", ["model_a", "model_b", "tie", "tie (bothbad)"], "12--"),
    (("response_a", "response_b"), "preference", ["response_a", "Response B", "both", "neither"], "12--"),
    (("answer_1", "answer_2"), "choice", ["first", "second", "left", "right"], "1212"),
    (("response_A", "response_B"), "winner", ["Assistant A", "assistant-b", "draw", None], "12--"),
    (("human_ref_A", "human_ref_B"), "labels", [1, 0, 0, 1], "1221"),
    (("response1", "response2"), "overall_preference", [-3, -1, 0, 2], "11-2"),
    (("output_1", "output_2"), "verdict", ["output_1", "output_2", None, "tie"], "12--"),
]
"""(names of the answers, column, its values, which answer is better in each row: 1, 2 or neither)."""


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(("names", "column", "values", "better"), VERDICTS)
def test_a_verdict_is_read_by_what_its_values_say(
    names: tuple[str, str], column: str, values: list[object], better: str, writer: str
) -> None:
    found = {example.prompt: example.responses for example in read(WRITERS[writer](compared(names, column, *values)))}
    expected = {
        f"q{k}": (f"one{k}", f"two{k}") if which == "1" else (f"two{k}", f"one{k}")
        for k, which in enumerate(better)
        if which != "-"
    }
    assert found == expected


def test_scores_of_two_answers_and_a_one_in_one_of_two_columns_are_verdicts() -> None:
    scored = [
        {"question": "q", "answer_0": "one", "answer_1": "two", "score_0": a, "score_1": b}
        for a, b in ((0.5, -0.5), (-1, 1), (0, 0))
    ]
    hot = [
        {"prompt": "q", "response_a": "one", "response_b": "two", "winner_model_a": a, "winner_model_b": b,
         "winner_tie": t}
        for a, b, t in ((1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]  # fmt: skip
    for rows in (scored, hot):
        for write in WRITERS.values():
            assert [e.responses for e in read(write(rows))] == [("one", "two"), ("two", "one")]
        assert survey(io.BytesIO(lines(rows))).dropped == {"tie": 1}


@pytest.mark.parametrize(
    ("names", "values"),
    [
        (("output_1", "output_2"), [0, 1]),
        (("output_1", "output_2"), [0, 1, 2]),
        (("output_1", "output_2"), [1, 2, 3]),
        (("answer_a", "answer_b"), [0, 1]),
        (("answer_a", "answer_b"), [1, 2]),
        (("answer_a", "answer_b"), [-3, -1, 2]),
        (("answer_a", "answer_b"), [True, False]),
        (("answer_a", "answer_b"), ["better", "worse"]),
    ],
)
def test_a_verdict_that_may_mean_several_things_is_asked_about(names: tuple[str, str], values: list[object]) -> None:
    """The mapping that is proposed reads the file as it says, and exchanged as the other reading."""
    content = lines(compared(names, "label", *values))
    with pytest.raises(DatasetError, match="which mean that") as caught:
        read(content)
    proposed = caught.value.mapping
    assert proposed is not None and caught.value.field == "label"
    assert json.dumps(proposed, ensure_ascii=False) in caught.value.reason
    exchanged = json.loads(json.dumps(proposed))
    label = exchanged["label"]
    label["first"], label["second"] = label["second"], label["first"]
    ours, theirs = read(content, proposed), read(content, exchanged)
    assert ours and [e.responses for e in ours] == [e.responses[::-1] for e in theirs]


# -- labels ---------------------------------------------------------------------------------------------------

LABELS: list[tuple[list[object], str]] = [
    ([True, False, False], "+--"),
    (["true", "False", "TRUE"], "+-+"),
    ([1, 0, 1], "+-+"),
    ([0, 0, 1], "--+"),
    ([1.0, 0.0, 0.0], "+--"),
    (["1", "0", "1.0"], "+-+"),
    (["yes", "No", "y"], "+-+"),
    (["good", "bad", "Good "], "+-+"),
    (["thumbs_up", "thumbs-down", "thumbs up"], "+-+"),
    ([-1, 1, 1], "-++"),
    ([-3, 3, 0], "-+ "),
    ([-1, 0, *(k / 7 for k in range(1, 200))], "- " + "+" * 199),
    ([None, True, False], " +-"),
    ([None, 1, 0], " +-"),
]
"""(values, what each means: desirable, undesirable, neither)."""


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("column", ["label", "kto_tag"])
@pytest.mark.parametrize(("values", "meanings"), LABELS)
def test_a_label_is_decided_on_all_values_and_not_on_the_first(
    values: list[object], meanings: str, column: str, writer: str
) -> None:
    if writer == "Parquet" and len({type(value) for value in values} - {type(None)}) > 1:
        values = [None if value is None else float(value) for value in values]  # type: ignore[arg-type]
    rows = [{"prompt": f"q{k}", "completion": "a", column: value} for k, value in enumerate(values)]
    found = {example.prompt: example.desirable for example in read(WRITERS[writer](rows))}
    assert found == {f"q{k}": which == "+" for k, which in enumerate(meanings) if which != " "}


@pytest.mark.parametrize(
    "values",
    [[1], [0], [1, 2], [1, 2, 3, 4, 5], [2, 3], ["spam", "ham"], ["good", "so-so"], [1, "maybe"], list(range(99))],
)
@pytest.mark.parametrize(
    "fields", [{"prompt": "q", "completion": "a"}, {"instruction": "q", "output": "a"},
               {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}],
)  # fmt: skip
def test_a_label_that_may_mean_several_things_is_asked_about_and_never_left_aside(
    fields: dict[str, Any], values: list[object]
) -> None:
    content = lines([{**fields, "label": value} for value in values])
    with pytest.raises(DatasetError, match="which mean a good answer") as caught:
        read(content)
    assert caught.value.mapping is not None and caught.value.field == "label"
    assert all(example.responses == ("a",) for example in read(content, caught.value.mapping))
    without = (
        {name: name for name in fields}
        if "messages" in fields
        else dict(zip(("prompt", "completion"), fields, strict=True))
    )
    assert len(read(content, without)) == len(values), "a mapping may leave the column aside"


@pytest.mark.parametrize("writer", WRITERS)
def test_a_mapping_says_which_values_mean_what_and_compares_them_by_value(writer: str) -> None:
    stars = [{"q": f"q{k}", "a": "a", "stars": k} for k in range(1, 6)]
    content = WRITERS[writer](stars)
    fields: dict[str, Any] = {"prompt": "q", "completion": "a"}
    for said in ([4, 5], ["4", "5"], [4.0, "5.0"]):
        found = read(content, {**fields, "label": {"column": "stars", "desirable": said}})
        assert [example.desirable for example in found] == [False, False, False, True, True]
    both = {"column": "stars", "desirable": [4, 5], "undesirable": [1, 2]}
    found = read(content, {**fields, "label": both})
    assert [(example.prompt, example.desirable) for example in found] == [
        ("q1", False), ("q2", False), ("q4", True), ("q5", True),
    ]  # fmt: skip
    report = survey(io.BytesIO(content), Mapping.model_validate({**fields, "label": both}))
    assert report.dropped == {"neutral_label": 1}


def test_a_mappings_verdict_names_both_sides() -> None:
    rows = compared(("x", "y"), "w", "L", "R", "=", "?")
    label = {"column": "w", "first": ["l"], "second": ["r"], "tie": ["="]}
    mapping = {"input": "prompt", "output_1": "x", "output_2": "y", "label": label}
    assert [e.responses for e in read(lines(rows), mapping)] == [("one0", "two0"), ("two1", "one1")]
    for wrong in (
        {"column": "w"},
        {"column": "w", "first": ["l"]},
        {"column": "w", "desirable": ["l"], "first": ["l"], "second": ["r"]},
        {"column": "w", "first": ["l"], "second": ["L"]},
        {"column": "w", "undesirable": ["l"]},
    ):
        with pytest.raises(ValidationError):
            Mapping.model_validate({**mapping, "label": wrong})
    with pytest.raises(ValidationError):
        Mapping.model_validate({"prompt": "prompt", "completion": "x", "label": label})
    with pytest.raises(ValidationError):
        Mapping.model_validate({**mapping, "label": {"column": "w", "desirable": ["l"]}})


def test_a_label_that_a_mapping_names_is_never_left_aside() -> None:
    rows = [{"q": "q", "a": "a", "b": "b", "good": True}]
    with pytest.raises(DatasetError, match="a label goes with"):
        read(lines(rows), {"prompt": "q", "chosen": "a", "rejected": "b", "label": "good"})
    assert [e.desirable for e in read(lines(rows), {"prompt": "q", "completion": "a", "label": "good"})] == [True]


# -- what the report shows ------------------------------------------------------------------------------------


def report_of(rows: Rows) -> dict[str, Any]:
    return survey(io.BytesIO(lines(rows))).as_json()


def test_the_report_counts_each_value_with_what_it_was_taken_to_mean() -> None:
    found = report_of(compared(("response_0", "response_1"), "better_response_id", 0, 0, 1, None))
    assert found["values"] == {
        "column": "better_response_id",
        "values": [
            {"value": "0", "means": "first", "rows": 2},
            {"value": "1", "means": "second", "rows": 1},
            {"value": "null", "means": None, "rows": 1},
        ],
    }
    assert found["dropped"] == {"no_verdict": 1}
    labelled = report_of([{"prompt": "q", "completion": str(k), "label": k % 3 - 1} for k in range(9)])
    assert labelled["labels"] == {"desirable": 3, "undesirable": 3}
    assert {value["value"]: value["means"] for value in labelled["values"]["values"]} == {
        "-1": "undesirable", "0": "neither", "1": "desirable",
    }  # fmt: skip


def test_the_report_shows_three_rows_by_which_a_person_sees_an_inversion() -> None:
    found = report_of(compared(("response_0", "response_1"), "better_response_id", 1, 0, 1, 1, 1))
    assert [sample["line"] for sample in found["samples"]] == [1, 2, 3]
    assert found["samples"][0] == {
        "line": 1,
        "prompt": "q0",
        "answers": [{"counts_for": "chosen", "text": "two0"}, {"counts_for": "rejected", "text": "one0"}],
    }
    rows = [{"prompt": "q", "completion": f"a{k}", "label": k < 20} for k in range(21)]
    shown = [answer for sample in report_of(rows)["samples"] for answer in sample["answers"]]
    assert shown[-1] == {"counts_for": "undesirable", "text": "a20"}, "one of each is shown, however late it comes"
    assert [answer["counts_for"] for answer in shown] == ["desirable", "desirable", "undesirable"]


def test_contradictions_are_counted_and_told_from_repetitions() -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    found = report_of([pair, pair | {"chosen": "b", "rejected": "a"}, pair, pair | {"prompt": "r"}])
    assert found["duplicates"] == {"rows": 1, "lines": [{"line": 3, "first_line": 1}]}
    assert found["contradictions"] == {"rows": 1, "lines": [{"line": 2, "first_line": 1}]}
    assert any("the opposite" in warning and "line 2" in warning for warning in found["warnings"])
    labelled = report_of([{"prompt": "q", "completion": "a", "label": label} for label in (True, False, True)])
    assert (labelled["contradictions"]["rows"], labelled["duplicates"]["rows"]) == (1, 1)


def test_a_column_that_nobody_reads_is_counted_and_one_that_looks_like_a_label_is_warned_of() -> None:
    rows = [{"prompt": "q", "completion": "a", "rating": 5, "id": k} for k in range(3)] + [
        {"prompt": "q", "completion": "b", "source": "web"}
    ]
    found = report_of(rows)
    assert found["unread"] == {"rating": 3, "id": 3, "source": 1}
    assert any("'rating' is not read" in warning for warning in found["warnings"])
    turns = [{"role": "user", "content": "q", "images": ["x"]}, {"role": "assistant", "content": "a", "id": 3}]
    assert report_of([{"messages": turns}])["unread"] == {"messages[].images": 1, "messages[].id": 1}

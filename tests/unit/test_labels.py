"""Verdicts and labels: values are read in every spelling, and an ambiguous value is refused, never guessed."""

import io
import json

import pytest
from pydantic import ValidationError

from app.spec.datasets.check import examples, survey
from app.spec.datasets.errors import DatasetError
from app.spec.datasets.example import Example
from app.spec.datasets.mapping import Mapping
from app.spec.json_types import JsonObject
from tests.helpers.dataset_files import as_csv, as_lines, as_parquet

Rows = list[JsonObject]
WRITERS = {"JSON Lines": as_lines, "CSV": as_csv, "Parquet": as_parquet}


def read(content: bytes, mapping: JsonObject | None = None) -> list[Example]:
    return list(examples(io.BytesIO(content), None if mapping is None else Mapping.model_validate(mapping)))


def comparisons(names: tuple[str, str], column: str, *values: object) -> Rows:
    """A row per value. Its first answer is "one…" and its second "two…"."""
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
def test_a_verdict_is_read_in_every_spelling(
    names: tuple[str, str], column: str, values: list[object], better: str, writer: str
) -> None:
    responses = {
        example.prompt: example.responses for example in read(WRITERS[writer](comparisons(names, column, *values)))
    }
    expected = {
        f"q{k}": (f"one{k}", f"two{k}") if which == "1" else (f"two{k}", f"one{k}")
        for k, which in enumerate(better)
        if which != "-"
    }
    assert responses == expected


def test_two_scores_or_two_one_hot_columns_are_read_as_a_verdict() -> None:
    scored = [
        {"question": "q", "answer_0": "one", "answer_1": "two", "score_0": first, "score_1": second}
        for first, second in ((0.5, -0.5), (-1, 1), (0, 0))
    ]
    one_hot = [
        {"prompt": "q", "response_a": "one", "response_b": "two", "winner_model_a": first, "winner_model_b": second,
         "winner_tie": tie}
        for first, second, tie in ((1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]  # fmt: skip
    for rows in (scored, one_hot):
        for write in WRITERS.values():
            assert [example.responses for example in read(write(rows))] == [("one", "two"), ("two", "one")]
        assert survey(io.BytesIO(as_lines(rows))).dropped == {"tie": 1}


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
def test_an_ambiguous_verdict_is_refused_with_a_proposed_mapping(names: tuple[str, str], values: list[object]) -> None:
    """The proposed mapping gives one reading of the file, and its exchange gives the other."""
    content = as_lines(comparisons(names, "label", *values))
    with pytest.raises(DatasetError, match="which mean that") as caught:
        read(content)
    proposed = caught.value.mapping
    assert proposed is not None and caught.value.field == "label"
    assert json.dumps(proposed, ensure_ascii=False) in caught.value.reason
    exchanged = json.loads(json.dumps(proposed))
    label = exchanged["label"]
    label["first"], label["second"] = label["second"], label["first"]
    as_proposed, as_exchanged = read(content, proposed), read(content, exchanged)
    assert as_proposed and [example.responses for example in as_proposed] == [
        example.responses[::-1] for example in as_exchanged
    ]


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
def test_the_meaning_of_a_label_depends_on_all_values_and_not_on_the_first(
    values: list[object], meanings: str, column: str, writer: str
) -> None:
    if writer == "Parquet" and len({type(value) for value in values} - {type(None)}) > 1:
        values = [None if value is None else float(value) for value in values]  # type: ignore[arg-type]
    rows = [{"prompt": f"q{k}", "completion": "a", column: value} for k, value in enumerate(values)]
    desirable = {example.prompt: example.desirable for example in read(WRITERS[writer](rows))}
    assert desirable == {f"q{k}": which == "+" for k, which in enumerate(meanings) if which != " "}


@pytest.mark.parametrize(
    "values",
    [[1], [0], [1, 2], [1, 2, 3, 4, 5], [2, 3], ["spam", "ham"], ["good", "so-so"], [1, "maybe"], list(range(99))],
)
@pytest.mark.parametrize(
    "fields", [{"prompt": "q", "completion": "a"}, {"instruction": "q", "output": "a"},
               {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}],
)  # fmt: skip
def test_an_ambiguous_label_is_refused_and_never_ignored(fields: JsonObject, values: list[object]) -> None:
    content = as_lines([{**fields, "label": value} for value in values])
    with pytest.raises(DatasetError, match="which mean a good answer") as caught:
        read(content)
    assert caught.value.mapping is not None and caught.value.field == "label"
    assert all(example.responses == ("a",) for example in read(content, caught.value.mapping))
    mapping_without_label = (
        {name: name for name in fields}
        if "messages" in fields
        else dict(zip(("prompt", "completion"), fields, strict=True))
    )
    assert len(read(content, mapping_without_label)) == len(values), "a mapping may leave out the column"


@pytest.mark.parametrize("writer", WRITERS)
def test_a_mapping_gives_the_meaning_of_values_and_compares_them_by_value(writer: str) -> None:
    stars = [{"q": f"q{k}", "a": "a", "stars": k} for k in range(1, 6)]
    content = WRITERS[writer](stars)
    fields: JsonObject = {"prompt": "q", "completion": "a"}
    for good_stars in ([4, 5], ["4", "5"], [4.0, "5.0"]):
        rated = read(content, {**fields, "label": {"column": "stars", "desirable": good_stars}})
        assert [example.desirable for example in rated] == [False, False, False, True, True]
    both_sides = {"column": "stars", "desirable": [4, 5], "undesirable": [1, 2]}
    rated = read(content, {**fields, "label": both_sides})
    assert [(example.prompt, example.desirable) for example in rated] == [
        ("q1", False), ("q2", False), ("q4", True), ("q5", True),
    ]  # fmt: skip
    report = survey(io.BytesIO(content), Mapping.model_validate({**fields, "label": both_sides}))
    assert report.dropped == {"neutral_label": 1}


def test_a_verdict_of_a_mapping_must_name_both_sides() -> None:
    rows = comparisons(("x", "y"), "w", "L", "R", "=", "?")
    label = {"column": "w", "first": ["l"], "second": ["r"], "tie": ["="]}
    mapping = {"input": "prompt", "output_1": "x", "output_2": "y", "label": label}
    assert [example.responses for example in read(as_lines(rows), mapping)] == [("one0", "two0"), ("two1", "one1")]
    for invalid in (
        {"column": "w"},
        {"column": "w", "first": ["l"]},
        {"column": "w", "desirable": ["l"], "first": ["l"], "second": ["r"]},
        {"column": "w", "first": ["l"], "second": ["L"]},
        {"column": "w", "undesirable": ["l"]},
    ):
        with pytest.raises(ValidationError):
            Mapping.model_validate({**mapping, "label": invalid})
    with pytest.raises(ValidationError):
        Mapping.model_validate({"prompt": "prompt", "completion": "x", "label": label})
    with pytest.raises(ValidationError):
        Mapping.model_validate({**mapping, "label": {"column": "w", "desirable": ["l"]}})


def test_a_label_that_a_mapping_names_is_never_ignored() -> None:
    rows = [{"q": "q", "a": "a", "b": "b", "good": True}]
    with pytest.raises(DatasetError, match="a label goes with"):
        read(as_lines(rows), {"prompt": "q", "chosen": "a", "rejected": "b", "label": "good"})
    assert [
        example.desirable for example in read(as_lines(rows), {"prompt": "q", "completion": "a", "label": "good"})
    ] == [True]


# -- the report -----------------------------------------------------------------------------------------------


def report_of(rows: Rows) -> JsonObject:
    return survey(io.BytesIO(as_lines(rows))).as_json()


def test_the_report_counts_each_value_with_its_meaning() -> None:
    report = report_of(comparisons(("response_0", "response_1"), "better_response_id", 0, 0, 1, None))
    assert report["values"] == {
        "column": "better_response_id",
        "values": [
            {"value": "0", "means": "first", "rows": 2},
            {"value": "1", "means": "second", "rows": 1},
            {"value": "null", "means": None, "rows": 1},
        ],
    }
    assert report["dropped"] == {"no_verdict": 1}
    label_report = report_of([{"prompt": "q", "completion": str(k), "label": k % 3 - 1} for k in range(9)])
    assert label_report["labels"] == {"desirable": 3, "undesirable": 3}
    assert {value["value"]: value["means"] for value in label_report["values"]["values"]} == {
        "-1": "undesirable", "0": "neither", "1": "desirable",
    }  # fmt: skip


def test_the_report_shows_three_rows_that_reveal_an_inverted_label() -> None:
    report = report_of(comparisons(("response_0", "response_1"), "better_response_id", 1, 0, 1, 1, 1))
    assert [sample["line"] for sample in report["samples"]] == [1, 2, 3]
    assert report["samples"][0] == {
        "line": 1,
        "prompt": "q0",
        "answers": [{"counts_for": "chosen", "text": "two0"}, {"counts_for": "rejected", "text": "one0"}],
    }
    rows = [{"prompt": "q", "completion": f"a{k}", "label": k < 20} for k in range(21)]
    answers = [answer for sample in report_of(rows)["samples"] for answer in sample["answers"]]
    assert answers[-1] == {"counts_for": "undesirable", "text": "a20"}, (
        "each kind is shown, however late its first row comes"
    )
    assert [answer["counts_for"] for answer in answers] == ["desirable", "desirable", "undesirable"]


def test_contradictions_are_counted_apart_from_duplicates() -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    report = report_of([pair, pair | {"chosen": "b", "rejected": "a"}, pair, pair | {"prompt": "r"}])
    assert report["duplicates"] == {"rows": 1, "lines": [{"line": 3, "first_line": 1}]}
    assert report["contradictions"] == {"rows": 1, "lines": [{"line": 2, "first_line": 1}]}
    assert any("the opposite" in warning and "line 2" in warning for warning in report["warnings"])
    label_report = report_of([{"prompt": "q", "completion": "a", "label": label} for label in (True, False, True)])
    assert (label_report["contradictions"]["rows"], label_report["duplicates"]["rows"]) == (1, 1)


def test_an_unread_column_is_counted_and_warned_of_if_it_looks_like_a_label() -> None:
    rows = [{"prompt": "q", "completion": "a", "rating": 5, "id": k} for k in range(3)] + [
        {"prompt": "q", "completion": "b", "source": "web"}
    ]
    report = report_of(rows)
    assert report["unread"] == {"rating": 3, "id": 3, "source": 1}
    assert any("'rating' is not read" in warning for warning in report["warnings"])
    turns = [{"role": "user", "content": "q", "images": ["x"]}, {"role": "assistant", "content": "a", "id": 3}]
    assert report_of([{"messages": turns}])["unread"] == {"messages[].images": 1, "messages[].id": 1}

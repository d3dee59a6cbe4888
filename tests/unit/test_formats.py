"""Formats of training data (conversations, tools, tables, mappings) and the report on a file."""

import csv
import gzip
import io
import json
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from pydantic import ValidationError

from app.spec.datasets.check import examples, survey
from app.spec.datasets.errors import DatasetError
from app.spec.datasets.example import Example, Kind
from app.spec.datasets.mapping import Label, Mapping
from app.spec.datasets.reader import records
from app.spec.datasets.report import Report
from app.spec.json_types import JsonObject
from tests.helpers.dataset_files import assistant, user


def read_one(record: JsonObject, mapping: Mapping | None = None) -> Example:
    (example,) = examples(io.BytesIO(json.dumps(record).encode()), mapping)
    return example


SYSTEM = {"role": "system", "content": "s"}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CALLED = {
    "role": "assistant",
    "content": "",
    "tool_calls": [CALL | {"function": {"name": "add", "arguments": {"a": 1}}}],
}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


@pytest.mark.parametrize(
    ("record", "prompt", "responses"),
    [
        ({"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"},
          "rejected": {"from": "gpt", "value": "b"}}, [user("q")], ("a", "b")),
        ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
         [SYSTEM, user("q")], ("a",)),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"}, [SYSTEM, user("q")], ("a",)),
        ({"instruction": "do", "input": "this", "output": "done"}, "do\nthis", ("done",)),
        ({"instruction": "do", "input": "", "output": "done"}, "do", ("done",)),
        ({"instruction": "do", "output": "done", "system": "s", "history": [["q", "a"]]},
         [SYSTEM, user("q"), assistant("a"), user("do")], ("done",)),
        ({"instruction": "do", "input": "", "chosen": "a", "rejected": "b"}, "do", ("a", "b")),
        ({"system": "s", "question": "q", "chosen": "a", "rejected": "b"}, ("s", "q"), ("a", "b")),
        ({"prompt": "q", "system": "", "chosen": "a", "rejected": "b"}, "q", ("a", "b")),
        ({"prompt": "q", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}, "q", ("a", "b")),
        ({"prompt": "q", "system": "s", "chosen": [user("q"), assistant("a")], "rejected": [assistant("b")]},
         ("s", "q"), ("a", "b")),
        ({"input": {"messages": [user("q")]}, "preferred_completion": [assistant("a")], "non_preferred_completion": [assistant("b")]},
         [user("q")], ("a", "b")),
        ({"input": "q", "output_1": "a", "output_2": "b", "label": 2}, "q", ("b", "a")),
        ({"input": "q", "output_1": "a", "output_2": "b", "label": "1"}, "q", ("a", "b")),
        ({"instruction": "q", "completions": [{"response": "a", "overall_score": 3.5}, {"response": "b", "overall_score": 8}]},
         "q", ("b", "a")),
        ({"prompt": "q", "responses": ["a", "b", "c"], "scores": [1, 3, 1]}, "q", ("b", "a")),
        ({"messages": [user("q"), {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": [TOOL]}, [user("q")], ([CALLED],)),
        ({"messages": [user("q"), {"role": "assistant", "content": None, "function_call": CALL["function"]}]}, [user("q")],
         ([CALLED | {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]}],)),
        ({"messages": [user("q"), {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "c1", "content": "2"}, assistant("2")]},
         [user("q"), CALLED, {"role": "tool", "content": "2", "tool_call_id": "c1"}], ("2",)),
        ({"prompt": "你好", "chosen": "很高兴见到你", "rejected": "不"}, "你好", ("很高兴见到你", "不")),
    ],
)  # fmt: skip
def test_a_row_of_each_format_becomes_a_prompt_and_its_responses(
    record: JsonObject, prompt: object, responses: tuple[object, ...]
) -> None:
    example = read_one(record)
    system_and_prompt = (example.system, example.prompt) if example.system else example.prompt
    assert (system_and_prompt, example.responses) == (prompt, responses)


@pytest.mark.parametrize(
    ("record", "desirable"),
    [
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "kto_tag": False}, False),
        ({"instruction": "q", "output": "a", "label": True}, True),
        ({"prompt": "q", "completion": "a", "label": "False"}, False),
    ],
)
def test_a_label_says_whether_a_response_is_desirable(record: JsonObject, desirable: bool) -> None:
    assert read_one(record).desirable is desirable


def test_weights_select_the_turns_to_train_on() -> None:
    def weighted(*weights: int | None) -> JsonObject:
        turns = []
        for number, weight in enumerate(weights):
            marked = {} if weight is None else {"weight": weight}
            turns += [user(f"q{number}"), assistant(f"a{number}", **marked)]
        return {"messages": turns}

    assert read_one(weighted(None, None)).turns == ()
    assert (read_one(weighted(0, 1)).turns, read_one(weighted(0, 1)).responses) == ((), ("a1",))
    assert (read_one(weighted(1, 0, 1)).turns, read_one(weighted(1, 0, 1)).responses) == ((1,), ("a2",))
    first_turn_only = read_one(weighted(1, 0))
    assert (first_turn_only.turns, first_turn_only.responses, len(first_turn_only.prompt)) == ((), ("a0",), 1), (
        "turns after the last trained one are dropped"
    )
    report = survey(io.BytesIO(json.dumps(weighted(0, 0)).encode()))
    assert report.dropped == {"no_answer_to_train_on": 1}


@pytest.mark.parametrize(
    ("record", "field", "phrase"),
    [
        ({"messages": [user("q"), {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
         "messages[1].tool_calls[0].function.arguments", "not valid JSON"),
        ({"messages": [user("q"), {"role": "assistant", "tool_calls": [{}]}]}, "messages[1].tool_calls[0]", "function"),
        ({"messages": [user("q") | {"tool_calls": [CALL]}, assistant("a")]}, "messages[0].tool_calls", "assistant"),
        ({"messages": [user("q"), assistant("a") | {"weight": 2}]}, "messages[1].weight", "0 or 1"),
        ({"conversations": [{"from": "martian", "value": "q"}]}, "conversations[0].from", "one of"),
        ({"input": "q", "output_1": "a", "output_2": "b", "label": "middle"}, "label", "'output_1' is better"),
        ({"instruction": "q", "completions": [{"response": "a"}, {"response": "b", "score": 1}]}, "completions[].score", "numbers"),
        ({"messages": [user("q"), assistant("a")], "tools": "["}, "tools", "JSON"),
    ],
)  # fmt: skip
def test_an_invalid_field_is_refused_with_its_place(record: JsonObject, field: str, phrase: str) -> None:
    with pytest.raises(DatasetError) as caught:
        read_one(record)
    assert caught.value.field == field
    assert phrase in caught.value.reason


# -- tables ---------------------------------------------------------------------------------------------------

ROWS = [
    {"prompt": "one, two", "chosen": 'he said "yes"', "rejected": "no"},
    {"prompt": "two\nlines", "chosen": "Ja, natürlich", "rejected": "нет"},
    {"prompt": "三", "chosen": "好", "rejected": "[not json"},
]


def table(delimiter: str, newline: str = "\r\n") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(ROWS[0]), delimiter=delimiter, lineterminator=newline)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


@pytest.mark.parametrize("content", [
    table(","), table("\t"), table(";"), table(",", "\n"), b"\xef\xbb\xbf" + table(","), gzip.compress(table(",")),
    table(",")[:-2],
], ids=range(7))  # fmt: skip
def test_a_table_gives_the_rows_of_json_with_the_line_each_begins_on(content: bytes) -> None:
    assert [record for _, record in records(io.BytesIO(content))] == ROWS
    assert [line for line, _ in records(io.BytesIO(content))] == [2, 3, 5]


def test_an_answer_in_a_table_that_is_json_stays_text() -> None:
    text = io.StringIO()
    csv.writer(text).writerows([["prompt", "chosen", "rejected"], ["q", '{"a": 1}', '[{"b": 2}]']])
    (example,) = examples(io.BytesIO(text.getvalue().encode()))
    assert example.responses == ('{"a": 1}', '[{"b": 2}]')


def test_a_table_may_hold_lists_as_json() -> None:
    turns = [user("q"), assistant("a")]
    text = io.StringIO()
    csv.writer(text).writerows([["messages", "note"], [json.dumps(turns), "x"]])
    assert [example.responses for example in examples(io.BytesIO(text.getvalue().encode()))] == [("a",)]


@pytest.mark.parametrize(
    ("content", "line", "phrase"),
    [
        (b'prompt,completion\na,b\n"open,c\n', 3, "CSV"),
        (b"prompt,completion\na,b\nc\n", 3, "has 1 columns, the header 2"),
        (b"prompt,prompt\na,b\n", 1, "twice"),
        (b"prompt,completion\n\xff,b\n", 2, "UTF-8"),
        (b"just words\n", 1, "not valid JSON"),
        (b"PAR1 and nothing else", 1, "Parquet"),
    ],
)
def test_a_damaged_table_is_refused_with_its_line(content: bytes, line: int, phrase: str) -> None:
    with pytest.raises(DatasetError) as caught:
        list(records(io.BytesIO(content)))
    assert caught.value.line == line
    assert phrase in str(caught.value)


def test_parquet_rows_are_read_like_json_rows(tmp_path: Path) -> None:
    rows: list[JsonObject] = [
        {"messages": [user(f"q{k}"), assistant(f"a{k}") | {"tool_calls": None}], "tools": None} for k in range(1000)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with (tmp_path / "rows.parquet").open("rb") as file:
        read_back = list(examples(file))
    assert [example.responses[0] for example in read_back] == [f"a{k}" for k in range(1000)]
    assert [example.line for example in read_back] == list(range(1, 1001))


def test_parquet_values_that_python_cannot_hold_are_an_error_of_the_file(tmp_path: Path) -> None:
    last_day = pyarrow.array([2**31 - 1], pyarrow.date32())
    parquet.write_table(
        pyarrow.table({"prompt": ["q"], "completion": ["a"], "day": last_day}), tmp_path / "rows.parquet"
    )
    bomb = pyarrow.table({"text": pyarrow.array(["x" * 20_000_000] * 32).dictionary_encode()})
    parquet.write_table(bomb, tmp_path / "bomb.parquet")
    for name in ("rows.parquet", "bomb.parquet"):
        with (tmp_path / name).open("rb") as file:
            error = survey(file).error
        assert error is not None and error["line"] == 1


# -- mappings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mapping", "record", "prompt", "responses", "desirable"),
    [
        ({"prompt": "Title: {title}\n{{{n}}}", "completion": "body"}, {"title": "T", "n": 3, "body": "B"}, "Title: T\n{3}", ("B",), True),
        ({"prompt": "meta.question", "chosen": "good", "rejected": "bad"}, {"meta": {"question": "q"}, "good": "a", "bad": "b"},
         "q", ("a", "b"), True),
        ({"prompt": "q", "completion": "a", "label": {"column": "stars", "desirable": [4, 5]}}, {"q": "x", "a": "y", "stars": 2}, "x", ("y",), False),
        ({"prompt": "q", "responses": ["x", "y", "z"], "scores": ["sx", "sy", "sz"]},
         {"q": "p", "x": "1", "y": "2", "z": "3", "sx": 0, "sy": 5, "sz": 2}, "p", ("2", "3", "1"), True),
        ({"prompt": "q", "system": "You are {who}.", "completion": "a"}, {"q": "x", "who": "a cat", "a": "miaow"},
         ("You are a cat.", "x"), ("miaow",), True),
        ({"input": "q", "output_1": "a", "output_2": "b", "label": "winner"}, {"q": "x", "a": "1", "b": "2", "winner": "B"}, "x", ("2", "1"), True),
        ({"input": "q", "output_1": "x", "output_2": "y", "label": {"column": "w", "first": [0], "second": [1]}},
         {"q": "p", "x": "1", "y": "2", "w": "1.0"}, "p", ("2", "1"), True),
    ],
)  # fmt: skip
def test_a_mapping_reads_columns_with_other_names(
    mapping: JsonObject, record: JsonObject, prompt: object, responses: tuple[str, ...], desirable: bool
) -> None:
    example = read_one(record, Mapping.model_validate(mapping))
    system_and_prompt = (example.system, example.prompt) if example.system else example.prompt
    assert (system_and_prompt, example.responses, example.desirable) == (prompt, responses, desirable)


def test_a_missing_column_is_named_and_an_invalid_mapping_is_refused() -> None:
    with pytest.raises(
        DatasetError, match="field 'titel': is named by the mapping, but not in the row; the row has: title"
    ):
        read_one({"title": "x"}, Mapping(prompt="{titel}", completion="title"))
    for invalid in ({}, {"prompt": ""}, {"label": {"column": "x", "desirable": []}}, {"nothing": "x"}):
        with pytest.raises(ValidationError):
            Mapping.model_validate(invalid)
    assert Label(column="x", desirable=["pos"]).desirable == ["pos"]


# -- the report -----------------------------------------------------------------------------------------------


def report_of(rows: list[JsonObject]) -> JsonObject:
    return survey(io.BytesIO("\n".join(map(json.dumps, rows)).encode())).as_json()


def test_the_report_counts_rows_duplicates_and_lengths() -> None:
    rows = [{"prompt": "p" * k, "chosen": "c" * (k + 5), "rejected": "r" * k} for k in range(1, 41)]
    rows += [rows[3], {"prompt": "x", "chosen": "same", "rejected": "same"}]
    report = report_of(rows)
    assert (report["rows"], report["kept"], report["valid"]) == (42, 41, True)
    assert report["dropped"] == {"identical_responses": 1}
    assert report["issues"] == [{"line": 42, "field": None, "reason": "identical_responses"}]
    assert report["duplicates"] == {"rows": 1, "lines": [{"line": 41, "first_line": 4}]}
    assert report["chosen_longer_rate"] == 1.0
    assert any("longer one in 100%" in warning for warning in report["warnings"])
    prompts = report["characters"]["prompt"]
    assert prompts["max"] == 40
    for bucket in prompts["histogram"]:
        expected = sum(bucket["from"] <= len(row["prompt"]) < bucket["to"] for row in rows[:41])
        assert bucket["count"] == expected
    assert sum(bucket["count"] for bucket in prompts["histogram"]) == 41


def test_the_report_warns_of_unbalanced_labels() -> None:
    rows = [{"prompt": f"p{k}", "completion": "a", "label": k > 0} for k in range(20)]
    report = report_of(rows)
    assert report["labels"] == {"desirable": 19, "undesirable": 1}
    assert any("desirable_weight" in warning for warning in report["warnings"])


def test_the_report_of_a_bad_file_names_the_line_and_the_field() -> None:
    report = report_of([{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a"}])
    assert not report["valid"]
    assert report["error"]["line"] == 2 and report["error"]["field"] == "rejected"
    assert report["rows"] == 1
    assert report_of([])["error"]["reason"] == "the file has no rows"


def test_the_reports_memory_does_not_grow_with_the_rows() -> None:
    """Only a hash of eight bytes and a line number are kept per row, to find duplicates."""

    def peak(rows: int) -> int:
        content = b"".join(
            b'{"prompt": "%d", "chosen": "%s", "rejected": "b"}\n' % (k, b"a" * 2000) for k in range(rows)
        )
        file = io.BytesIO(content)
        tracemalloc.start()
        try:
            survey(file)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small, large = peak(2_000), peak(10_000)
    assert large - small < 8_000 * 250, "less than a tenth of what the rows hold"


def test_duplicates_are_looked_for_in_a_bounded_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.spec.datasets.report.MAX_REMEMBERED", 2)
    row = {"prompt": "p", "completion": "c"}
    report = Report()
    rows = [
        row,
        {"prompt": "q", "completion": "c"},
        {"prompt": "r", "completion": "c"},
        {"prompt": "r", "completion": "c"},
        row,
    ]
    list(examples(io.BytesIO("\n".join(map(json.dumps, rows)).encode()), None, report))
    assert (report.kind, report.duplicates) == (Kind.SUPERVISED, 1)

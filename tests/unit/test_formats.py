"""The forms people have their data in: conversations, tools, tables, mappings; and what the report says of them."""

import csv
import gzip
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

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


def one(record: dict[str, Any], mapping: Mapping | None = None) -> Example:
    (example,) = examples(io.BytesIO(json.dumps(record).encode()), mapping)
    return example


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


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
def test_what_people_have_becomes_a_prompt_and_its_responses(
    record: dict[str, Any], prompt: Any, responses: tuple[Any, ...]
) -> None:
    example = one(record)
    asked = (example.system, example.prompt) if example.system else example.prompt
    assert (asked, example.responses) == (prompt, responses)


@pytest.mark.parametrize(
    ("record", "desirable"),
    [
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "kto_tag": False}, False),
        ({"instruction": "q", "output": "a", "label": True}, True),
        ({"prompt": "q", "completion": "a", "label": "False"}, False),
    ],
)
def test_labels(record: dict[str, Any], desirable: bool) -> None:
    assert one(record).desirable is desirable


def test_weights_choose_the_turns_that_are_learned() -> None:
    def weighted(*weights: int | None) -> dict[str, Any]:
        turns: list[dict[str, Any]] = []
        for number, weight in enumerate(weights):
            turns += [user(f"q{number}"), assistant(f"a{number}") | ({} if weight is None else {"weight": weight})]
        return {"messages": turns}

    assert one(weighted(None, None)).turns == ()
    assert (one(weighted(0, 1)).turns, one(weighted(0, 1)).responses) == ((), ("a1",))
    assert (one(weighted(1, 0, 1)).turns, one(weighted(1, 0, 1)).responses) == ((1,), ("a2",))
    early = one(weighted(1, 0))
    assert (early.turns, early.responses, len(early.prompt)) == ((), ("a0",), 1), "what follows is not needed"
    report = survey(io.BytesIO(json.dumps(weighted(0, 0)).encode()))
    assert report.dropped == {"no_answer_to_train_on": 1}


@pytest.mark.parametrize(
    ("record", "field", "says"),
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
def test_what_is_wrong_is_told_with_its_place(record: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(DatasetError) as caught:
        one(record)
    assert caught.value.field == field
    assert says in caught.value.reason


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
def test_tables_read_like_json_with_the_line_a_row_begins_on(content: bytes) -> None:
    assert [record for _, record in records(io.BytesIO(content))] == ROWS
    assert [line for line, _ in records(io.BytesIO(content))] == [2, 3, 5]


def test_an_answer_that_is_json_stays_text() -> None:
    text = io.StringIO()
    csv.writer(text).writerows([["prompt", "chosen", "rejected"], ["q", '{"a": 1}', '[{"b": 2}]']])
    (example,) = examples(io.BytesIO(text.getvalue().encode()))
    assert example.responses == ('{"a": 1}', '[{"b": 2}]')


def test_a_table_may_hold_lists_as_json() -> None:
    turns = [user("q"), assistant("a")]
    text = io.StringIO()
    csv.writer(text).writerows([["messages", "note"], [json.dumps(turns), "x"]])
    assert [e.responses for e in examples(io.BytesIO(text.getvalue().encode()))] == [("a",)]


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        (b'prompt,completion\na,b\n"open,c\n', 3, "CSV"),
        (b"prompt,completion\na,b\nc\n", 3, "has 1 columns, the header 2"),
        (b"prompt,prompt\na,b\n", 1, "twice"),
        (b"prompt,completion\n\xff,b\n", 2, "UTF-8"),
        (b"just words\n", 1, "not valid JSON"),
        (b"PAR1 and nothing else", 1, "Parquet"),
    ],
)
def test_a_damaged_table_is_told_with_its_line(content: bytes, line: int, says: str) -> None:
    with pytest.raises(DatasetError) as caught:
        list(records(io.BytesIO(content)))
    assert caught.value.line == line
    assert says in str(caught.value)


def test_parquet_rows_are_json_rows(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [user(f"q{k}"), assistant(f"a{k}") | {"tool_calls": None}], "tools": None} for k in range(1000)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with (tmp_path / "rows.parquet").open("rb") as file:
        found = list(examples(file))
    assert [e.responses[0] for e in found] == [f"a{k}" for k in range(1000)]
    assert [e.line for e in found] == list(range(1, 1001))


def test_parquet_that_python_cannot_hold_is_the_users_error(tmp_path: Path) -> None:
    late = pyarrow.array([2**31 - 1], pyarrow.date32())
    parquet.write_table(pyarrow.table({"prompt": ["q"], "completion": ["a"], "day": late}), tmp_path / "rows.parquet")
    huge = pyarrow.table({"text": pyarrow.array(["x" * 20_000_000] * 32).dictionary_encode()})
    parquet.write_table(huge, tmp_path / "bomb.parquet")
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
def test_a_mapping_says_what_columns_cannot(
    mapping: dict[str, Any], record: dict[str, Any], prompt: Any, responses: tuple[str, ...], desirable: bool
) -> None:
    found = one(record, Mapping.model_validate(mapping))
    asked = (found.system, found.prompt) if found.system else found.prompt
    assert (asked, found.responses, found.desirable) == (prompt, responses, desirable)


def test_a_mapping_names_the_column_that_is_not_there() -> None:
    with pytest.raises(
        DatasetError, match="field 'titel': is named by the mapping, but not in the row; the row has: title"
    ):
        one({"title": "x"}, Mapping(prompt="{titel}", completion="title"))
    for wrong in ({}, {"prompt": ""}, {"label": {"column": "x", "desirable": []}}, {"nothing": "x"}):
        with pytest.raises(ValidationError):
            Mapping.model_validate(wrong)
    assert Label(column="x", desirable=["pos"]).desirable == ["pos"]


# -- the report -----------------------------------------------------------------------------------------------


def report_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return survey(io.BytesIO("\n".join(map(json.dumps, rows)).encode())).as_json()


def test_the_report_counts_what_a_reader_would_count() -> None:
    rows = [{"prompt": "p" * k, "chosen": "c" * (k + 5), "rejected": "r" * k} for k in range(1, 41)]
    rows += [rows[3], {"prompt": "x", "chosen": "same", "rejected": "same"}]
    found = report_of(rows)
    assert (found["rows"], found["kept"], found["valid"]) == (42, 41, True)
    assert found["dropped"] == {"identical_responses": 1}
    assert found["issues"] == [{"line": 42, "field": None, "reason": "identical_responses"}]
    assert found["duplicates"] == {"rows": 1, "lines": [{"line": 41, "first_line": 4}]}
    assert found["chosen_longer_rate"] == 1.0
    assert any("longer one in 100%" in warning for warning in found["warnings"])
    prompts = found["characters"]["prompt"]
    assert prompts["max"] == 40
    for part in prompts["histogram"]:
        expected = sum(part["from"] <= len(row["prompt"]) < part["to"] for row in rows[:41])
        assert part["count"] == expected
    assert sum(part["count"] for part in prompts["histogram"]) == 41


def test_the_report_of_labels_warns_of_their_balance() -> None:
    rows = [{"prompt": f"p{k}", "completion": "a", "label": k > 0} for k in range(20)]
    found = report_of(rows)
    assert found["labels"] == {"desirable": 19, "undesirable": 1}
    assert any("desirable_weight" in warning for warning in found["warnings"])


def test_the_report_of_a_bad_file_has_its_place() -> None:
    found = report_of([{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a"}])
    assert not found["valid"]
    assert found["error"]["line"] == 2 and found["error"]["field"] == "rejected"
    assert found["rows"] == 1
    assert report_of([])["error"]["reason"] == "the file has no rows"


def test_the_reports_memory_does_not_grow_with_the_rows() -> None:
    """But for eight bytes and a line number a row, in which duplicates are found."""

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


def test_pairs_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Duplicates are looked for in a bounded number of rows."""
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

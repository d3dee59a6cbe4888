"""Datasets: every format, and every defect with its line and field."""

import gzip
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.spec.datasets.check import check, examples
from app.spec.datasets.errors import DatasetError
from app.spec.datasets.example import Example, Kind
from app.spec.datasets.reader import records
from app.spec.datasets.report import Report
from app.spec.json_types import JsonObject
from tests.helpers.dataset_files import assistant, user


def read(content: bytes) -> tuple[list[Example], Report]:
    report = Report()
    return list(examples(io.BytesIO(content), None, report)), report


def read_one(record: JsonObject) -> Example:
    parsed, _ = read(json.dumps(record).encode())
    (example,) = parsed
    return example


HH_TRANSCRIPT = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: {}\n\nAssistant:{}"


@pytest.mark.parametrize(
    ("record", "prompt", "responses"),
    [
        (
            {"input": {"messages": [user("q")]}, "preferred_output": [assistant("a")], "non_preferred_output": [assistant("b")]},
            [user("q")], ("a", "b"),
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "q", ("a", "b")),
        ({"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}, [user("q")], ("a", "b")),
        ({"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}, [user("q")], ("a", "b")),
        (
            {"chosen": HH_TRANSCRIPT.format("why", " because"), "rejected": HH_TRANSCRIPT.format("why", " no")},
            [user("hi"), assistant("hello"), user("why")], ("because", "no"),
        ),
        (
            {"question": "q?", "response_j": "good", "response_k": "bad", "qid": 7, "date": "x"},
            "Question: q?\n\nAnswer: ", ("good", "bad"),
        ),
        ({"messages": [user("q"), assistant("a"), user("r"), assistant("b")]}, [user("q"), assistant("a"), user("r")], ("b",)),
        ({"messages": [{"role": "developer", "content": "s"}, user("q"), assistant("a")]},
         [{"role": "system", "content": "s"}, user("q")], ("a",)),
        ({"messages": [user("q"), {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
         [user("q")], ("ab",)),
        ({"prompt": "q", "completion": "a"}, "q", ("a",)),
        ({"text": "once upon"}, "", ("once upon",)),
    ],
)  # fmt: skip
def test_every_format_becomes_a_prompt_and_its_responses(
    record: JsonObject, prompt: object, responses: tuple[str, ...]
) -> None:
    example = read_one(record)
    assert (example.prompt, example.responses) == (prompt, responses)


def test_every_container_gives_the_same_rows() -> None:
    rows = [{"text": f'row {i} "quoted" [brackets] {{braces}} \\ ü'} for i in range(5)]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    array = json.dumps(rows, indent=2).encode()
    expected = [(row["text"],) for row in rows]
    for content in (
        lines,
        lines.replace(b"\n", b"\r\n") + b"\r\n\r\n",
        b"\xef\xbb\xbf" + lines,
        b"\n\n  " + lines,
        array,
        b"\xef\xbb\xbf\r\n" + array + b"\n",
        json.dumps(rows).encode(),
        gzip.compress(lines),
        gzip.compress(array),
    ):
        parsed, report = read(content)
        assert [example.responses for example in parsed] == expected
        assert (report.rows, report.kept) == (5, 5)


def test_lines_are_counted_from_one_in_every_container() -> None:
    rows = b'{"text": "a"}\n\n{"text": "b"}\n{"text": 5}'
    array = b'\n[\n{"text": "a"},\n\n{"text":\n"b"}, {"text": 5}\n]'
    for content, line in ((rows, 4), (b"\r\n" + rows, 5), (array, 6)):
        with pytest.raises(DatasetError) as caught:
            read(content)
        assert (caught.value.line, caught.value.field) == (line, "text")


@pytest.mark.parametrize(
    ("content", "line", "field", "phrase"),
    [
        (b'{"text": "a"}\n{"text": "b"', 2, None, "not valid JSON"),
        (b'{"text": "a"}\n[1]', 2, None, "must be a JSON object, not an array"),
        (b'{"text": "a"}\n{"txt": "b"}', 2, "text", "is missing"),
        (b'{"text": "\xff"}', 1, None, "UTF-8"),
        (b'{"text": "\\ud800"}', 1, None, "not valid JSON"),
        (b'{"text": "a"}\n{"text": NaN, }', 2, None, "not valid JSON"),
        (b'[{"text": "a"}', 1, None, "cut off"),
        (b'[{"text": "a"},,]', 1, None, "comma"),
        (b'[{"text": "a"}] {"text": "b"}', 1, None, "after the end"),
        (b'{"a": 1}', 1, None, "no known format"),
        (b'{"prompt": "q", "chosen": 5, "rejected": "b"}', 1, "chosen", "list of messages"),
        (b'{"messages": []}', 1, "messages", "not empty"),
        (b'{"messages": [{"role": ["user"], "content": "x"}]}', 1, "messages[0].role", "one of"),
        (b'{"messages": [{"role": "robot", "content": "x"}]}', 1, "messages[0].role", "one of"),
        (b'{"messages": [{"role": "user", "content": 5}]}', 1, "messages[0].content", "must be a string"),
        (b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "tools": [{}]}', 1, "tools[0]", "function"),
        (b'{"prompt": "q", "completion": "a", "label": true}\n{"prompt": "q", "completion": "a", "label": 2}', 1, "label", "a good answer"),
        (b'{"messages": [{"role": "assistant", "content": "a"}], "kto_tag": 1, "label": true}', 1, "kto_tag", "a good answer"),
        (b'{"prompt": "q", "responses": ["a"]}', 1, "responses", "at least two"),
        (b'{"prompt": "q", "responses": ["a", 5]}', 1, "responses[1]", "list of messages"),
        (b'{"prompt": "q", "responses": ["a", "b"], "scores": [1]}', 1, "scores", "list of 2 numbers"),
        (b'{"prompt": "q", "responses": ["a", "b"], "ranks": [1, true]}', 1, "ranks", "must be numbers"),
        (b'{"prompt": "q", "responses": ["a", "b"], "ranks": [1, 2], "scores": [1, 2]}', 1, "ranks", "without 'scores'"),
        (b'{"chosen": "\\n\\nHuman: q\\n\\nAssistant: a", "rejected": "x"}', 1, "rejected", "transcript"),
        (b'{"input": {}, "preferred_output": [], "non_preferred_output": []}', 1, "input.messages", "list"),
        (gzip.compress(b'{"text": "a"}\n' * 100, mtime=0)[:-12], 1, None, "damaged or cut off"),
        (b"\x1f\x8bnot gzip", 1, None, "damaged or cut off"),
    ],
)  # fmt: skip
def test_a_defect_is_reported_with_its_line_and_field(
    content: bytes, line: int, field: str | None, phrase: str
) -> None:
    with pytest.raises(DatasetError) as caught:
        read(content)
    assert (caught.value.line, caught.value.field) == (line, field)
    assert phrase in str(caught.value)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "identical_responses"),
        ({"prompt": "q", "chosen": " ", "rejected": "a"}, "empty_chosen"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, "empty_rejected"),
        ({"chosen": HH_TRANSCRIPT.format("x", " a"), "rejected": HH_TRANSCRIPT.format("y", " b")}, "histories_differ"),
        ({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"}, "ends_without_an_answer"),
        ({"conversations": [{"from": "human", "value": "q"}]}, "ends_without_an_answer"),
        ({"messages": [user("q"), assistant("a") | {"weight": 0}]}, "no_answer_to_train_on"),
        ({"prompt": "q", "completion": ""}, "empty_completion"),
        ({"text": " \n"}, "empty_text"),
        ({"text": float("nan")}, "empty_text"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "empty_rejected"),
        ({"chosen": "no turns", "rejected": "x"}, "no_shared_prompt"),
        ({"prompt": "q", "chosen": [user("other"), assistant("a")], "rejected": "b"}, "answers_another_prompt"),
    ],
)  # fmt: skip
def test_a_useless_row_is_dropped_and_counted(record: JsonObject, reason: str) -> None:
    parsed, report = read(json.dumps(record).encode())
    assert parsed == []
    assert (report.rows, report.kept, report.dropped) == (1, 0, {reason: 1})
    assert report.issues[0]["line"] == 1 and report.issues[0]["reason"] == reason


def test_conversations_that_end_with_a_question_are_prompts_whatever_else_their_rows_have() -> None:
    rows: list[JsonObject] = [
        {"messages": [user("q")], "label": "cat"},
        {"messages": [user("a"), assistant("b"), user("c")], "n": [1]},
    ]
    parsed, report = read("\n".join(map(json.dumps, rows)).encode())
    assert (report.format, report.kind, report.kept) == ("openai_prompts", Kind.PROMPTS, 2)
    assert [example.prompt for example in parsed] == [row["messages"] for row in rows]
    assert all(not example.responses for example in parsed)
    many = [{"messages": [user("q")]}] * 300 + [{"messages": [user("q"), assistant("a")]}]
    with pytest.raises(DatasetError, match="must end with a turn of the user") as refused:
        read("\n".join(map(json.dumps, many)).encode())
    assert refused.value.line == 301


def test_a_file_that_cannot_train_the_method_is_refused() -> None:
    for content in (b"", b"[]", b"\n \n"):
        with pytest.raises(DatasetError, match="no rows"):
            check(io.BytesIO(content), Kind.SUPERVISED)
    with pytest.raises(DatasetError, match="needs pairs"):
        check(io.BytesIO(b'{"text": "a"}'), Kind.PREFERENCE)
    with pytest.raises(DatasetError, match="no row is left"):
        check(io.BytesIO(b'{"prompt": "q", "chosen": "a", "rejected": "a"}'), Kind.PREFERENCE)
    assert check(io.BytesIO(b'{"prompt": "q", "chosen": "a", "rejected": "b"}'), Kind.SUPERVISED).kept == 1


def test_a_record_over_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.spec.datasets.limits.MAX_RECORD_BYTES", 1000)
    for content in (b'{"text": "' + b"x" * 2_000_000, b'[{"text": "' + b"x" * 2_000_000):
        with pytest.raises(DatasetError, match="larger than 1000 bytes"):
            read(content)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    rows=st.lists(st.dictionaries(st.text(), json_values, max_size=4), min_size=1, max_size=6),
    indent=st.sampled_from([None, 1]),
    chunk=st.integers(1, 40),
)
def test_an_array_is_split_into_its_elements(rows: list[JsonObject], indent: int | None, chunk: int) -> None:
    """This holds for any elements, and for any chunk size of the reader."""
    content = json.dumps(rows, indent=indent).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("app.spec.datasets.limits.CHUNK", chunk)
        assert [record for _, record in records(io.BytesIO(content))] == rows


@settings(deadline=None)  # the first file with the mark of Parquet takes long, since it loads the reader
@given(st.binary(max_size=300))
def test_any_bytes_give_examples_or_a_dataset_error(content: bytes) -> None:
    try:
        read(content)
    except DatasetError as error:
        assert error.line >= 1


def test_labelled_answers_say_whether_they_are_desirable() -> None:
    assert read_one({"prompt": "q", "completion": " a", "label": False}) == Example(1, "q", (" a",), desirable=False)
    chat = {"messages": [user("q"), {"role": "assistant", "content": "a"}]}
    assert read_one({**chat, "label": True}) == Example(1, [user("q")], ("a",), desirable=True)
    assert read_one({**chat, "kto_tag": False}) == Example(1, [user("q")], ("a",), desirable=False)


def test_an_unknown_label_is_refused_and_never_ignored() -> None:
    with pytest.raises(DatasetError, match=r"'label': has the values \"spam\": which mean a good answer"):
        read_one({"prompt": "q", "completion": " a", "label": "spam"})


@pytest.mark.parametrize(
    ("order", "expected", "scores"),
    [
        ({}, ("a", "b", "c"), ()),
        ({"ranks": [2, 3, 1]}, ("c", "a", "b"), (-1, -2, -3)),
        ({"scores": [0.5, -1, 7]}, ("c", "a", "b"), (7, 0.5, -1)),
    ],
)
def test_ranked_answers_are_sorted_best_first(
    order: dict[str, list[float]], expected: tuple[str, ...], scores: tuple[float, ...]
) -> None:
    row = {"prompt": "q", "responses": ["a", "b", "c"], **order}
    assert read_one(row) == Example(1, "q", expected, scores=scores)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"responses": ["a", "b"], "scores": [1, 1]}, "tied_ranks"),
        ({"responses": ["a", "a"]}, "identical_responses"),
        ({"responses": ["a", " "]}, "empty_response"),
    ],
)
def test_a_ranking_without_information_is_dropped_and_counted(record: JsonObject, reason: str) -> None:
    _, report = read(json.dumps({"prompt": "q", **record}).encode())
    assert report.dropped == {reason: 1}


KINDS_SERVED = {
    Kind.SUPERVISED: {Kind.SUPERVISED, Kind.PROMPTS},
    Kind.PREFERENCE: {Kind.SUPERVISED, Kind.PREFERENCE, Kind.RANKED, Kind.LABELLED, Kind.PROMPTS},
    Kind.RANKED: {Kind.SUPERVISED, Kind.PREFERENCE, Kind.RANKED, Kind.PROMPTS},
    Kind.LABELLED: {Kind.SUPERVISED, Kind.LABELLED, Kind.PROMPTS},
    Kind.PROMPTS: {Kind.PROMPTS},
}


@pytest.mark.parametrize(
    ("kind", "record"),
    [
        (Kind.SUPERVISED, {"prompt": "q", "completion": "a"}),
        (Kind.PREFERENCE, {"prompt": "q", "chosen": "a", "rejected": "b"}),
        (Kind.RANKED, {"prompt": "q", "responses": ["a", "b"]}),
        (Kind.LABELLED, {"prompt": "q", "completion": "a", "label": True}),
        (Kind.PROMPTS, {"prompt": "q"}),
    ],
)
def test_the_kind_of_a_file_decides_which_methods_it_can_train(kind: Kind, record: JsonObject) -> None:
    content = json.dumps(record).encode()
    for need in Kind:
        if need in KINDS_SERVED[kind]:
            assert check(io.BytesIO(content), need).kind == kind
        else:
            with pytest.raises(DatasetError, match="the method needs"):
                check(io.BytesIO(content), need)

"""The same rows are read from every kind of file: JSON Lines, arrays, CSV, Parquet, compressed, recoded or wrapped."""

import bz2
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable

import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from app.spec.datasets import limits
from app.spec.datasets.check import examples, survey
from app.spec.datasets.errors import DatasetError
from app.spec.datasets.example import Example
from app.spec.datasets.mapping import Mapping
from app.spec.datasets.reader import records
from app.spec.json_types import JsonObject
from tests.helpers.dataset_files import as_csv, as_lines, as_parquet

Rows = list[JsonObject]
Write = Callable[[Rows], bytes]


def as_array(rows: Rows) -> bytes:
    return json.dumps(rows, indent=1, ensure_ascii=False).encode()


def as_lines_of_a_table(rows: Rows) -> bytes:
    """JSON Lines as `to_json` of a table writes them: each row has every column, with null for missing values."""
    return as_lines(pyarrow.Table.from_pylist(rows).to_pylist())


WRITERS: dict[str, Write] = {
    "JSON Lines": as_lines,
    "JSON array": as_array,
    "CSV": as_csv,
    "Parquet": as_parquet,
    "JSON from a table": as_lines_of_a_table,
}


def read(content: bytes, mapping: Mapping | None = None) -> list[Example]:
    return list(examples(io.BytesIO(content), mapping))


def contents(parsed: list[Example]) -> list[tuple[object, ...]]:
    """Everything of each example except its line."""
    return [
        (example.conversation, example.responses, example.desirable, example.tools, example.turns, example.raw)
        for example in parsed
    ]


texts = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=12)
words = texts.filter(str.strip)
values = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.booleans(), words, st.none(), st.floats(-1e9, 1e9, allow_nan=False)
)


@st.composite
def arguments(draw: st.DrawFn) -> JsonObject:
    """Arguments of a call. Each has a fixed type, since a column of a table has one type."""
    drawn: JsonObject = {"city": draw(words), "id": draw(st.integers(-(2**63), 2**63 - 1))}
    if draw(st.booleans()):
        drawn["unit"] = draw(words)
    if draw(st.booleans()):
        drawn["days"] = draw(st.lists(st.integers(-5, 2**53 + 5), min_size=1, max_size=3))
    return drawn


@st.composite
def conversations(draw: st.DrawFn) -> list[JsonObject]:
    turns: list[JsonObject] = []
    if draw(st.booleans()):
        turns.append({"role": "system", "content": draw(words)})
    for _ in range(draw(st.integers(1, 2))):
        turns.append({"role": "user", "content": draw(words)})
        if draw(st.booleans()):
            call = {"type": "function", "function": {"name": "look", "arguments": draw(arguments())}}
            turns.append({"role": "assistant", "content": draw(texts), "tool_calls": [call]})
            turns.append({"role": "tool", "content": draw(words), "name": "look"})
        reasoning = {"reasoning_content": draw(words)} if draw(st.booleans()) else {}
        turns.append({"role": "assistant", "content": draw(words), **reasoning})
    return turns


def rows_of(**fields: st.SearchStrategy[object]) -> st.SearchStrategy[Rows]:
    return st.lists(st.fixed_dictionaries(dict(fields)), min_size=1, max_size=5)


optional = st.none() | texts
ROWS_OF_EACH_FORMAT = st.one_of(
    rows_of(prompt=words, chosen=optional, rejected=optional, system=optional),
    rows_of(prompt=words, completion=words, label=st.booleans() | st.none()),
    rows_of(prompt=words, completion=words, label=st.sampled_from([0, 1])),
    rows_of(input=words, output_1=words, output_2=words, label=st.sampled_from([1, 2]) | st.none()),
    rows_of(prompt=words, responses=st.lists(words, min_size=2, max_size=4), scores=st.just([1, 2.5, 3, 4])),
    rows_of(messages=conversations()),
    rows_of(text=words, score=values),
)


def outcome(content: bytes) -> object:
    try:
        return contents(read(content))
    except DatasetError as error:
        return error.field, error.reason.split(":")[0]


@given(ROWS_OF_EACH_FORMAT)
@settings(deadline=None, max_examples=150)
def test_the_same_rows_give_the_same_examples_from_every_kind_of_file(rows: Rows) -> None:
    """This includes null, missing values and long integers."""
    for row in rows:
        if "scores" in row:
            row["scores"] = row["scores"][: len(row["responses"])]
    try:
        written = {name: write(rows) for name, write in WRITERS.items()}
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):  # a column of a table cannot hold several types
        written = {name: WRITERS[name](rows) for name in ("JSON Lines", "JSON array")}
    expected = outcome(written["JSON Lines"])
    for name, content in written.items():
        assert outcome(content) == expected, name


def test_call_arguments_that_a_table_filled_with_null_are_removed() -> None:
    """Arrow gives every call the arguments of all calls."""

    def row(**given_arguments: object) -> JsonObject:
        call = {"type": "function", "function": {"name": "look", "arguments": given_arguments}}
        return {
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        }

    rows = [row(city="Paris"), row(city="Rome", unit="C"), row(city="Oslo", code=9007199254740993)]
    for name in ("JSON Lines", "Parquet", "JSON from a table"):
        answers = [example.responses[0] for example in read(WRITERS[name](rows))]
        given_arguments = [
            turns[0]["tool_calls"][0]["function"]["arguments"] for turns in answers if not isinstance(turns, str)
        ]
        assert given_arguments == [
            {"city": "Paris"},
            {"city": "Rome", "unit": "C"},
            {"city": "Oslo", "code": 9007199254740993},
        ]


@pytest.mark.parametrize("number", [2**53 + 1, 2**63, 2**64 + 1, 10**30, -(10**25) - 1])
def test_long_integers_keep_every_digit(number: int) -> None:
    call = {"function": {"name": "look", "arguments": {"id": number}}}
    call_with_json_arguments = {"function": {"name": "look", "arguments": json.dumps({"id": number})}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call, call_with_json_arguments]}]
    for write in (as_lines, as_array, as_csv):
        (example,) = read(write([{"messages": turns}]))
        (answer,) = example.responses
        assert isinstance(answer, list)
        assert [tool_call["function"]["arguments"] for tool_call in answer[0]["tool_calls"]] == [
            {"id": number},
            {"id": number},
        ]


# -- compression, encoding and wrapping -----------------------------------------------------------------------

ROWS: Rows = [{"prompt": f"π {k}", "chosen": 'a "b"\n', "rejected": "naïve 🙂"} for k in range(300)]


def in_zip(content: bytes, *others: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("folder/rows.jsonl", content)
        for name in others:
            archive.writestr(name, b"x")
    return file.getvalue()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "gzip, two members": lambda content: gzip.compress(content[:100]) + gzip.compress(content[100:]),
    "bzip2": bz2.compress,
    "bzip2, two streams": lambda content: bz2.compress(content[:100]) + bz2.compress(content[100:]),
    "xz": lzma.compress,
    "xz, two streams": lambda content: lzma.compress(content[:100]) + b"\0" * 8 + lzma.compress(content[100:]),
    "Zstandard": zstandard.compress,
    "Zstandard, two frames": lambda content: zstandard.compress(content[:100]) + zstandard.compress(content[100:]),
    "ZIP": in_zip,
    "ZIP from a Mac": lambda content: in_zip(content, "__MACOSX/folder/._rows.jsonl"),
    "UTF-8 with a byte order mark": lambda content: b"\xef\xbb\xbf" + content,
    "UTF-16, as PowerShell writes it": lambda content: content.decode().encode("utf-16"),
    "UTF-16, the other order": lambda content: b"\xfe\xff" + content.decode().encode("utf-16-be"),
    "UTF-16 in gzip": lambda content: gzip.compress(content.decode().encode("utf-16")),
}


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("writer", ["JSON Lines", "JSON array", "CSV"])
def test_compression_and_encoding_do_not_change_the_rows(packer: str, writer: str) -> None:
    content = WRITERS[writer](ROWS)
    assert [record for _, record in records(io.BytesIO(PACKERS[packer](content)))] == ROWS


@pytest.mark.parametrize("packer", ["gzip", "bzip2", "xz", "Zstandard", "ZIP"])
def test_a_truncated_or_damaged_file_is_refused(packer: str) -> None:
    content = PACKERS[packer](as_lines(ROWS * 20))
    for broken in (content[: len(content) // 2], content[:-4], content[:40] + b"\xff\x00\xff" + content[43:]):
        with pytest.raises(DatasetError, match=r"damaged or cut off|cannot be read"):
            list(records(io.BytesIO(broken)))


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        (b"7z\xbc\xaf\x27\x1c rest", "7-Zip"),
        (b"Rar!\x1a\x07 rest", "RAR"),
        (b"ARROW1\0\0 rest", "Arrow IPC file; write it as Parquet"),
        (b"SQLite format 3\0", "SQLite"),
        (b"\x04\x22\x4d\x18 rest", "LZ4"),
        (b"%PDF-1.7", "PDF"),
        (b"\x80\x04\x95 pickled", "never read"),
        (b"x" * 257 + b"ustar\0" + b"x" * 100, "tar archive"),
        (gzip.compress(b"x" * 257 + b"ustar\0" + b"x" * 100, mtime=0), "tar archive"),
        (in_zip(b"{}", "other.jsonl"), "holds 2"),
        (in_zip(b"{}", "[Content_Types].xml"), "Excel"),
        (gzip.compress(b"PAR1 and more", mtime=0), "Parquet file inside gzip"),
        ('{"text": "é"}'.encode("utf-32"), "UTF-32"),
        ('{"text": "e"}'.encode("utf-16-le"), "without a byte order mark"),
        ('{"text": "é"}\n'.encode("latin-1"), "Windows-1252 or Latin-1"),
        ('[{"text": "é"}]'.encode("latin-1"), "save the file as UTF-8"),
        ("text\né\n".encode("latin-1"), "Windows-1252 or Latin-1"),
    ],
    ids=lambda value: (
        value if isinstance(value, str) else type(value).__name__
    ),  # the bytes of an archive hold the current time
)
def test_an_unsupported_file_type_is_refused_by_name(content: bytes, phrase: str) -> None:
    with pytest.raises(DatasetError, match=phrase):
        list(records(io.BytesIO(content)))


@pytest.mark.parametrize("before", ["{", '{"version": "1.0", "count": 3, "ok": true, "next": null, ', "\n {\n"])
@pytest.mark.parametrize("name", ["data", "rows", "examples"])
@pytest.mark.parametrize("after", ["}", ', "license": {"name": "MIT"}}\n', " \n}"])
def test_rows_wrapped_in_a_json_object_are_read(before: str, name: str, after: str) -> None:
    content = f'{before}"{name}": {as_array(ROWS).decode()}{after}'.encode()
    numbered = list(records(io.BytesIO(content)))
    assert [record for _, record in numbered] == ROWS
    assert numbered[0][0] == 1 + before.count("\n") + 1


def test_an_object_that_is_damaged_after_its_rows_is_refused() -> None:
    with pytest.raises(DatasetError, match="after the rows"):
        list(records(io.BytesIO(b'{"data": [{"text": "a"}], oops}')))


def test_a_table_of_one_column_is_read() -> None:
    for content in (
        b"text\none, two\nthree\n",
        b'Text \n"one, two"\nthree\n',
        b'\xef\xbb\xbftext\r\n"one, two"\r\nthree\r\n',
    ):
        if content.startswith(b"text\none"):
            with pytest.raises(DatasetError, match="has 2 columns, the header 1"):
                read(content)
        else:
            assert [example.responses for example in read(content)] == [("one, two",), ("three",)]
    assert [example.prompt for example in read(b"prompt\nwhy?\nhow?\n")] == ["why?", "how?"]


def test_an_answer_that_looks_like_json_stays_text() -> None:
    rows = [
        {"prompt": "as JSON", "chosen": '{"from": "Paris", "to": "Rome"}', "rejected": '[{"role": "admin"}]'},
        {"prompt": "and so", "chosen": "[]", "rejected": '{"a": [1, 2]}'},
    ]
    assert contents(read(as_csv(rows))) == contents(read(as_lines(rows)))


@pytest.mark.parametrize("names", [("Prompt", "Chosen", "Rejected"), (" prompt", "chosen ", "REJECTED")])
def test_column_names_may_differ_in_case_and_spaces(names: tuple[str, ...]) -> None:
    rows = [dict(zip(names, row.values(), strict=True)) for row in ROWS[:3]]
    for writer in ("JSON Lines", "CSV", "Parquet"):
        assert contents(read(WRITERS[writer](rows))) == contents(read(as_lines(ROWS[:3])))
    mapping = Mapping(prompt="PROMPT", chosen="chosen", rejected="Rejected")
    assert contents(read(as_lines(rows), mapping)) == contents(read(as_lines(ROWS[:3])))


def test_nan_in_an_unread_column_is_ignored() -> None:
    rows = [row | {"score": float("nan"), "more": [float("inf")]} for row in ROWS[:3]]
    for write in (as_lines, as_array):
        assert contents(read(write(rows))) == contents(read(as_lines(ROWS[:3])))
    content = as_lines([{"prompt": "p", "chosen": "NaN", "rejected": "b", "score": float("nan")}])
    assert read(content)[0].responses == ("NaN", "b")


def test_an_array_of_large_records_is_read_with_any_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "🙂" * 700 + '\\"\\\\ ] } ,'}, {"text": "x" * 3000}]
    for chunk in (1, 7, 64, 1000):
        monkeypatch.setattr(limits, "CHUNK", chunk)
        assert [record for _, record in records(io.BytesIO(as_array(rows)))] == rows


def test_a_row_with_too_many_answers_is_refused() -> None:
    """K answers give K (K − 1) / 2 pairs."""
    row = {"prompt": "q", "responses": [f"a{k}" for k in range(limits.MAX_ANSWERS + 1)]}
    error = survey(io.BytesIO(as_lines([row]))).error
    assert error is not None and error["field"] == "responses" and "at most 64" in error["reason"]
    row["responses"] = row["responses"][:-1]
    assert survey(io.BytesIO(as_lines([row]))).kept == 1

"""Token rows of a file: flat arrays give back the rows that were put in."""

import errno
import io
import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.spec.datasets.errors import DatasetError
from app.spec.datasets.example import Example, Kind, Message
from tests.helpers.tiny_model import CHATML, make_tokenizer
from tests.helpers.trainer import make_pairs, make_row, write_records
from worker.trainer import arrays, dataset
from worker.trainer.arrays import Arrays, Shelf
from worker.trainer.cache import Cache
from worker.trainer.data import Recipe, Response, Row, Tally, rows
from worker.trainer.dataset import Groups, Rows, load
from worker.trainer.errors import UserError
from worker.trainer.events import Events

TOKENIZER = make_tokenizer()
PAIRS = Recipe(Kind.PREFERENCE, 64)

tokens = st.lists(st.integers(0, 2**31 - 1), max_size=5)
responses = st.lists(st.tuples(tokens, st.booleans()), min_size=1, max_size=4)
any_rows = st.lists(st.tuples(st.integers(1, 10**9), tokens, responses, st.booleans()), max_size=6)


def make_rows(drawn: Sequence[tuple[int, list[int], list[tuple[list[int], bool]], bool]]) -> list[Row]:
    return [
        Row(line, tuple(prompt), tuple(Response(tuple(ids), (flag,) * len(ids)) for ids, flag in answers), desirable)
        for line, prompt, answers, desirable in drawn
    ]


@given(any_rows, st.lists(st.integers(0, 6), max_size=3), st.data())
@settings(deadline=None, max_examples=100)
def test_rows_come_back_as_they_went_in(drawn: Any, cuts: list[int], data: st.DataObject) -> None:
    expected = make_rows(drawn)
    bounds = [0, *sorted(min(cut, len(expected)) for cut in cuts), len(expected)]
    chunks = [Arrays.of(expected[start:stop]) for start, stop in pairwise(bounds)]
    with TemporaryDirectory() as folder:
        shelf = Shelf(Path(folder))
        stored = Rows(shelf.keep_rows("rows", lambda: chunks))
        assert list(Rows(shelf.keep_rows("rows", lambda: []))) == expected, "another rank maps the same file"
    assert list(stored) == expected
    assert stored.lines == [row.line for row in expected]
    keep = data.draw(st.lists(st.booleans(), min_size=len(expected), max_size=len(expected)))
    assert list(stored.where(keep)) == [row for row, flag in zip(expected, keep, strict=True) if flag]
    assert list(stored[1:3]) == expected[1:3]
    assert stored.digest() == Rows.of(expected).digest()


def test_the_digest_covers_every_token_and_which_are_scored() -> None:
    row = make_row(1, 4, 3, 5)
    first = row.responses[0]
    others = [
        Row(1, row.prompt[:-1], row.responses),
        Row(1, (*row.prompt[:-1], row.prompt[-1] + 1), row.responses),
        Row(1, row.prompt, row.responses[::-1]),
        Row(1, row.prompt, row.responses[:1]),
        Row(1, row.prompt, (Response(first.ids, (True,) * 3), row.responses[1])),
        Row(1, (*row.prompt, first.ids[0]), (Response(first.ids[1:], first.scored[1:]), row.responses[1])),
    ]
    digests = {Rows.of([other]).digest() for other in [row, *others]} | {Rows.of([row, row]).digest()}
    assert len(digests) == len(others) + 2
    # The line number is not content.
    assert Rows.of([Row(2, row.prompt, row.responses)]).digest() == Rows.of([row]).digest()


def test_rows_of_one_prompt_have_one_key_and_rows_without_a_prompt_their_own() -> None:
    same, other = make_row(1, 4, 3), make_row(2, 4, 3)
    keys = Rows.of([same, other, same, make_row(3, 0, 3), make_row(3, 0, 3)]).prompts()
    assert keys[0] == keys[2] != keys[1]
    assert len(set(keys)) == 4


def tokenised(path: Path, recipe: Recipe, tokenizer: Any = TOKENIZER) -> tuple[list[Row], Tally]:
    tally = Tally()
    chunks = list(dataset._tokenise(path, tokenizer, recipe, tally))
    return [row for chunk in chunks for row in Rows(chunk)], tally


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 4))
@settings(deadline=None)
def test_rows_with_one_key_are_grouped_in_the_order_of_their_first_rows(keys: list[int], largest: int) -> None:
    expected, open_groups = list[list[int]](), dict[int, list[int]]()
    for number, key in enumerate(keys):
        if key not in open_groups or len(open_groups[key]) == largest:
            open_groups[key] = []
            expected.append(open_groups[key])
        open_groups[key].append(number)
    groups = Groups.of(numpy.array(keys, dtype=numpy.int64), largest)
    assert [groups.rows[start:stop].tolist() for start, stop in pairwise(groups.starts.tolist())] == expected
    order = numpy.arange(len(expected))[::-1]
    assert groups.ordered(order).tolist() == [number for group in reversed(expected) for number in group]


@given(any_rows)
@settings(deadline=None, max_examples=50)
def test_counts_and_vocabulary_do_not_depend_on_how_much_is_counted_at_a_time(drawn: Any) -> None:
    expected = make_rows(drawn)
    scored = [[sum(response.scored[0 if row.prompt else 1 :]) for response in row.responses] for row in expected]
    for together in (1, 3, dataset.COUNTED_TOGETHER):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dataset, "COUNTED_TOGETHER", together)
            rows = Rows.of(expected)
            assert rows.scored_tokens(list(range(len(expected)))) == scored
    tokens = {token for row in expected for part in (row.prompt, *(r.ids for r in row.responses)) for token in part}
    assert rows.vocabulary == sorted(tokens)


def test_what_a_rank_has_computed_another_one_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "SMALL_BYTES", 0)
    rows = Rows.of(make_row(number, 3, 4, 5) for number in range(9))
    first, second = (rows.on(Shelf(tmp_path).of("train")) for _ in range(2))
    sizes = first.tokens([0, 1, 2])

    def never() -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr(second, "_count_scored", never)
    assert first.scored_tokens([1]) == second.scored_tokens([1])
    assert second.tokens([0, 1, 2]) == sizes == 36
    assert isinstance(second._scored, numpy.memmap)
    assert {path.name for path in tmp_path.iterdir()} == {"train-numbers.npy", "train-scored.npy", "train-sizes.npy"}


def test_ranks_that_compute_at_the_same_time_map_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "SMALL_BYTES", 0)
    meeting = threading.Barrier(3, timeout=60)

    def make() -> Any:
        meeting.wait()  # all have found no file
        return numpy.arange(100)

    with ThreadPoolExecutor(3) as pool:
        values = [future.result() for future in [pool.submit(Shelf(tmp_path).keep, "order", make) for _ in range(3)]]
    assert all(numpy.array_equal(value, numpy.arange(100)) for value in values)
    (path,) = tmp_path.iterdir()
    mapped = Path("/proc/self/maps").read_text().splitlines()
    assert {line.split()[4] for line in mapped if str(path) in line} == {str(path.stat().st_ino)}


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, write, written = [Arrays.of([make_row(k, 3, 4)]) for k in range(9)], arrays._write, list[int]()

    def write_some(file: Any, values: Any) -> None:
        written.append(values.nbytes)
        if len(written) > 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, values)

    monkeypatch.setattr(arrays, "_write", write_some)
    with pytest.raises(OSError, match="No space left"):
        Shelf(tmp_path).keep_rows("rows", lambda: rows)
    assert list(tmp_path.iterdir()) == []


def test_several_processes_make_the_same_rows_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_records(tmp_path / "data.jsonl", make_pairs(50))
    single = tokenised(tmp_path / "data.jsonl", Recipe(Kind.PREFERENCE, 16))
    monkeypatch.setattr(dataset, "PARALLEL_BYTES", 0)
    monkeypatch.setattr(dataset, "CHUNK", 7)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    several = tokenised(tmp_path / "data.jsonl", Recipe(Kind.PREFERENCE, 16))
    assert several[0] == single[0]
    assert several[1] == single[1] != Tally()


def test_one_process_tokenises_where_processes_cannot_share_a_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_records(tmp_path / "data.jsonl", make_pairs(3))
    monkeypatch.setattr(dataset, "PARALLEL_BYTES", 0)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})

    def no_semaphore(*_: object, **__: object) -> None:
        raise FileNotFoundError(2, "No such file or directory: /dev/shm")

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", no_semaphore)
    rows, _ = tokenised(tmp_path / "data.jsonl", Recipe(Kind.PREFERENCE, 16))
    assert len(rows) == 3


def test_an_error_in_a_tokenising_process_reaches_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('never this') }}{% endif %}" + CHATML
    pairs = [{**pair, "prompt": "bad" if k == 30 else pair["prompt"]} for k, pair in enumerate(make_pairs(40))]
    write_records(tmp_path / "data.jsonl", pairs)
    monkeypatch.setattr(dataset, "PARALLEL_BYTES", 0)
    monkeypatch.setattr(dataset, "CHUNK", 7)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    with pytest.raises(UserError, match=r"Line 31: .*never this") as caught:
        tokenised(tmp_path / "data.jsonl", PAIRS, make_tokenizer(template))
    assert (caught.value.code, caught.value.param) == ("chat_template_error", "training_file")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", Events(io.StringIO()))


def test_a_file_is_tokenised_once(tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    write_records(tmp_path / "data.jsonl", make_pairs(9))
    first, tally = load(tmp_path / "data.jsonl", TOKENIZER, Recipe(Kind.PREFERENCE, 16), cache)
    assert tally.prompts > 0

    def never(*_: Any) -> Any:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(dataset, "_tokenise", never)
    cached, cached_tally = load(tmp_path / "data.jsonl", TOKENIZER, Recipe(Kind.PREFERENCE, 16), cache)
    assert list(cached) == list(first)
    assert cached_tally == tally
    assert len(cache.hits) == 1


def test_a_damaged_cache_entry_is_made_again(tmp_path: Path, cache: Cache) -> None:
    write_records(tmp_path / "data.jsonl", make_pairs(9))
    first, _ = load(tmp_path / "data.jsonl", TOKENIZER, PAIRS, cache)
    (entry,) = (path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    content = entry.read_bytes()
    entry.unlink()  # the rows map the file
    entry.write_bytes(content[:-7])
    reloaded, _ = load(tmp_path / "data.jsonl", TOKENIZER, PAIRS, cache)
    assert list(reloaded) == list(first)
    assert cache.hits == []


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": Recipe(Kind.SUPERVISED, 64)},
        {"recipe": Recipe(Kind.PREFERENCE, 32)},
        {"recipe": Recipe(Kind.SUPERVISED, 64, "text")},
        {"tokenizer": make_tokenizer(CHATML)},
        {"records": make_pairs(4)},
    ],
    ids=["what is compared", "length", "what is scored", "template", "content"],
)
def test_other_settings_use_another_cache_entry(tmp_path: Path, cache: Cache, changes: dict[str, Any]) -> None:
    for number, inputs in enumerate(({}, changes)):
        path = tmp_path / f"{number}.jsonl"
        write_records(path, inputs.get("records", make_pairs(3)))
        load(path, inputs.get("tokenizer", TOKENIZER), inputs.get("recipe", PAIRS), cache)
    assert cache.hits == []
    assert len(list((tmp_path / "cache").rglob("*"))) >= 3


def test_a_file_that_cannot_be_read_leaves_nothing_in_the_cache(tmp_path: Path, cache: Cache) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps(make_pairs(1)[0]) + "\n{}\n")
    with pytest.raises(DatasetError, match="Line 2"):
        load(tmp_path / "data.jsonl", TOKENIZER, PAIRS, cache)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


# -- what the methods compare -----------------------------------------------------------------------------------


def responses_of(example: Example, need: Kind) -> list[tuple[list[str], bool]]:
    token_rows = rows([example], TOKENIZER, Recipe(need, 512), Tally())
    return [
        ([TOKENIZER.decode(response.ids).removesuffix("</s>").strip() for response in row.responses], row.desirable)
        for row in token_rows
    ]


RANKED = Example(1, "see", (" a", " b", " c"))
PAIR = Example(1, "see", (" a", " b"))


@pytest.mark.parametrize(
    ("example", "need", "expected"),
    [
        (RANKED, Kind.SUPERVISED, [(["a"], True)]),
        (RANKED, Kind.PREFERENCE, [(["a", "b"], True), (["a", "c"], True), (["b", "c"], True)]),
        (RANKED, Kind.RANKED, [(["a", "b", "c"], True)]),
        (PAIR, Kind.RANKED, [(["a", "b"], True)]),
        (PAIR, Kind.LABELLED, [(["a"], True), (["b"], False)]),
        (Example(1, "see", (" a",), desirable=False), Kind.LABELLED, [(["a"], False)]),
        (Example(1, "see", (" a",), desirable=False), Kind.SUPERVISED, []),
    ],
)
def test_an_example_is_converted_to_the_form_that_a_method_needs(example: Example, need: Kind, expected: Any) -> None:
    assert responses_of(example, need) == expected


CONVERSATION: list[Message] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "what is it?"},
    {"role": "assistant", "content": "which one"},
    {"role": "user", "content": "the other"},
]


def scored_text(row: Row, tokenizer: Any) -> list[str]:
    """The runs of scored tokens."""
    (response,) = row.responses
    runs: list[list[int]] = [[]]
    for token, scored in zip(response.ids, response.scored, strict=True):
        if scored:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def test_loss_on_turns_scores_every_assistant_turn_and_nothing_else() -> None:
    example = Example(1, CONVERSATION, ("the cat",))
    recipe = Recipe(Kind.SUPERVISED, 512, "turns")
    (plain,) = rows([example], TOKENIZER, recipe, Tally())
    assert scored_text(plain, TOKENIZER) == [" which one", " the cat</s>"]
    chat = make_tokenizer(CHATML)
    (row,) = rows([example], chat, recipe, Tally())
    assert scored_text(row, chat) == ["which one</s>\n", "the cat</s>\n"]


def test_loss_on_turns_is_refused_where_the_template_rewrites_earlier_turns() -> None:
    forgetful = (
        "{% for m in messages %}{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    with pytest.raises(UserError, match=r"Line 3: .*'answers'") as caught:
        list(
            rows(
                [Example(3, CONVERSATION, ("the cat",))],
                make_tokenizer(forgetful),
                Recipe(Kind.SUPERVISED, 512, "turns"),
                Tally(),
            )
        )
    assert caught.value.param == "loss_on"


def test_a_long_conversation_loses_its_beginning_and_keeps_its_last_answer() -> None:
    tally = Tally()
    (row,) = rows([Example(1, CONVERSATION, ("the cat",))], TOKENIZER, Recipe(Kind.SUPERVISED, 16, "turns"), tally)
    assert len(row.responses[0].ids) == 16
    assert row.responses[0].ids[0] == TOKENIZER.bos_token_id
    assert scored_text(row, TOKENIZER)[-1] == " the cat</s>"
    assert (tally.prompts, tally.answers, tally.lost) == (1, 0, 0)


def test_a_row_whose_answer_vanishes_is_left_out_and_counted() -> None:
    """The first answer is a single space, which may have no token of its own."""
    tally = Tally()
    example = Example(1, "see", (" ", " the cat"))
    kept = list(rows([example, Example(2, "see", (" a", " b"))], TOKENIZER, PAIRS, tally))
    assert [row.line for row in kept][-1] == 2
    assert len(kept) + tally.lost == 2

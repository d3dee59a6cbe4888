"""Rows that are too long are cut as the report predicts. Rows are held out by their prompts."""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.spec.datasets.check import examples
from app.spec.datasets.example import Example, Kind
from tests.helpers.tiny_model import CHATML, CORPUS, make_tiny_model, make_tokenizer
from tests.helpers.trainer import (
    dpo_method,
    make_pairs,
    make_run,
    make_work_folder,
    of_kind,
    parse,
    sft_method,
    write_records,
)
from worker.trainer.counting import count
from worker.trainer.data import Recipe, Row, Tally, length, rows
from worker.trainer.dataset import Rows
from worker.trainer.loop import stages_of, train
from worker.trainer.plan import held_out_groups
from worker.trainer.tokenizer import load_tokenizer

TOKENIZER, CHAT = make_tokenizer(), make_tokenizer(CHATML)
LONG_PROMPT = Example(1, CORPUS[0] + "?", (" the cat.", " the other dog!"))
LONG_BOTH = Example(1, CORPUS[0] + "?", (" " + CORPUS[1], " " + CORPUS[2]))


def cut(example: Example, max_length: int, truncation: Any, tokenizer: Any = TOKENIZER) -> tuple[list[Row], Tally]:
    tally = Tally()
    recipe = Recipe(Kind.PREFERENCE, max_length, truncation=truncation)
    return list(rows([example], tokenizer, recipe, tally)), tally


def test_truncation_cuts_a_long_prompts_start_or_end_or_drops_the_row() -> None:
    ((whole,), _) = cut(LONG_PROMPT, 1000, "keep_end")
    room = 20 - max(len(response.ids) for response in whole.responses)
    ((end,), tally) = cut(LONG_PROMPT, 20, "keep_end")
    assert end.prompt == (whole.prompt[0], *whole.prompt[-(room - 1) :]) and tally.prompts == 1
    ((start,), tally) = cut(LONG_PROMPT, 20, "keep_start")
    assert start.prompt == whole.prompt[:room] and tally.prompts == 1
    assert end.responses == start.responses == whole.responses, "no answer is cut for a long prompt"
    (no_rows, tally) = cut(LONG_PROMPT, 20, "drop")
    assert no_rows == [] and tally.long == 1


def test_a_long_prompt_and_a_long_answer_get_half_of_the_room_each() -> None:
    """An answer longer than `max_length` does not remove the prompt."""
    for truncation in ("keep_end", "keep_start"):
        ((row,), tally) = cut(LONG_BOTH, 24, truncation)
        assert len(row.prompt) == 12 and all(len(response.ids) == 12 for response in row.responses)
        assert (tally.prompts, tally.answers) == (1, 1)


@pytest.mark.parametrize("truncation", ["keep_end", "keep_start"])
def test_the_header_of_the_answers_turn_is_never_cut(truncation: str) -> None:
    ((row,), _) = cut(LONG_PROMPT, 48, truncation, CHAT)
    assert length(row) <= 48
    assert CHAT.decode(row.prompt).endswith("<|assistant|>\n")


@given(st.integers(16, 60), st.sampled_from(["keep_end", "keep_start"]), st.sampled_from([LONG_PROMPT, LONG_BOTH]))
@settings(deadline=None, max_examples=60)
def test_a_row_that_is_cut_has_exactly_max_length(max_length: int, truncation: str, example: Example) -> None:
    ((whole,), _) = cut(example, 1000, truncation)
    ((row,), _) = cut(example, max_length, truncation)
    assert length(row) == min(length(whole), max_length)


def test_the_report_predicts_what_each_max_length_would_cut(tmp_path: Path) -> None:
    """Lengths are those before the cut, and the counts are those of a training with that `max_length`."""
    records = [
        {
            "prompt": " ".join([CORPUS[0]] * (1 + k % 9)),
            "chosen": " " + " ".join([CORPUS[1]] * (1 + k % 4)),
            "rejected": " no",
        }
        for k in range(60)
    ]
    path = tmp_path / "data.jsonl"
    write_records(path, records)
    report = count(path, TOKENIZER, Recipe(Kind.PREFERENCE, 64), len(records))
    examples = [
        Example(k, record["prompt"], (record["chosen"], record["rejected"])) for k, record in enumerate(records)
    ]
    lengths = sorted(length(row) for example in examples for row in cut(example, 10_000, "drop")[0])
    assert report["lengths"]["whole"]["max"] == lengths[-1] > 64, "lengths are measured before the cut to 64"
    percentiles = report["lengths"]["whole"]["percentiles"]
    for percentile in (50, 90, 95, 99):
        assert sum(row_length <= percentiles[f"p{percentile}"] for row_length in lengths) >= percentile / 100 * len(
            lengths
        )
    assert report["truncated_share"] == sum(row_length > 64 for row_length in lengths) / len(lengths)
    assert report["cut_by"][-1]["longer"] == 0
    for candidate in report["cut_by"]:
        tally = Tally()
        dropped = Tally()
        list(rows(examples, TOKENIZER, Recipe(Kind.PREFERENCE, candidate["max_length"]), tally))
        list(rows(examples, TOKENIZER, Recipe(Kind.PREFERENCE, candidate["max_length"], truncation="drop"), dropped))
        assert candidate["longer"] == dropped.long
        assert (candidate["prompts_cut"], candidate["answers_cut"]) == (tally.prompts, tally.answers)


def test_prompts_that_end_with_a_space_are_reported_with_a_mapping_that_avoids_it(tmp_path: Path) -> None:
    path, warnings = tmp_path / "data.jsonl", {}
    for end in (" ", ""):
        rows = [
            {"prompt": f"{k}. what?\n\nAnswer:{end}", "completion": f"{'' if end else ' '}the cat."} for k in range(12)
        ]
        write_records(path, rows)
        warnings[end] = count(path, TOKENIZER, Recipe(Kind.SUPERVISED, 64), len(rows))["warnings"]
    (warning,) = warnings[" "]
    assert warning.startswith("12 prompts end in a character") and '"completion": " {answer}"' in warning
    assert warnings[""] == []


# -- the split ------------------------------------------------------------------------------------------------


def rows_of_prompts(prompts: list[str]) -> Rows:
    examples = [Example(line, prompt, (" a.", f" b{line}.")) for line, prompt in enumerate(prompts, 1)]
    return Rows.of(rows(examples, TOKENIZER, Recipe(Kind.PREFERENCE, 64), Tally()))


@given(st.lists(st.integers(0, 12), min_size=2, max_size=60), st.sampled_from([0.05, 0.2, 0.5]), st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_no_prompt_is_on_both_sides_of_the_split(numbers: list[int], share: float, seed: int) -> None:
    token_rows = rows_of_prompts([f"question {number}?" for number in numbers])
    chosen = set(held_out_groups(token_rows, share, seed).tolist())
    is_held_out = [group in chosen for group in token_rows.groups.tolist()]
    assert sum(is_held_out) < len(token_rows), "something is left to train on"
    sides: dict[int, set[bool]] = {}
    for number, side in zip(numbers, is_held_out, strict=True):
        sides.setdefault(number, set()).add(side)
    assert all(len(side) == 1 for side in sides.values())
    if max(Counter(numbers).values()) == 1:
        assert sum(is_held_out) == min(round(share * len(token_rows)), len(token_rows) - 1)


def test_prompts_that_differ_in_white_space_or_case_are_one_prompt() -> None:
    token_rows = rows_of_prompts(["What is it?", "what is  it?", " What is it? ", "And this?"])
    first, second, third, other = token_rows.groups.tolist()
    assert first == second == third != other


def test_validation_prompts_are_not_seen_in_training(llama: Path, tmp_path: Path) -> None:
    """Each prompt has eight pairs, which stay on one side of the split."""
    records = [{**pair, "prompt": f"{k % 6}. what?"} for k, pair in enumerate(make_pairs(48))]
    spec = {
        "adapter": {"r": 4}, "quantization": "none", "seed": 1, "validation_split": 0.3,
        "method": dpo_method(max_steps=1),
    }  # fmt: skip
    run = make_run(make_work_folder(tmp_path, llama, spec, train=records))
    train(run)
    (stage,) = stages_of(run)
    assert len(stage.validation) == 8 and len(stage.train) == 40 and stage.repeated == 0


def test_rows_of_a_validation_file_with_a_training_prompt_are_counted(llama: Path, tmp_path: Path) -> None:
    pairs, stream = make_pairs(10), io.StringIO()
    held = [*make_pairs(4, seed=9), {**pairs[0], "prompt": pairs[0]["prompt"].upper()}, pairs[1]]
    spec = {
        "adapter": {"r": 4}, "quantization": "none", "seed": 1, "validation_file": "held.jsonl",
        "method": dpo_method(max_steps=1),
    }  # fmt: skip
    folder = make_work_folder(tmp_path, llama, spec, train=pairs, held=held)
    train(make_run(folder, stream))
    reports = [event["data"] for event in of_kind(parse(stream), "message") if (event.get("data") or {}).get("code")]
    overlap = next(data for data in reports if data["code"] == "validation_prompts_in_training")
    assert (overlap["rows"], overlap["validation_rows"]) == (2, 6)
    assert "2 of the validation rows ask the same as a training row" in (folder / "output/README.md").read_text()


DATED = "{{ strftime_now('%Y-%m-%d') }}\n" + CHATML


def test_the_jobs_date_changes_the_tokens_only_if_the_template_reads_it(tmp_path: Path) -> None:
    """Another date gives other tokens only if the template reads the date."""
    prompts_and_digests: dict[tuple[str, str], Any] = {}
    for name, template in (("dated", DATED), ("plain", CHATML)):
        base = make_tiny_model(tmp_path / name, chat_template=template)
        for day in ("2026-01-01", "2026-12-31"):
            spec = {
                "adapter": {"r": 4}, "quantization": "none", "seed": 1, "date": day,
                "method": sft_method(max_steps=1),
            }  # fmt: skip
            run = make_run(make_work_folder(tmp_path / f"{name}-{day}", base, spec, train=make_pairs(6)))
            train(run)
            (stage,) = stages_of(run)
            rendered = load_tokenizer(base).decode(stage.train[0].prompt)
            prompts_and_digests[name, day] = rendered, stage.train.digest()
            assert json.loads((run.folder / "output/spec.json").read_text())["date"] == day
    assert prompts_and_digests["plain", "2026-01-01"] == prompts_and_digests["plain", "2026-12-31"]
    assert prompts_and_digests["dated", "2026-01-01"] != prompts_and_digests["dated", "2026-12-31"]
    assert "2026-12-31" in prompts_and_digests["dated", "2026-12-31"][0]


@pytest.mark.parametrize("answers", [2, 5, 6, 64])
def test_the_report_counts_the_pairs_of_a_ranked_list_by_a_few_of_its_answers(tmp_path: Path, answers: int) -> None:
    """The numbers are those of all K (K − 1) / 2 pairs. All answers have the same length here."""
    words = [f"{'yes' if number % 2 else 'no'} {'the ' * (number // 2)}".split() for number in range(answers)]
    texts = [" ".join([*word, *(["a"] * (40 - len(word)))]) for word in words]
    records = [{"prompt": f"what is {number}", "responses": texts} for number in range(3)]
    path = tmp_path / "ranked.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    report = count(path, TOKENIZER, Recipe(Kind.PREFERENCE, 512), len(records))
    tally = Tally()
    with path.open("rb") as file:
        trained = list(rows(examples(file), TOKENIZER, Recipe(Kind.PREFERENCE, 512), tally))
    assert report["rows"] == len(trained) == 3 * answers * (answers - 1) // 2
    assert report["sampled_rows"] == 3 * min(answers, 5) * (min(answers, 5) - 1) // 2
    assert report["tokens_per_row"] == pytest.approx(sum(row.tokens for row in trained) / len(trained), rel=0.01)
    assert report["examples"] == 3 and tally.lost == 0

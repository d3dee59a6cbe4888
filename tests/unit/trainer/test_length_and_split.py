"""Rows that are too long are cut as the report says beforehand; and rows are held out by their prompts."""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


def test_a_long_prompt_loses_its_start_its_end_or_its_row() -> None:
    ((whole,), _) = cut(LONG_PROMPT, 1000, "keep_end")
    room = 20 - max(len(response.ids) for response in whole.responses)
    ((end,), told) = cut(LONG_PROMPT, 20, "keep_end")
    assert end.prompt == (whole.prompt[0], *whole.prompt[-(room - 1) :]) and told.prompts == 1
    ((start,), told) = cut(LONG_PROMPT, 20, "keep_start")
    assert start.prompt == whole.prompt[:room] and told.prompts == 1
    assert end.responses == start.responses == whole.responses, "no answer is cut for it"
    (none, told) = cut(LONG_PROMPT, 20, "drop")
    assert none == [] and told.long == 1


def test_where_both_are_too_long_each_has_half_of_the_room() -> None:
    """One answer longer than `max_length` does not remove the prompt, for neither side."""
    for truncation in ("keep_end", "keep_start"):
        ((row,), told) = cut(LONG_BOTH, 24, truncation)
        assert len(row.prompt) == 12 and all(len(response.ids) == 12 for response in row.responses)
        assert (told.prompts, told.answers) == (1, 1)


@pytest.mark.parametrize("truncation", ["keep_end", "keep_start"])
def test_what_begins_an_answer_stays_whatever_is_cut(truncation: str) -> None:
    ((row,), _) = cut(LONG_PROMPT, 48, truncation, CHAT)
    assert length(row) <= 48
    assert CHAT.decode(row.prompt).endswith("<|assistant|>\n")


@given(st.integers(16, 60), st.sampled_from(["keep_end", "keep_start"]), st.sampled_from([LONG_PROMPT, LONG_BOTH]))
@settings(deadline=None, max_examples=60)
def test_no_row_is_longer_and_no_room_is_wasted(most: int, truncation: str, example: Example) -> None:
    ((whole,), _) = cut(example, 1000, truncation)
    ((row,), _) = cut(example, most, truncation)
    assert length(row) == min(length(whole), most)


def test_the_report_says_beforehand_what_each_choice_would_cut(tmp_path: Path) -> None:
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
    found = count(path, TOKENIZER, Recipe(Kind.PREFERENCE, 64), len(records))
    examples = [Example(k, r["prompt"], (r["chosen"], r["rejected"])) for k, r in enumerate(records)]
    lengths = sorted(length(row) for example in examples for row in cut(example, 10_000, "drop")[0])
    assert found["lengths"]["whole"]["max"] == lengths[-1] > 64, "not those that 64 leaves"
    percentiles = found["lengths"]["whole"]["percentiles"]
    for p in (50, 90, 95, 99):
        assert sum(one <= percentiles[f"p{p}"] for one in lengths) >= p / 100 * len(lengths)
    assert found["truncated_share"] == sum(one > 64 for one in lengths) / len(lengths)
    assert found["cut_by"][-1]["longer"] == 0
    for candidate in found["cut_by"]:
        told = Tally()
        dropped = Tally()
        list(rows(examples, TOKENIZER, Recipe(Kind.PREFERENCE, candidate["max_length"]), told))
        list(rows(examples, TOKENIZER, Recipe(Kind.PREFERENCE, candidate["max_length"], truncation="drop"), dropped))
        assert candidate["longer"] == dropped.long
        assert (candidate["prompts_cut"], candidate["answers_cut"]) == (told.prompts, told.answers)


def test_prompts_that_end_with_a_space_are_told_with_the_mapping_that_avoids_it(tmp_path: Path) -> None:
    path, found = tmp_path / "data.jsonl", {}
    for end in (" ", ""):
        rows = [
            {"prompt": f"{k}. what?\n\nAnswer:{end}", "completion": f"{'' if end else ' '}the cat."} for k in range(12)
        ]
        write_records(path, rows)
        found[end] = count(path, TOKENIZER, Recipe(Kind.SUPERVISED, 64), len(rows))["warnings"]
    (told,) = found[" "]
    assert told.startswith("12 prompts end in a character") and '"completion": " {answer}"' in told
    assert found[""] == []


# -- the split ------------------------------------------------------------------------------------------------


def asked(prompts: list[str]) -> Rows:
    examples = [Example(line, prompt, (" a.", f" b{line}.")) for line, prompt in enumerate(prompts, 1)]
    return Rows.of(rows(examples, TOKENIZER, Recipe(Kind.PREFERENCE, 64), Tally()))


@given(st.lists(st.integers(0, 12), min_size=2, max_size=60), st.sampled_from([0.05, 0.2, 0.5]), st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_no_prompt_is_on_both_sides_of_the_split(numbers: list[int], share: float, seed: int) -> None:
    made = asked([f"question {number}?" for number in numbers])
    chosen = set(held_out_groups(made, share, seed).tolist())
    held = [group in chosen for group in made.groups.tolist()]
    assert sum(held) < len(made), "something is left to train on"
    sides: dict[int, set[bool]] = {}
    for number, side in zip(numbers, held, strict=True):
        sides.setdefault(number, set()).add(side)
    assert all(len(side) == 1 for side in sides.values())
    if max(Counter(numbers).values()) == 1:
        assert sum(held) == min(round(share * len(made)), len(made) - 1)


def test_white_space_and_case_make_no_other_prompt() -> None:
    made = asked(["What is it?", "what is  it?", " What is it? ", "And this?"])
    first, second, third, other = made.groups.tolist()
    assert first == second == third != other


def test_memorised_prompts_are_not_measured(llama: Path, tmp_path: Path) -> None:
    """Many pairs of each prompt, random preferences: nothing on the validation side was seen in training."""
    records = [{**pair, "prompt": f"{k % 6}. what?"} for k, pair in enumerate(make_pairs(48))]
    spec = {
        "adapter": {"r": 4}, "quantization": "none", "seed": 1, "validation_split": 0.3,
        "method": dpo_method(max_steps=1),
    }  # fmt: skip
    run = make_run(make_work_folder(tmp_path, llama, spec, train=records))
    train(run)
    (stage,) = stages_of(run)
    assert len(stage.validation) == 8 and len(stage.train) == 40 and stage.repeated == 0


def test_validation_rows_that_ask_what_training_rows_ask_are_counted(llama: Path, tmp_path: Path) -> None:
    pairs, stream = make_pairs(10), io.StringIO()
    held = [*make_pairs(4, seed=9), {**pairs[0], "prompt": pairs[0]["prompt"].upper()}, pairs[1]]
    spec = {
        "adapter": {"r": 4}, "quantization": "none", "seed": 1, "validation_file": "held.jsonl",
        "method": dpo_method(max_steps=1),
    }  # fmt: skip
    folder = make_work_folder(tmp_path, llama, spec, train=pairs, held=held)
    train(make_run(folder, stream))
    told = [e["data"] for e in of_kind(parse(stream), "message") if (e.get("data") or {}).get("code")]
    overlap = next(data for data in told if data["code"] == "validation_prompts_in_training")
    assert (overlap["rows"], overlap["validation_rows"]) == (2, 6)
    assert "2 of the validation rows ask the same as a training row" in (folder / "output/README.md").read_text()


DATED = "{{ strftime_now('%Y-%m-%d') }}\n" + CHATML


def test_the_day_is_the_jobs_and_part_of_the_key_only_where_it_is_read(tmp_path: Path) -> None:
    """A second attempt on another day has the tokens of the first; a template without a date shares its cache."""
    made: dict[tuple[str, str], Any] = {}
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
            made[name, day] = rendered, stage.train.digest()
            assert json.loads((run.folder / "output/spec.json").read_text())["date"] == day
    assert made["plain", "2026-01-01"] == made["plain", "2026-12-31"]
    assert made["dated", "2026-01-01"] != made["dated", "2026-12-31"]
    assert "2026-12-31" in made["dated", "2026-12-31"][0]

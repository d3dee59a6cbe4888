"""Evaluations by the engine alone: they measure known truths, and an interrupted run continues where it stopped."""

import io
import json
import math
import re
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from app.spec.datasets.rendering import Rendering
from app.spec.evaluation import EvaluationSpec
from tests.helpers.hardware import choose
from tests.helpers.ranks import ThreadRanks, on_ranks, one_at_a_time
from tests.helpers.tiny_model import CHATML, make_tiny_model
from tests.helpers.trainer import (
    WORDS,
    disturb,
    dpo_method,
    load,
    make_pairs,
    make_work_folder,
    parse,
    run_in_process,
    run_process,
    write_records,
)
from worker.evaluation_figures import flatten, report
from worker.trainer import reward
from worker.trainer.errors import Stopped, UserError
from worker.trainer.evaluation import evaluate as run_evaluation
from worker.trainer.evaluation.run import EvaluationRun
from worker.trainer.events import Events
from worker.trainer.sampling import sample
from worker.trainer.sides import asking, completions
from worker.trainer.sides.completions import prompts_of
from worker.trainer.sides.rows import examples_of

PAIRS = make_pairs(24)
CLASSIFIER = {"terms": {"the": [1.0, 0.5], "and": [1.0, -0.3], "was": [1.0, 1.0]}, "intercept": 0.1, "normalise": False}
SAMPLING = {"temperatures": [1.0], "max_tokens": 12, "samples": 3}
Items = list[dict[str, Any]]


@pytest.fixture
def adapter(llama: Path, tmp_path: Path) -> Path:
    """An adapter that moves the model a little."""
    disturb(load(llama), scale=0.05).save(tmp_path / "adapter")
    return tmp_path / "adapter"


def lay_out(
    folder: Path, model: Path, spec: dict[str, Any], *, candidate: Path | None = None, judge: Path | None = None
) -> Path:
    """A work folder as a runner makes it. `candidate` is the folder of an adapter."""
    folder.mkdir(parents=True)
    sides = {}
    for name, start in (("candidate", candidate), ("baseline", None)):
        (folder / "sides" / name).mkdir(parents=True)
        (folder / "sides" / name / "base").symlink_to(model, target_is_directory=True)
        if start is not None:
            (folder / "sides" / name / "start").symlink_to(start, target_is_directory=True)
        sides[name] = {"model": name, "base_model": "tiny", "version": "v1", "quantization": "none"}
    if judge is not None:
        (folder / "sides" / "judge").mkdir()
        (folder / "sides" / "judge" / "base").symlink_to(judge, target_is_directory=True)
    write_records(folder / "data.jsonl", PAIRS)
    (folder / "classifier.json").write_text(json.dumps(CLASSIFIER))
    (folder / "evaluation.json").write_text(json.dumps({"data": "data.jsonl", "seed": 3, **spec}))
    (folder / "run.json").write_text(json.dumps({"sides": sides, "beta": 0.5, "attempt": 1}))
    return folder


def with_judge(folder: Path, model: Path) -> Path:
    """Add to a work folder a judge that is a language model."""
    (folder / "sides" / "judge").mkdir()
    (folder / "sides" / "judge" / "base").symlink_to(model, target_is_directory=True)
    run = json.loads((folder / "run.json").read_text())
    run["sides"]["judge"] = {"model": "judge", "base_model": "tiny", "version": "v1", "quantization": "none"}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def evaluate(folder: Path) -> Items:
    run_evaluation(EvaluationRun.of(folder, Events(io.StringIO()), threading.Event()))
    return read_items(folder)


def read_items(folder: Path) -> Items:
    return [json.loads(line) for line in (folder / "output" / "items.jsonl").read_text().splitlines()]


def figures(folder: Path) -> dict[str, float]:
    spec = EvaluationSpec.model_validate_json((folder / "evaluation.json").read_text())
    numbers = flatten(report(spec, read_items(folder)))
    assert set(numbers) <= set(spec.figures()), "every figure is in the registry of metrics"
    return numbers


PREFERENCE = {"type": "preference", "candidate": {"model": "c"}, "baseline": {"model": "b"}}
REWARD_KL = PREFERENCE | {
    "type": "reward_kl",
    "sampling": SAMPLING,
    "judge": {"type": "classifier", "classifier": {"file": "classifier.json"}},
}


def test_margins_equal_the_papers_formula(llama: Path, adapter: Path, tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "run", llama, PREFERENCE, candidate=adapter)
    items = evaluate(folder)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    base = AutoModelForCausalLM.from_pretrained(llama)
    policy = load(llama)
    policy.model.load_adapter(adapter, "moved")
    policy.model.set_adapter("moved")

    def logp(model: Any, prompt: str, answer: str) -> float:
        bos = tokenizer("a").input_ids[:1] if tokenizer("a").input_ids[0] == tokenizer.bos_token_id else []
        before = bos + tokenizer(prompt, add_special_tokens=False).input_ids
        ids = bos + tokenizer(prompt + answer + tokenizer.eos_token, add_special_tokens=False).input_ids
        with torch.no_grad():
            logps = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        return float(sum(logps[position - 1, ids[position]] for position in range(len(before), len(ids))))

    with policy.own_attention_in_use():
        for item, pair in zip(items, PAIRS, strict=True):
            logps = [
                logp(scorer, pair["prompt"], pair[side])
                for scorer in (policy.causal, base)
                for side in ("chosen", "rejected")
            ]
            assert item["margin"] == pytest.approx(0.5 * ((logps[0] - logps[2]) - (logps[1] - logps[3])), abs=2e-3)
    assert figures(folder)["accuracy"] == sum(item["margin"] > 0 for item in items) / len(items)


def test_a_model_against_itself_prefers_nothing(llama: Path, tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "run", llama, PREFERENCE)
    assert all(item["margin"] == 0 for item in evaluate(folder))
    numbers = figures(folder)
    assert numbers["accuracy"] == 0.5 and numbers["calibration/error"] == 0 and numbers["pairs"] == len(PAIRS)


def test_max_rows_draws_the_same_rows_for_the_same_seed(llama: Path, tmp_path: Path) -> None:
    drawn_lines = [
        [
            item["line"]
            for item in evaluate(lay_out(tmp_path / f"run-{k}", llama, PREFERENCE | {"max_rows": 7, "seed": k // 2}))
        ]
        for k in range(4)
    ]
    assert len(drawn_lines[0]) == 7 and drawn_lines[0] == drawn_lines[1] == sorted(drawn_lines[0])
    assert drawn_lines[2] == drawn_lines[3] != drawn_lines[0]


def test_the_kl_of_a_model_to_itself_is_zero(llama: Path, tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "run", llama, REWARD_KL)
    items = evaluate(folder)
    assert len(items) == 3 * len(PAIRS)
    assert all(item["logp"] == pytest.approx(item["reference_logp"], rel=1e-5) for item in items)
    assert abs(figures(folder)["kl"]) < 1e-3


def test_the_kl_equals_that_of_the_next_token_distributions(llama: Path, adapter: Path, tmp_path: Path) -> None:
    """An answer is one token, so the true KL is a sum over the vocabulary."""
    sampling = {"temperatures": [1.0, 0.5], "max_tokens": 1, "samples": 200}
    folder = lay_out(tmp_path / "run", llama, REWARD_KL | {"sampling": sampling}, candidate=adapter)
    evaluate(folder)
    policy = load(llama)
    policy.model.load_adapter(adapter, "moved")
    truth = {1.0: [], 0.5: []}  # type: dict[float, list[float]]
    for pair in PAIRS:
        tokenizer = policy.tokenizer
        ids = torch.tensor(
            [tokenizer("a").input_ids[:-1] + tokenizer(pair["prompt"], add_special_tokens=False).input_ids]
        )
        with policy.own_attention_in_use(), torch.no_grad():
            policy.model.set_adapter("default")
            base = policy.causal(input_ids=ids).logits[0, -1].double().log_softmax(-1)
            policy.model.set_adapter("moved")
            moved = policy.causal(input_ids=ids).logits[0, -1].double()
        for temperature, divergences in truth.items():
            tempered = (moved / temperature).log_softmax(-1)
            divergences.append(float((tempered.exp() * (tempered - base)).sum()))
    measured = figures(folder)
    for temperature, values in truth.items():
        expected, name = sum(values) / len(values), f"kl@{temperature:g}"
        assert expected > 0.05
        # The prompts are the same in both. Only the noise of sampling is left, which is less than the error.
        assert abs(measured[name] - expected) < 2 * measured[f"kl/error@{temperature:g}"]


def test_a_classifier_gives_the_reward(llama: Path, tmp_path: Path) -> None:
    items = evaluate(lay_out(tmp_path / "run", llama, REWARD_KL))
    for item in items:
        words = re.findall(r"\b\w\w+\b", (PAIRS[item["line"] - 1]["prompt"] + item["text"]).lower())
        expected = 0.1 + 0.5 * words.count("the") - 0.3 * words.count("and") + words.count("was")
        assert item["reward"] == pytest.approx(expected)


def test_a_reward_model_gives_the_reward(llama: Path, tmp_path: Path) -> None:
    training = {
        "adapter": {"r": 4}, "quantization": "none", "seed": 0, "validation_split": 0.0,
        "method": dpo_method(max_steps=2, batch_size=4, loss="reward_model"),
    }  # fmt: skip
    training_folder = make_work_folder(tmp_path / "training", llama, training, train=PAIRS)
    run_in_process(training_folder)
    spec = REWARD_KL | {"judge": {"type": "reward_model", "model": "r"}}
    items = evaluate(lay_out(tmp_path / "run", llama, spec, judge=training_folder / "output"))
    model = AutoModelForSequenceClassification.from_pretrained(training_folder / "output")
    tokenizer = AutoTokenizer.from_pretrained(training_folder / "output")
    for item in items[:10]:
        text = PAIRS[item["line"] - 1]["prompt"] + item["text"] + tokenizer.eos_token
        bos = tokenizer("a").input_ids[:1] if tokenizer("a").input_ids[0] == tokenizer.bos_token_id else []
        ids = bos + tokenizer(text, add_special_tokens=False).input_ids
        with torch.no_grad():
            score = float(model(input_ids=torch.tensor([ids])).logits[0, 0]) - model.config.reward_mean
        assert item["reward"] == pytest.approx(score, abs=1e-4)


def test_each_side_of_a_win_rate_answers_every_prompt(llama: Path, adapter: Path, tmp_path: Path) -> None:
    spec = {
        "type": "win_rate", "candidate": {"model": "c"}, "baseline": {"answers": "chosen"},
        "sampling": SAMPLING | {"temperatures": [0.0, 1.0]},
        "judge": {"type": "classifier", "classifier": {"file": "classifier.json"}},
    }  # fmt: skip
    items = evaluate(lay_out(tmp_path / "run", llama, spec, candidate=adapter))
    assert len(items) == len(PAIRS) * (1 + 3), "at temperature 0 there is one completion"
    assert all(item["baseline"] == PAIRS[item["line"] - 1]["chosen"] for item in items)
    fixed = {
        "type": "win_rate",
        "candidate": {"answers": "rejected"},
        "baseline": {"answers": "chosen"},
        "judge": spec["judge"],
    }
    assert figures(tmp_path / "run")["win_rate@0"] == sum(
        (item["candidate_reward"] > item["baseline_reward"]) + (item["candidate_reward"] == item["baseline_reward"]) / 2
        for item in items[: len(PAIRS)]
    ) / len(PAIRS)
    items = evaluate(lay_out(tmp_path / "fixed", llama, fixed))
    assert [(item["candidate"], item["baseline"]) for item in items] == [
        (pair["rejected"], pair["chosen"]) for pair in PAIRS
    ]


def test_a_model_against_itself_wins_half(llama: Path, tmp_path: Path) -> None:
    spec = {
        "type": "win_rate", "candidate": {"model": "c"}, "baseline": {"model": "b"}, "sampling": SAMPLING,
        "judge": {"type": "classifier", "classifier": {"file": "classifier.json"}},
    }  # fmt: skip
    judged = evaluate(lay_out(tmp_path / "run", llama, spec))
    numbers = figures(tmp_path / "run")
    assert numbers["win_rate/low"] < 0.5 < numbers["win_rate/high"]
    different = sum(item["candidate"] != item["baseline"] for item in judged)
    assert different > len(judged) / 2, "the two sides sample independently"


def test_a_model_judges_as_its_own_generate_answers(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers as the model's own greedy `generate`, in both orders. A question that does not fit is not asked."""
    monkeypatch.setattr(asking, "REPLY_TOKENS", 6)
    spec = {
        "type": "win_rate", "candidate": {"answers": "rejected"}, "baseline": {"answers": "chosen"}, "max_rows": 6,
        "judge": {"type": "model", "model": "judge", "template": "{prompt} {a} or {b}"},
    }  # fmt: skip
    spec["max_length"] = 8  # limits what is judged, not the judge's question
    items = evaluate(with_judge(lay_out(tmp_path / "run", llama, spec), llama))
    tokenizer, model = AutoTokenizer.from_pretrained(llama), AutoModelForCausalLM.from_pretrained(llama)
    for item in items:
        for judgement, pair in zip(
            item["judgements"], (("candidate", "baseline"), ("baseline", "candidate")), strict=True
        ):
            a, b = (item[side].strip() for side in pair)
            text = f"\n\nHuman: {item['prompt'].strip()} {a} or {b}\n\nAssistant:"
            bos = tokenizer("a").input_ids[:-1]
            ids = torch.tensor([bos + tokenizer(text, add_special_tokens=False).input_ids])
            settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
            generated = model.generate(ids, **settings)[0, ids.shape[1] :]
            assert judgement == tokenizer.decode(generated, skip_special_tokens=True)
    assert figures(tmp_path / "run")["unparseable"] == 6, "a model of 40 words gives no verdict"
    monkeypatch.setattr(asking, "REPLY_TOKENS", model.config.max_position_embeddings - 2)
    unasked = evaluate(with_judge(lay_out(tmp_path / "small", llama, spec), llama))
    assert all(item["judgements"] == [None, None] for item in unasked), "a question is never truncated"


def test_preferences_between_the_same_two_answers_are_votes(llama: Path, tmp_path: Path) -> None:
    """The file has the better answer first. The agreement must not depend on that order."""
    spec = {"type": "agreement", "judge": {"type": "classifier", "classifier": {"file": "classifier.json"}}}
    folder = lay_out(tmp_path / "run", llama, spec)
    sides = (("the", "a"), ("a", "the"), ("the", "of"))
    pair, reversed_pair, another_pair = ({"prompt": "p ", "chosen": a, "rejected": b} for a, b in sides)
    write_records(folder / "data.jsonl", [pair, pair, reversed_pair, another_pair, {**pair, "prompt": "q "}])
    items = evaluate(folder)
    assert [(item["first"], item["second"], item["votes"]) for item in items] == [
        ("a", "the", [1, 2]), ("of", "the", [0, 1]), ("a", "the", [0, 1])
    ]  # fmt: skip
    numbers = figures(folder)
    assert numbers["votes"] == 5 and numbers["comparisons"] == 3
    assert numbers["people_people/cases"] == 3 and numbers["people_people/agreement"] == pytest.approx(1 / 3)
    assert numbers["judge_people/cases"] == 5 and numbers["judge_people/agreement"] == pytest.approx(4 / 5)
    assert numbers["judge_people/kappa"] == pytest.approx(0.0), (
        "the judge always prefers the second, so chance explains its agreement"
    )


def test_answers_from_a_file_must_be_to_the_same_prompts(llama: Path, tmp_path: Path) -> None:
    ready = [{"prompt": pair["prompt"], "completion": f"answer {number}"} for number, pair in enumerate(PAIRS)]
    spec = {
        "type": "win_rate", "candidate": {"file": "ready.jsonl"}, "baseline": {"answers": "chosen"},
        "judge": {"type": "classifier", "classifier": {"file": "classifier.json"}},
    }  # fmt: skip
    folder = lay_out(tmp_path / "run", llama, spec)
    write_records(folder / "ready.jsonl", ready[:20])
    assert [item["candidate"] for item in evaluate(folder)] == [f"answer {number}" for number in range(20)]
    ready[3]["prompt"] += "?"
    write_records(folder / "ready.jsonl", ready)
    with pytest.raises(UserError, match=r"Line 4: the answer is to another prompt") as raised:
        evaluate(folder)
    assert raised.value.param == "candidate.file"


def test_an_empty_answer_does_not_shift_the_others(llama: Path, tmp_path: Path) -> None:
    """Lines still correspond, whatever is left out on either side."""
    ready = [{"prompt": pair["prompt"], "completion": f"answer {number}"} for number, pair in enumerate(PAIRS)]
    ready[2]["completion"] = ""
    spec = {
        "type": "win_rate", "candidate": {"file": "ready.jsonl"}, "baseline": {"answers": "chosen"},
        "judge": {"type": "classifier", "classifier": {"file": "classifier.json"}},
    }  # fmt: skip
    folder = lay_out(tmp_path / "run", llama, spec)
    write_records(folder / "ready.jsonl", ready)
    write_records(
        folder / "data.jsonl", [pair | ({"rejected": pair["chosen"]} if k == 5 else {}) for k, pair in enumerate(PAIRS)]
    )
    assert [item["candidate"] for item in evaluate(folder)] == [f"answer {k}" for k in range(24) if k not in (2, 5)]


@pytest.mark.parametrize("stops", [[1], [20, 50], [13, 14, 70]])
def test_an_interrupted_run_does_not_sample_its_completions_again(
    stops: list[int], llama: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is stopped at these total numbers of completions. In the end its items are those of a whole run."""
    choose(monkeypatch, sampled_tokens=200)
    monkeypatch.setattr(completions, "PART_SECONDS", 0.0)
    expected = evaluate(lay_out(tmp_path / "whole", llama, REWARD_KL, candidate=adapter))
    folder, stream, stopping = lay_out(tmp_path / "run", llama, REWARD_KL, candidate=adapter), io.StringIO(), None
    sampled = 0

    def counting_sample(*arguments: Any) -> Any:
        nonlocal sampled
        for completion in sample(*arguments):
            sampled += 1
            if stopping is not None and sampled >= stops[0]:
                stopping.set()
            yield completion

    monkeypatch.setattr("worker.trainer.sampling.sample", counting_sample)
    while stops:
        stopping = threading.Event()
        with pytest.raises(Stopped):
            run_evaluation(EvaluationRun.of(folder, Events(stream), stopping))
        stops.pop(0)
    stopping = None
    assert evaluate(folder) == expected
    batch = 200 // (12 + min(len(pair["prompt"].split()) for pair in PAIRS))
    assert sampled < len(expected) + 3 * batch, "only the batches that were interrupted are sampled again"
    parts = [event for event in parse(stream) if event["kind"] == "part"]
    assert all((folder / part["path"]).exists() for part in parts)


def evaluate_on(folder: Path, size: int, stream: io.StringIO, stopping: Sequence[threading.Event] = ()) -> None:
    """Evaluate on so many ranks. `stopping` asks each of them to stop."""

    def run(ranks: ThreadRanks) -> None:
        events = Events(stream if ranks.is_first else io.StringIO())
        own = stopping[ranks.rank] if stopping else threading.Event()
        run_evaluation(EvaluationRun.of(folder, events, own, ranks=ranks))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EvaluationRun, "load", one_at_a_time(EvaluationRun.load))
        classifier = AutoModelForSequenceClassification.from_pretrained
        patch.setattr(AutoModelForSequenceClassification, "from_pretrained", one_at_a_time(classifier))
        on_ranks(size, run)


WIN_RATE = {
    "type": "win_rate", "candidate": {"model": "c"}, "baseline": {"model": "b"},
    "sampling": SAMPLING | {"temperatures": [0.0, 1.0]},
}  # fmt: skip


@pytest.mark.parametrize("name", ["preference", "reward_kl", "classifier", "model", "reward model"])
def test_several_ranks_make_the_items_of_one(
    name: str, llama: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, sampled_tokens=200)
    monkeypatch.setattr(reward, "SCORED_TOGETHER", 5)
    spec: dict[str, Any] = {
        "preference": PREFERENCE,
        "reward_kl": REWARD_KL,
        "classifier": WIN_RATE | {"judge": SCORER},
        "model": WIN_RATE | {"judge": {"type": "model", "model": "judge"}},
        "reward model": WIN_RATE | {"judge": {"type": "reward_model", "model": "judge"}},
    }[name]
    judge = None
    if name == "reward model":
        AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1).save_pretrained(tmp_path / "judge")
        AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "judge")
        config = json.loads((tmp_path / "judge" / "config.json").read_text()) | {"reward_mean": 0.5, "pad_token_id": 0}
        (tmp_path / "judge" / "config.json").write_text(json.dumps(config))
        judge = tmp_path / "judge"
    items = []
    for size in (1, 2, 3):
        folder = lay_out(tmp_path / str(size), llama, spec, candidate=adapter, judge=judge)
        if name == "model":
            with_judge(folder, llama)
        evaluate_on(folder, size, io.StringIO())
        items.append((folder / "output" / "items.jsonl").read_text())
    assert len(items[0].splitlines()) >= len(PAIRS) and items[1:] == items[:1] * 2


def test_processes_make_the_items_of_one(llama: Path, adapter: Path, tmp_path: Path) -> None:
    items = []
    for size in (1, 2):
        folder = lay_out(tmp_path / str(size), llama, REWARD_KL, candidate=adapter)
        about = json.loads((folder / "run.json").read_text()) | {"device": "cpu", "ranks": size, "threads": 1}
        (folder / "run.json").write_text(json.dumps(about))
        status, _ = run_process(folder)
        assert status == 0, (folder / "trainer.log").read_text()
        items.append((folder / "output" / "items.jsonl").read_text())
    assert items[0] == items[1]


def test_ranks_that_are_stopped_keep_what_they_have_sampled(
    llama: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank is asked to stop in its second batch. The other one has completed its own, which is kept."""
    choose(monkeypatch, sampled_tokens=200)
    expected = evaluate(lay_out(tmp_path / "whole", llama, REWARD_KL, candidate=adapter))
    folder, stream = lay_out(tmp_path / "run", llama, REWARD_KL, candidate=adapter), io.StringIO()
    stopping, begun = [threading.Event(), threading.Event()], list[int]()

    def stopping_sample(policy: Any, batch: Any, sampling: Any, ends: Any, check_stop: Any) -> Any:
        begun.append(len(batch))
        if len(begun) == 4:
            stopping[1].set()
        yield from sample(policy, batch, sampling, ends, check_stop)

    monkeypatch.setattr("worker.trainer.sampling.sample", stopping_sample)
    with pytest.raises(Stopped):
        evaluate_on(folder, 2, stream, stopping)
    kept = sum(event["completions"] for event in parse(stream) if event["kind"] == "part")
    assert sum(begun[:2]) <= kept < len(expected)
    stopping = [threading.Event(), threading.Event()]
    evaluate_on(folder, 2, stream, stopping)
    assert read_items(folder) == expected


SCORER = {"type": "classifier", "classifier": {"file": "classifier.json"}}
LETTERS: dict[str, Any] = {
    "terms": {letter: [1.0, (k % 7 - 3) / 3] for k, letter in enumerate("abcdefghijklmnopqrstuvwxyz")} | {
        word: [1.0, (k % 5 - 2) / 2] for k, word in enumerate(WORDS)
    },
    "intercept": 0.0, "normalise": False,
}  # fmt: skip
"""A classifier that gives the texts of a random model different rewards."""


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "CLASSIFIER", LETTERS)


@pytest.mark.usefixtures("letters")
def test_best_of_n_takes_the_answer_that_its_scorer_likes_best(llama: Path, tmp_path: Path) -> None:
    """It chooses among the completions of a plain run, four at a time. Its KL is the bound log N − (N − 1)/N."""
    plain_folder = lay_out(tmp_path / "every", llama, REWARD_KL | {"sampling": SAMPLING | {"samples": 8}})
    plain_items = evaluate(plain_folder)
    spec = REWARD_KL | {"sampling": SAMPLING | {"samples": 2}, "baseline": None}
    folder = lay_out(tmp_path / "best", llama, spec | {"candidate": {"model": "c", "best_of": {"n": 4, "by": SCORER}}})
    items = evaluate(folder)
    assert len(items) == len(plain_items) / 4
    for item in items:
        group = [
            completion
            for completion in plain_items
            if completion["row"] == item["row"] and completion["sample"] // 4 == item["sample"]
        ]
        assert item["reward"] == max(completion["reward"] for completion in group)
        assert item["text"] in [completion["text"] for completion in group if completion["reward"] == item["reward"]]
    numbers, plain_numbers = figures(folder), figures(plain_folder)
    assert numbers["kl"] == pytest.approx(math.log(4) - 3 / 4)
    assert numbers["kl/error"] == pytest.approx(0, abs=1e-12)
    assert numbers["best_of/candidate/kl_bound"] == pytest.approx(numbers["kl"])
    assert numbers["reward"] > plain_numbers["reward"]


@pytest.mark.usefixtures("letters")
def test_best_of_n_can_be_a_side_of_a_win_rate(llama: Path, tmp_path: Path) -> None:
    """The judge agrees with the scorer: the best of many wins against one, beyond chance."""
    best = {"model": "c", "best_of": {"n": 8, "by": SCORER}}
    spec = {"type": "win_rate", "candidate": best, "baseline": {"model": "b"}, "judge": SCORER, "sampling": SAMPLING}
    folder = lay_out(tmp_path / "run", llama, spec)
    assert len(evaluate(folder)) == len(PAIRS) * 3
    assert figures(folder)["win_rate/low"] > 0.5


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"type": "preference", "judge": None, "sampling": None}, "candidate.best_of"),
        ({"baseline": {"model": "b"}}, "baseline"),
        ({"sampling": {"temperatures": [0.0, 1.0]}}, "sampling.temperatures"),
        ({"candidate": {"file": "f", "best_of": {"n": 4, "by": SCORER}}}, "best_of"),
        ({"candidate": {"model": "c", "best_of": {"n": 4, "by": {"type": "reward_model"}}}}, "model"),
    ],
)
def test_best_of_n_where_there_is_nothing_to_choose_is_refused(fields: dict[str, Any], param: str) -> None:
    body = REWARD_KL | {"data": "x", "baseline": None, "candidate": {"model": "c", "best_of": {"n": 4, "by": SCORER}}}
    with pytest.raises(ValidationError) as caught:
        EvaluationSpec.model_validate(body | fields)
    assert param in json.dumps(caught.value.errors(), default=str)


SPACED = [
    {"prompt": f"{pair['prompt']}\n\nAnswer: ", "completion": pair["chosen"].strip()} for pair in make_pairs(60, seed=4)
]


def test_sampling_starts_from_the_prefix_that_was_trained(llama: Path, tmp_path: Path) -> None:
    """The prompts end with a space, which belongs to the first token of the answer in training and in sampling.

    The answers that were learned by heart come out word for word. After a space as a token of its own, none would.
    """
    steps = {"max_steps": 300, "batch_size": 20, "learning_rate": 3e-3}
    spec = {
        "adapter": "none", "quantization": "none", "seed": 1, "validation_split": 0,
        "method": {"type": "supervised", "supervised": {"hyperparameters": steps}},
    }  # fmt: skip
    job = make_work_folder(tmp_path / "job", llama, spec, train=SPACED)
    run_in_process(job)
    evaluation = {
        "type": "win_rate", "candidate": {"model": "c"}, "baseline": {"answers": "chosen"},
        "sampling": {"temperatures": [0.0], "max_tokens": 40},
    }  # fmt: skip
    folder = lay_out(tmp_path / "run", job / "output", evaluation)
    write_records(folder / "data.jsonl", SPACED)
    items = evaluate(folder)
    assert len(items) == len(SPACED)
    assert [item["candidate"] for item in items] == [row["completion"] for row in SPACED]


def test_each_side_reads_prompts_as_it_was_trained(tmp_path: Path) -> None:
    """The base has a chat template. One side was trained on plain text, the other on templated conversations."""
    model = make_tiny_model(tmp_path / "model", chat_template=CHATML)
    spec = REWARD_KL | {"type": "win_rate", "sampling": {"temperatures": [0.0], "max_tokens": 4}}
    folder = lay_out(tmp_path / "run", model, spec)
    run = json.loads((folder / "run.json").read_text())
    run["sides"]["baseline"]["rendering"] = vars(Rendering(chat_template=False))
    (folder / "run.json").write_text(json.dumps(run))
    this_run = EvaluationRun.of(folder, Events(io.StringIO()), threading.Event())
    rows, policy = examples_of(this_run), load(model)
    texts = {
        name: policy.tokenizer.decode(prompts_of(this_run, policy, name, rows, 4)[0].ids)
        for name in ("candidate", "baseline")
    }
    assert "<|assistant|>" in texts["candidate"] and "<|assistant|>" not in texts["baseline"]

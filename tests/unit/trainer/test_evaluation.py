"""Evaluations by the engine alone: known truths come out, and a run that is broken off goes on where it was."""

import io
import json
import math
import re
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from app.spec.datasets.rendering import Rendering
from app.spec.evaluation import EvaluationSpec
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
    write_records,
)
from worker.evaluation_figures import flatten, report
from worker.trainer.errors import Stopped, UserError
from worker.trainer.evaluation import completions, judging
from worker.trainer.evaluation import evaluate as run_evaluation
from worker.trainer.evaluation.completions import prompts_of
from worker.trainer.evaluation.rows import examples_of
from worker.trainer.evaluation.run import EvaluationRun
from worker.trainer.events import Events
from worker.trainer.sampling import sample

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
    """A work folder as a runner makes it; `candidate` is an adapter's folder."""
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
    """The work folder of an evaluation whose judge is a model that is asked."""
    (folder / "sides" / "judge").mkdir()
    (folder / "sides" / "judge" / "base").symlink_to(model, target_is_directory=True)
    run = json.loads((folder / "run.json").read_text())
    run["sides"]["judge"] = {"model": "judge", "base_model": "tiny", "version": "v1", "quantization": "none"}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def evaluate(folder: Path) -> Items:
    run_evaluation(EvaluationRun.of(folder, Events(io.StringIO()), threading.Event()))
    return items(folder)


def items(folder: Path) -> Items:
    return [json.loads(line) for line in (folder / "output" / "items.jsonl").read_text().splitlines()]


def figures(folder: Path) -> dict[str, float]:
    spec = EvaluationSpec.model_validate_json((folder / "evaluation.json").read_text())
    numbers = flatten(report(spec, items(folder)))
    assert set(numbers) <= set(spec.figures()), "every figure is in the registry of metrics"
    return numbers


PREFERENCE = {"type": "preference", "candidate": {"model": "c"}, "baseline": {"model": "b"}}
REWARD_KL = PREFERENCE | {
    "type": "reward_kl",
    "sampling": SAMPLING,
    "judge": {"type": "classifier", "classifier": {"file": "classifier.json"}},
}


def test_margins_are_the_papers(llama: Path, adapter: Path, tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "run", llama, PREFERENCE, candidate=adapter)
    found = evaluate(folder)
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
        return float(sum(logps[at - 1, ids[at]] for at in range(len(before), len(ids))))

    with policy.own_attention_in_use():
        for item, pair in zip(found, PAIRS, strict=True):
            of = [logp(m, pair["prompt"], pair[s]) for m in (policy.causal, base) for s in ("chosen", "rejected")]
            assert item["margin"] == pytest.approx(0.5 * ((of[0] - of[2]) - (of[1] - of[3])), abs=2e-3)
    assert figures(folder)["accuracy"] == sum(item["margin"] > 0 for item in found) / len(found)


def test_a_model_against_itself_prefers_nothing(llama: Path, tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "run", llama, PREFERENCE)
    assert all(item["margin"] == 0 for item in evaluate(folder))
    found = figures(folder)
    assert found["accuracy"] == 0.5 and found["calibration/error"] == 0 and found["pairs"] == len(PAIRS)


def test_only_so_many_rows_always_the_same(llama: Path, tmp_path: Path) -> None:
    drawn = [
        [
            item["line"]
            for item in evaluate(lay_out(tmp_path / f"run-{k}", llama, PREFERENCE | {"max_rows": 7, "seed": k // 2}))
        ]
        for k in range(4)
    ]
    assert len(drawn[0]) == 7 and drawn[0] == drawn[1] == sorted(drawn[0])
    assert drawn[2] == drawn[3] != drawn[0]


def test_the_kl_of_a_model_to_itself_is_zero(llama: Path, tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "run", llama, REWARD_KL)
    found = evaluate(folder)
    assert len(found) == 3 * len(PAIRS)
    assert all(item["logp"] == pytest.approx(item["reference_logp"], rel=1e-5) for item in found)
    assert abs(figures(folder)["kl"]) < 1e-3


def test_the_kl_is_that_of_the_distributions(llama: Path, adapter: Path, tmp_path: Path) -> None:
    """One token an answer: the KL of next-token distributions, summed over the vocabulary, is the truth."""
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
        for temperature, found in truth.items():
            tempered = (moved / temperature).log_softmax(-1)
            found.append(float((tempered.exp() * (tempered - base)).sum()))
    measured = figures(folder)
    for temperature, values in truth.items():
        expected, name = sum(values) / len(values), f"kl@{temperature:g}"
        assert expected > 0.05
        # The prompts are the same in both: only the completions' own noise is left, which is less than the error.
        assert abs(measured[name] - expected) < 2 * measured[f"kl/error@{temperature:g}"]


def test_a_classifier_says_the_reward(llama: Path, tmp_path: Path) -> None:
    found = evaluate(lay_out(tmp_path / "run", llama, REWARD_KL))
    for item in found:
        words = re.findall(r"\b\w\w+\b", (PAIRS[item["line"] - 1]["prompt"] + item["text"]).lower())
        expected = 0.1 + 0.5 * words.count("the") - 0.3 * words.count("and") + words.count("was")
        assert item["reward"] == pytest.approx(expected)


def test_a_reward_model_says_the_reward(llama: Path, tmp_path: Path) -> None:
    training = {
        "adapter": {"r": 4}, "quantization": "none", "seed": 0, "validation_split": 0.0,
        "method": dpo_method(max_steps=2, batch_size=4, loss="reward_model"),
    }  # fmt: skip
    made = make_work_folder(tmp_path / "training", llama, training, train=PAIRS)
    run_in_process(made)
    spec = REWARD_KL | {"judge": {"type": "reward_model", "model": "r"}}
    found = evaluate(lay_out(tmp_path / "run", llama, spec, judge=made / "output"))
    model = AutoModelForSequenceClassification.from_pretrained(made / "output")
    tokenizer = AutoTokenizer.from_pretrained(made / "output")
    for item in found[:10]:
        text = PAIRS[item["line"] - 1]["prompt"] + item["text"] + tokenizer.eos_token
        bos = tokenizer("a").input_ids[:1] if tokenizer("a").input_ids[0] == tokenizer.bos_token_id else []
        ids = bos + tokenizer(text, add_special_tokens=False).input_ids
        with torch.no_grad():
            score = float(model(input_ids=torch.tensor([ids])).logits[0, 0]) - model.config.reward_mean
        assert item["reward"] == pytest.approx(score, abs=1e-4)


def test_both_sides_answer(llama: Path, adapter: Path, tmp_path: Path) -> None:
    spec = {
        "type": "win_rate", "candidate": {"model": "c"}, "baseline": {"answers": "chosen"},
        "sampling": SAMPLING | {"temperatures": [0.0, 1.0]},
        "judge": {"type": "classifier", "classifier": {"file": "classifier.json"}},
    }  # fmt: skip
    found = evaluate(lay_out(tmp_path / "run", llama, spec, candidate=adapter))
    assert len(found) == len(PAIRS) * (1 + 3), "at temperature 0 there is one completion"
    assert all(item["baseline"] == PAIRS[item["line"] - 1]["chosen"] for item in found)
    fixed = {
        "type": "win_rate",
        "candidate": {"answers": "rejected"},
        "baseline": {"answers": "chosen"},
        "judge": spec["judge"],
    }
    assert figures(tmp_path / "run")["win_rate@0"] == sum(
        (item["candidate_reward"] > item["baseline_reward"]) + (item["candidate_reward"] == item["baseline_reward"]) / 2
        for item in found[: len(PAIRS)]
    ) / len(PAIRS)
    found = evaluate(lay_out(tmp_path / "fixed", llama, fixed))
    assert [(item["candidate"], item["baseline"]) for item in found] == [(p["rejected"], p["chosen"]) for p in PAIRS]


def test_a_model_against_itself_wins_half(llama: Path, tmp_path: Path) -> None:
    spec = {
        "type": "win_rate", "candidate": {"model": "c"}, "baseline": {"model": "b"}, "sampling": SAMPLING,
        "judge": {"type": "classifier", "classifier": {"file": "classifier.json"}},
    }  # fmt: skip
    items = evaluate(lay_out(tmp_path / "run", llama, spec))
    found = figures(tmp_path / "run")
    assert found["win_rate/low"] < 0.5 < found["win_rate/high"]
    different = sum(item["candidate"] != item["baseline"] for item in items)
    assert different > len(items) / 2, "its two answers are independent"


def test_a_model_is_asked_as_a_judge(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedily, in both orders, where the question fits; what it says is what the model's own `generate` says."""
    monkeypatch.setattr(judging, "JUDGE_TOKENS", 6)
    spec = {
        "type": "win_rate", "candidate": {"answers": "rejected"}, "baseline": {"answers": "chosen"}, "max_rows": 6,
        "judge": {"type": "model", "model": "judge", "template": "{prompt} {a} or {b}"},
    }  # fmt: skip
    spec["max_length"] = 8  # of what is judged, not of the judge
    found = evaluate(with_judge(lay_out(tmp_path / "run", llama, spec), llama))
    tokenizer, model = AutoTokenizer.from_pretrained(llama), AutoModelForCausalLM.from_pretrained(llama)
    for item in found:
        for said, pair in zip(item["judgements"], (("candidate", "baseline"), ("baseline", "candidate")), strict=True):
            a, b = (item[side].strip() for side in pair)
            text = f"\n\nHuman: {item['prompt'].strip()} {a} or {b}\n\nAssistant:"
            bos = tokenizer("a").input_ids[:-1]
            ids = torch.tensor([bos + tokenizer(text, add_special_tokens=False).input_ids])
            settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
            made = model.generate(ids, **settings)[0, ids.shape[1] :]
            assert said == tokenizer.decode(made, skip_special_tokens=True)
    assert figures(tmp_path / "run")["unparseable"] == 6, "it is a model of 40 words"
    monkeypatch.setattr(judging, "JUDGE_TOKENS", model.config.max_position_embeddings - 2)
    again = evaluate(with_judge(lay_out(tmp_path / "small", llama, spec), llama))
    assert all(item["judgements"] == [None, None] for item in again), "nothing of a question is cut off"


def test_what_people_say_of_the_same_answers_are_votes(llama: Path, tmp_path: Path) -> None:
    """Whoever wrote the file put the better answer first: that must not be what raters are compared by."""
    spec = {"type": "agreement", "judge": {"type": "classifier", "classifier": {"file": "classifier.json"}}}
    folder = lay_out(tmp_path / "run", llama, spec)
    sides = (("the", "a"), ("a", "the"), ("the", "of"))
    one, other, third = ({"prompt": "p ", "chosen": a, "rejected": b} for a, b in sides)
    write_records(folder / "data.jsonl", [one, one, other, third, {**one, "prompt": "q "}])
    found = evaluate(folder)
    assert [(item["first"], item["second"], item["votes"]) for item in found] == [
        ("a", "the", [1, 2]), ("of", "the", [0, 1]), ("a", "the", [0, 1])
    ]  # fmt: skip
    numbers = figures(folder)
    assert numbers["votes"] == 5 and numbers["comparisons"] == 3
    assert numbers["people_people/cases"] == 3 and numbers["people_people/agreement"] == pytest.approx(1 / 3)
    assert numbers["judge_people/cases"] == 5 and numbers["judge_people/agreement"] == pytest.approx(4 / 5)
    assert numbers["judge_people/kappa"] == pytest.approx(0.0), "it always says the second: chance explains it"


def test_ready_answers_are_to_the_same_prompts(llama: Path, tmp_path: Path) -> None:
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


def test_an_answer_that_is_none_moves_no_other(llama: Path, tmp_path: Path) -> None:
    """Line for line, whatever is left out on either side."""
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


@pytest.mark.parametrize("places", [[1], [20, 50], [13, 14, 70]])
def test_what_was_sampled_is_not_sampled_again(
    places: list[int], llama: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after so many completions in all, each time: the same bytes in the end."""
    monkeypatch.setattr(completions, "BATCH_TOKENS", {"cpu": 200})
    monkeypatch.setattr(completions, "PART_SECONDS", 0.0)
    expected = evaluate(lay_out(tmp_path / "whole", llama, REWARD_KL, candidate=adapter))
    folder, stream, stopping = lay_out(tmp_path / "run", llama, REWARD_KL, candidate=adapter), io.StringIO(), None
    sampled = 0

    def counted(*given: Any) -> Any:
        nonlocal sampled
        for one in sample(*given):
            sampled += 1
            if stopping is not None and sampled >= places[0]:
                stopping.set()
            yield one

    monkeypatch.setattr(completions, "sample", counted)
    while places:
        stopping = threading.Event()
        with pytest.raises(Stopped):
            run_evaluation(EvaluationRun.of(folder, Events(stream), stopping))
        places.pop(0)
    stopping = None
    assert evaluate(folder) == expected
    batch = 200 // (12 + min(len(pair["prompt"].split()) for pair in PAIRS))
    assert sampled < len(expected) + 3 * batch, "no more is made again than the batch that was broken off"
    parts = [event for event in parse(stream) if event["kind"] == "part"]
    assert all((folder / part["path"]).exists() for part in parts)


BY = {"type": "classifier", "classifier": {"file": "classifier.json"}}
LETTERS: dict[str, Any] = {
    "terms": {letter: [1.0, (k % 7 - 3) / 3] for k, letter in enumerate("abcdefghijklmnopqrstuvwxyz")} | {
        word: [1.0, (k % 5 - 2) / 2] for k, word in enumerate(WORDS)
    },
    "intercept": 0.0, "normalise": False,
}  # fmt: skip
"""A classifier that likes some of whatever a random model says."""


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "CLASSIFIER", LETTERS)


@pytest.mark.usefixtures("letters")
def test_best_of_n_takes_the_answer_that_its_scorer_likes_best(llama: Path, tmp_path: Path) -> None:
    """It chooses among the same completions as without it, four at a time. Its KL is the bound log N − (N − 1)/N."""
    every = lay_out(tmp_path / "every", llama, REWARD_KL | {"sampling": SAMPLING | {"samples": 8}})
    sampled = evaluate(every)
    spec = REWARD_KL | {"sampling": SAMPLING | {"samples": 2}, "baseline": None}
    folder = lay_out(tmp_path / "best", llama, spec | {"candidate": {"model": "c", "best_of": {"n": 4, "by": BY}}})
    found = evaluate(folder)
    assert len(found) == len(sampled) / 4
    for item in found:
        group = [one for one in sampled if one["row"] == item["row"] and one["sample"] // 4 == item["sample"]]
        assert item["reward"] == max(one["reward"] for one in group)
        assert item["text"] in [one["text"] for one in group if one["reward"] == item["reward"]]
    numbers, before = figures(folder), figures(every)
    assert numbers["kl"] == pytest.approx(math.log(4) - 3 / 4)
    assert numbers["kl/error"] == pytest.approx(0, abs=1e-12)
    assert numbers["best_of/candidate/kl_bound"] == pytest.approx(numbers["kl"])
    assert numbers["reward"] > before["reward"]


@pytest.mark.usefixtures("letters")
def test_best_of_n_is_a_side_of_a_win_rate(llama: Path, tmp_path: Path) -> None:
    """The judge agrees with the scorer: the best of many wins against one, beyond chance."""
    best = {"model": "c", "best_of": {"n": 8, "by": BY}}
    spec = {"type": "win_rate", "candidate": best, "baseline": {"model": "b"}, "judge": BY, "sampling": SAMPLING}
    folder = lay_out(tmp_path / "run", llama, spec)
    assert len(evaluate(folder)) == len(PAIRS) * 3
    assert figures(folder)["win_rate/low"] > 0.5


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"type": "preference", "judge": None, "sampling": None}, "candidate.best_of"),
        ({"baseline": {"model": "b"}}, "baseline"),
        ({"sampling": {"temperatures": [0.0, 1.0]}}, "sampling.temperatures"),
        ({"candidate": {"file": "f", "best_of": {"n": 4, "by": BY}}}, "best_of"),
        ({"candidate": {"model": "c", "best_of": {"n": 4, "by": {"type": "reward_model"}}}}, "model"),
    ],
)
def test_best_of_n_where_there_is_nothing_to_choose_is_refused(fields: dict[str, Any], param: str) -> None:
    body = REWARD_KL | {"data": "x", "baseline": None, "candidate": {"model": "c", "best_of": {"n": 4, "by": BY}}}
    with pytest.raises(ValidationError) as caught:
        EvaluationSpec.model_validate(body | fields)
    assert param in json.dumps(caught.value.errors(), default=str)


SPACED = [
    {"prompt": f"{pair['prompt']}\n\nAnswer: ", "completion": pair["chosen"].strip()} for pair in make_pairs(60, seed=4)
]


def test_sampling_starts_from_the_prefix_that_was_trained(llama: Path, tmp_path: Path) -> None:
    """A prompt that ends with a space: the answer's first token has it in it, in training and in sampling alike. What
    was learned by heart comes out word for word; from the space as a token of its own nothing would.
    """
    steps = {"max_steps": 300, "batch_size": 20, "learning_rate": 3e-3}
    spec = {
        "adapter": "none", "quantization": "none", "seed": 1, "validation_split": 0,
        "method": {"type": "supervised", "supervised": {"hyperparameters": steps}},
    }  # fmt: skip
    job = make_work_folder(tmp_path / "job", llama, spec, train=SPACED)
    run_in_process(job)
    asked = {
        "type": "win_rate", "candidate": {"model": "c"}, "baseline": {"answers": "chosen"},
        "sampling": {"temperatures": [0.0], "max_tokens": 40},
    }  # fmt: skip
    folder = lay_out(tmp_path / "run", job / "output", asked)
    write_records(folder / "data.jsonl", SPACED)
    found = evaluate(folder)
    assert len(found) == len(SPACED)
    assert [item["candidate"] for item in found] == [row["completion"] for row in SPACED]


def test_each_side_reads_prompts_as_it_was_trained(tmp_path: Path) -> None:
    """A base with a chat template: one side was trained on plain text, the other on templated conversations."""
    model = make_tiny_model(tmp_path / "model", chat_template=CHATML)
    spec = REWARD_KL | {"type": "win_rate", "sampling": {"temperatures": [0.0], "max_tokens": 4}}
    folder = lay_out(tmp_path / "run", model, spec)
    run = json.loads((folder / "run.json").read_text())
    run["sides"]["baseline"]["rendering"] = vars(Rendering(chat_template=False))
    (folder / "run.json").write_text(json.dumps(run))
    this_run = EvaluationRun.of(folder, Events(io.StringIO()), threading.Event())
    rows, policy = examples_of(this_run), load(model)
    texts = {
        name: policy.tokenizer.decode(prompts_of(this_run, policy, name, rows)[0].ids)
        for name in ("candidate", "baseline")
    }
    assert "<|assistant|>" in texts["candidate"] and "<|assistant|>" not in texts["baseline"]

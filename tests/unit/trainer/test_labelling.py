"""Labellings by the engine alone: labels equal those of other programs, and do not depend on the number of ranks."""

import io
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import cohen_kappa_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from app.spec.labelling import LabellingSpec
from tests.helpers.hardware import choose
from tests.helpers.ranks import ThreadRanks, on_ranks, one_at_a_time
from tests.helpers.tiny_model import make_tiny_model
from tests.helpers.trainer import make_pairs, parse, write_records
from worker.labelling_figures import metrics, report
from worker.trainer import reward
from worker.trainer.errors import Stopped, UserError
from worker.trainer.events import Events
from worker.trainer.labelling import make_labels
from worker.trainer.labelling.run import LabellingRun
from worker.trainer.sampling import sample
from worker.trainer.sides import asking, completions

Items = list[dict[str, Any]]
PAIRS = make_pairs(12)
LIKENESS = {
    "type": "text_similarity", "name": "likeness", "evaluation_metric": "fuzzy_match",
    "input": "{{sample.output_text}}", "reference": "{{item.prompt}}",
}  # fmt: skip
REWARD_GRADER = {"type": "reward_model", "name": "reward", "model": "reward"}
SPEC: dict[str, Any] = {
    "data": "data.jsonl", "seed": 3, "writers": [{"model": "w"}], "own_answers": True,
    "sampling": {"samples": 3, "max_tokens": 8, "temperatures": [1.0]},
    "labellers": [
        {"judge": {"type": "reward_model", "model": "reward"}},
        {"grader": {"type": "multi", "name": "m", "calculate_output": "r + likeness",
                    "graders": {"r": REWARD_GRADER, "likeness": LIKENESS}}},
        {"name": "asked", "judge": {"type": "model", "model": "judge", "template": "{prompt} {a} {b}"}},
    ],
}  # fmt: skip
SIDES = {
    "writers.0": "model", "labellers.0.judge": "reward", "labellers.1.grader.graders.r": "reward",
    "labellers.2.judge": "model",
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A language model and a reward model."""
    folder = tmp_path_factory.mktemp("models")
    model = make_tiny_model(folder / "model")
    AutoModelForSequenceClassification.from_pretrained(model, num_labels=1).save_pretrained(folder / "reward")
    AutoTokenizer.from_pretrained(model).save_pretrained(folder / "reward")
    config = json.loads((folder / "reward" / "config.json").read_text()) | {"reward_mean": 0.5, "pad_token_id": 0}
    (folder / "reward" / "config.json").write_text(json.dumps(config))
    return {"model": model, "reward": folder / "reward"}


@pytest.fixture(autouse=True)
def _short_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "REPLY_TOKENS", 4)  # the context of a tiny model is short


def lay_out(folder: Path, models: dict[str, Path], **fields: Any) -> Path:
    """A work folder as a runner makes it."""
    folder.mkdir(parents=True)
    sides = {}
    for side, name in SIDES.items():
        (folder / "sides" / side).mkdir(parents=True)
        (folder / "sides" / side / "base").symlink_to(models[name], target_is_directory=True)
        sides[side] = {"model": name, "base_model": "tiny", "version": "v1", "quantization": "none"}
    write_records(folder / "data.jsonl", [*PAIRS, PAIRS[0]])
    (folder / "labelling.json").write_text(json.dumps(SPEC | fields))
    (folder / "run.json").write_text(json.dumps({"sides": sides, "attempt": 1}))
    return folder


def label(folder: Path, stream: io.StringIO | None = None, stopping: threading.Event | None = None) -> Items:
    make_labels(LabellingRun.of(folder, Events(stream or io.StringIO()), stopping or threading.Event()))
    return [json.loads(line) for line in (folder / "output" / "items.jsonl").read_text().splitlines()]


def spec_of(folder: Path) -> LabellingSpec:
    return LabellingSpec.model_validate_json((folder / "labelling.json").read_text()).resolved()


def test_each_labeller_gives_its_scores(models: dict[str, Path], tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "run", models)
    items = label(folder)
    assert len(items) == len({pair["prompt"] for pair in PAIRS}), "a prompt that is there twice is one"
    model = AutoModelForSequenceClassification.from_pretrained(models["reward"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(models["reward"])
    for item in items:
        texts = [answer["text"] for answer in item["answers"]]
        own = [answer["text"] for answer in item["answers"] if answer["writer"] == -1]
        assert set(own) <= {
            pair[side] for pair in PAIRS if pair["prompt"] == item["prompt"] for side in ("chosen", "rejected")
        }
        for text, value in zip(texts, item["labels"]["judge"]["scores"], strict=True):
            ids = tokenizer(item["prompt"] + text + tokenizer.eos_token, return_tensors="pt")
            assert value == pytest.approx(model(**ids).logits.item() - 0.5, abs=1e-4)
        likeness = [
            a - b for a, b in zip(item["labels"]["grader"]["scores"], item["labels"]["judge"]["scores"], strict=True)
        ]
        assert all(-1e-6 <= value <= 1 + 1e-6 for value in likeness)
        verdicts, count = item["labels"]["asked"]["verdicts"], len(texts)
        assert len(verdicts) == count * (count - 1) // 2, "a tiny model names no answer, and every two were asked about"


def test_the_figures_are_those_of_another_program(models: dict[str, Path], tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "run", models)
    spec, items = spec_of(folder), label(folder)
    figures = report(spec, items)
    numbers = metrics(spec, figures)
    assert set(numbers) <= set(spec.figures()), "every figure is in the registry of metrics"
    classes = {
        name: [
            (a > b) - (a < b)
            for item in items
            for i, a in enumerate(item["labels"][name]["scores"])
            for j, b in enumerate(item["labels"][name]["scores"])
            if i != j
        ]
        for name in ("judge", "grader")
    }
    assert numbers["kappa@grader"] == pytest.approx(cohen_kappa_score(classes["judge"], classes["grader"]))
    same = [a == b for a, b in zip(classes["judge"], classes["grader"], strict=True)]
    assert numbers["agreement@grader"] == pytest.approx(sum(same) / len(same))
    assert numbers["unlabelled"] == 0 and numbers["rows"] == numbers["prompts"] == len(items)
    assert sum(entry["best"] for entry in figures["writers"]) == pytest.approx(len(items)), "one best answer for each"
    assert figures["labellers"][2]["unparseable"] == figures["labellers"][2]["pairs"]


def test_several_ranks_make_the_items_of_one(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, sampled_tokens=100)
    monkeypatch.setattr(reward, "SCORED_TOGETHER", 5)
    monkeypatch.setattr(LabellingRun, "load", one_at_a_time(LabellingRun.load))
    classifier = AutoModelForSequenceClassification.from_pretrained
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", one_at_a_time(classifier))
    texts = []
    for size in (1, 2, 3):
        folder = lay_out(tmp_path / str(size), models)

        def run(ranks: ThreadRanks, folder: Path = folder) -> None:
            make_labels(LabellingRun.of(folder, Events(io.StringIO()), threading.Event(), ranks=ranks))

        on_ranks(size, run)
        texts.append((folder / "output" / "items.jsonl").read_text())
    assert texts[1:] == texts[:1] * 2


def test_an_interrupted_run_does_not_sample_its_completions_again(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, sampled_tokens=100)
    monkeypatch.setattr(completions, "PART_SECONDS", 0.0)
    expected, sampled, stopping = label(lay_out(tmp_path / "whole", models)), 0, threading.Event()

    def counting_sample(*arguments: Any) -> Any:
        nonlocal sampled
        for completion in sample(*arguments):
            sampled += 1
            if sampled == 10:
                stopping.set()
            yield completion

    monkeypatch.setattr("worker.trainer.sampling.sample", counting_sample)
    folder, stream = lay_out(tmp_path / "run", models), io.StringIO()
    with pytest.raises(Stopped):
        label(folder, stream, stopping)
    kept = sum(event["completions"] for event in parse(stream) if event["kind"] == "part")
    assert kept > 0
    before = sampled
    assert label(folder) == expected
    replies = sum(len(item["answers"]) * (len(item["answers"]) - 1) for item in expected)
    assert sampled - before == len(expected) * 3 - kept + replies, "what was kept is not sampled again"


def test_endpoints_that_write_are_answered_between_two_runs(models: dict[str, Path], tmp_path: Path) -> None:
    """The first run leaves the answers of the models. The second labels those that the runner has completed."""
    writers = [{"model": "w"}, {"endpoint": {"base_url": "https://1.1.1.1/v1", "model": "other"}}]
    folder = lay_out(tmp_path / "run", models, writers=writers)
    written = label(folder)
    assert all("labels" not in item for item in written)
    for item in written:
        item["answers"].insert(0, {"writer": 1, "place": 0, "text": "from elsewhere", "ended": True})
    write_records(folder / "answered.jsonl", written)
    for item, before in zip(label(folder), written, strict=True):
        assert item["answers"][-1]["text"] == "from elsewhere" and item["row"] == before["row"]
        assert all(len(label["scores"]) == len(item["answers"]) for label in item["labels"].values())


def test_data_without_a_prompt_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "run", models)
    write_records(folder / "data.jsonl", [{"prompt": " ", "chosen": "a", "rejected": "b"}])
    with pytest.raises(UserError) as raised:
        label(folder)
    assert (raised.value.code, raised.value.param) == ("invalid_file", "data")


def test_more_answers_than_a_judge_compares_are_refused_with_their_line(
    models: dict[str, Path], tmp_path: Path
) -> None:
    folder = lay_out(tmp_path / "run", models, writers=[], sampling=None)
    write_records(folder / "data.jsonl", [{"prompt": "q", "responses": [f"answer {k}" for k in range(17)]}])
    with pytest.raises(UserError, match="Line 1: 17 answers") as raised:
        label(folder)
    assert raised.value.param == "own_answers"

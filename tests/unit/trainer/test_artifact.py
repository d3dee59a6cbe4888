"""The output of a job, as others read it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.spec.job import JobSpec
from tests.helpers.trainer import (
    BASE_NAME,
    Event,
    dpo_method,
    make_pairs,
    make_work_folder,
    of_kind,
    read_csv,
    run_in_process,
    sft_method,
)
from worker.model_files import folder_at

PAIRS = make_pairs(14)
SPEC: dict[str, Any] = {
    "sft": {"hyperparameters": {"max_steps": 3, "batch_size": 4, "learning_rate": 0.01}},
    "method": dpo_method(max_steps=3, batch_size=4, learning_rate=0.01, eval_every=2),
    "adapter": {"r": 4, "dropout": 0.1},
    "seed": 5,
    "suffix": "trial",
    "validation_split": 0.5,
}


class Artifact:
    """A finished job: its work folder, its output and its events."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, folder / "output"
        self.events: list[Event] = run_in_process(folder)

    def json(self, name: str) -> Any:
        return json.loads((self.output / name).read_text())

    def validation(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.output / "validation_logps.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def quantised(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    spec = {**SPEC, "quantization": "nf4"}
    return Artifact(make_work_folder(tmp_path_factory.mktemp("quantised"), llama, spec, train=PAIRS))


@pytest.fixture(scope="module")
def plain(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    spec = {**SPEC, "quantization": "none"}
    return Artifact(make_work_folder(tmp_path_factory.mktemp("plain"), llama, spec, train=PAIRS))


@pytest.fixture(scope="module")
def full(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    spec = {"adapter": "none", "method": sft_method(max_steps=2), "seed": 5, "validation_split": 0.5}
    return Artifact(make_work_folder(tmp_path_factory.mktemp("full"), llama, spec, train=PAIRS))


@pytest.fixture(params=["quantised", "plain", "full"])
def artifact(request: pytest.FixtureRequest) -> Artifact:
    finished_job = request.getfixturevalue(request.param)
    assert isinstance(finished_job, Artifact)
    return finished_job


def test_the_output_has_every_file_and_no_pickle(artifact: Artifact) -> None:
    names = {path.name for path in artifact.output.iterdir()}
    always = {"README.md", "metrics.csv", "spec.json", "validation_logps.jsonl", "tokenizer.json"}
    assert always | {"tokenizer_config.json"} <= names
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    assert (adapter <= names) != ({"config.json", "model.safetensors"} <= names)
    assert not [name for name in names if Path(name).suffix in (".bin", ".pt", ".pkl")]
    assert (artifact.folder / "result.csv").exists()


def test_the_output_names_the_base_and_never_its_path(quantised: Artifact, plain: Artifact, full: Artifact) -> None:
    for artifact in (quantised, plain):
        assert artifact.json("adapter_config.json")["base_model_name_or_path"] == BASE_NAME
    for artifact in (quantised, plain, full):
        paths = {str(artifact.folder), str(folder_at(artifact.folder / "base"))}
        for file in artifact.output.rglob("*"):
            content = file.read_bytes()
            assert not [path for path in paths if path.encode() in content], file


def test_checkpoints_name_the_base_and_not_its_path(quantised: Artifact) -> None:
    configs = list((quantised.folder / "checkpoints").rglob("adapter_config.json"))
    assert configs
    for config in configs:
        assert json.loads(config.read_text())["base_model_name_or_path"] == BASE_NAME
        assert str(quantised.folder) not in config.read_text()


def test_the_result_file_has_the_columns_of_openais(artifact: Artifact) -> None:
    header = (artifact.folder / "result.csv").read_text().splitlines()[0]
    assert header == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"


def optional_float(text: str) -> float | None:
    return float(text) if text else None


def test_the_result_file_has_the_metrics_of_the_events(quantised: Artifact) -> None:
    rows = read_csv(quantised.folder / "result.csv")
    metric_events = of_kind(quantised.events, "metrics")
    assert len(rows) == len(metric_events) == 8
    for row, event in zip(rows, metric_events, strict=True):
        accuracy = "mean_token_accuracy" if event["stage"] == "sft" else "rewards/accuracies"
        metrics = event["metrics"]
        assert int(row["step"]) == event["step"]
        assert optional_float(row["train_loss"]) == metrics.get("loss")
        assert optional_float(row["train_accuracy"]) == metrics.get(accuracy)
        assert optional_float(row["valid_loss"]) == metrics.get("eval/loss")
        assert optional_float(row["valid_mean_token_accuracy"]) == metrics.get(f"eval/{accuracy}")


def test_the_metrics_file_has_the_metrics_of_the_events(artifact: Artifact) -> None:
    rows = read_csv(artifact.output / "metrics.csv")
    metric_events = of_kind(artifact.events, "metrics")
    assert len(rows) == len(metric_events)
    for row, event in zip(rows, metric_events, strict=True):
        metrics = {name: float(value) for name, value in row.items() if name not in ("step", "stage") and value}
        assert (int(row["step"]), row["stage"]) == (event["step"], event["stage"])
        assert metrics == event["metrics"]


def test_the_spec_is_the_job_with_every_default_written_out(quantised: Artifact) -> None:
    spec = JobSpec.model_validate(quantised.json("spec.json"))
    assert spec == spec.resolved()
    assert spec.method.dpo is not None
    assert spec.method.dpo.hyperparameters.beta == 0.1
    assert (spec.seed, spec.quantization, spec.suffix) == (5, "nf4", "trial")


def test_the_adapter_loads_on_the_base_and_scores_as_it_did_at_the_end(plain: Artifact, llama: Path) -> None:
    """With PEFT and transformers alone, a text at a time."""
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, plain.output).eval()
    tokenizer = AutoTokenizer.from_pretrained(plain.output)
    entries = plain.validation()
    assert len(entries) == 7

    def logp(prompt: str, answer: str) -> float:
        encoded = tokenizer(prompt + answer + "</s>", return_offsets_mapping=True)
        ids = torch.tensor([encoded.input_ids])
        scored = torch.tensor([end > len(prompt) for _, end in encoded.offset_mapping])
        with torch.no_grad():
            logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        return float(logps.gather(1, ids[0, 1:, None]).squeeze(1)[scored[1:]].sum())

    for entry in entries:
        pair = PAIRS[entry["line"] - 1]
        expected = [logp(pair["prompt"], pair[side]) for side in ("chosen", "rejected")]
        assert entry["logps"] == pytest.approx(expected, rel=1e-5)
        assert entry["logps"] != pytest.approx(entry["reference_logps"], rel=1e-3)


def test_the_validation_log_probs_give_the_last_validation_loss(artifact: Artifact) -> None:
    last_validation = [event for event in of_kind(artifact.events, "metrics") if "eval/loss" in event["metrics"]][-1]
    entries = artifact.validation()
    assert [entry["line"] for entry in entries] == sorted(entry["line"] for entry in entries)
    if last_validation["stage"] == "dpo":
        logps = torch.tensor([entry["logps"] for entry in entries])
        ratios = logps - torch.tensor([entry["reference_logps"] for entry in entries])
        margins = 0.1 * (ratios[:, 0] - ratios[:, 1])
        assert last_validation["metrics"]["eval/loss"] == pytest.approx(
            torch.log1p(torch.exp(-margins)).mean().item(), rel=1e-5
        )
        assert last_validation["metrics"]["eval/rewards/margins"] == pytest.approx(margins.mean().item(), rel=1e-5)
    else:
        tokenizer = AutoTokenizer.from_pretrained(artifact.output)
        chosen = [PAIRS[entry["line"] - 1]["chosen"] + "</s>" for entry in entries]
        tokens = sum(len(tokenizer(text, add_special_tokens=False).input_ids) for text in chosen)
        total = -sum(entry["logps"][0] for entry in entries)
        assert last_validation["metrics"]["eval/loss"] == pytest.approx(total / tokens, rel=1e-5)
        assert all(entry["reference_logps"] is None for entry in entries)


def test_the_model_card_describes_the_job_and_its_drift(quantised: Artifact, plain: Artifact) -> None:
    card = (quantised.output / "README.md").read_text()
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert f"base_model: {BASE_NAME}" in front.splitlines()
    assert "library_name: peft" in front.splitlines()
    for word in ("trial", "SFT, then DPO", "nf4", "train.jsonl", "| beta | 0.1 |", "eval/loss", "icence"):
        assert word in body
    drift = re.search(r"differ by (\d+\.\d+) nats a token on average \(7 validation rows, (\d+) tokens\)", body)
    assert drift is not None
    assert 0 < float(drift[1]) < 1
    assert "The base was not quantised." in (plain.output / "README.md").read_text()


def test_the_drift_is_that_of_the_adapter_on_the_unquantised_base(quantised: Artifact, llama: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, quantised.output).eval()
    tokenizer = AutoTokenizer.from_pretrained(quantised.output)
    difference, tokens = 0.0, 0
    for entry in quantised.validation():
        pair = PAIRS[entry["line"] - 1]
        for side, logp in zip(("chosen", "rejected"), entry["logps"], strict=True):
            prompt = len(tokenizer(pair["prompt"]).input_ids)
            ids = torch.tensor([tokenizer(pair["prompt"] + pair[side] + "</s>").input_ids])
            with torch.no_grad():
                logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            answer_logps = logps.gather(1, ids[0, 1:, None]).squeeze(1)[prompt - 1 :]
            difference += abs(answer_logps.sum().item() - logp)
            tokens += len(answer_logps)
    assert f"{difference / tokens:.4f} nats a token" in (quantised.output / "README.md").read_text()
    assert f"{tokens} tokens" in (quantised.output / "README.md").read_text()


def test_the_tokenizer_equals_the_bases(artifact: Artifact, llama: Path) -> None:
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (artifact.output, llama))
    for text in ("the cat and the dog.", "naïve 日本 🙂 </s>", ""):
        assert ours(text).input_ids == theirs(text).input_ids

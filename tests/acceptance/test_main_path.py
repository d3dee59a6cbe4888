"""The main path as its users walk it: the official client, then plain peft and transformers on the result."""

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import BadRequestError, NotFoundError
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

from tests.helpers.preferences import pairs, write
from tests.helpers.service import Running


def test_upload_train_and_load_the_adapter(
    service_on_each_stack: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validation = pairs(12, seed=2)
    adapter = train_with_the_official_client(service_on_each_stack, tmp_path, validation)
    # The adapter names its base by the model's name, which is here also the name of its folder.
    monkeypatch.chdir(service_on_each_stack.home / "models")
    log_probs_are_as_reported(adapter, validation)


def train_with_the_official_client(service: Running, folder: Path, validation: list[dict[str, str]]) -> Path:
    client = service.openai()
    training_file = client.files.create(file=write(folder / "train.jsonl", pairs(48, seed=1)), purpose="fine-tune")
    validation_file = client.files.create(file=write(folder / "valid.jsonl", validation), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=training_file.id,
        validation_file=validation_file.id,
        suffix="echo",
        seed=11,
        method={
            "type": "dpo",
            "dpo": {"hyperparameters": {"beta": 0.1, "batch_size": 8, "n_epochs": 2, "learning_rate_multiplier": 20}},
        },
        metadata={"from": "test"},
        extra_body={"sft": {"hyperparameters": {"batch_size": 8}}, "quantization": "nf4", "adapter": {"r": 4}},
    )
    assert job.status == "validating_files"
    service.wait_for(job.id, lambda seen: seen["status"] == "succeeded")
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.fine_tuned_model is not None and job.fine_tuned_model.startswith("ft:tiny:default:echo:")
    assert job.trained_tokens and job.finished_at and job.error is None

    events = list(client.fine_tuning.jobs.list_events(job.id, limit=7))
    assert len({event.id for event in events}) == len(events), "pages overlap"
    metrics = [event.data for event in reversed(events) if event.type == "metrics"]
    assert [m["step"] for m in metrics if isinstance(m, dict) and m["stage"] == "dpo" and "loss" in m] == [
        *range(7, 19)
    ]
    first = next(m for m in metrics if isinstance(m, dict) and m["stage"] == "dpo" and "loss" in m)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5), "the reference is the policy at step 0"

    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert checkpoints[0].step_number == 18 and {c.fine_tuning_job_id for c in checkpoints} == {job.id}
    assert [c.step_number for c in checkpoints] == sorted((c.step_number for c in checkpoints), reverse=True)

    (result_id,) = job.result_files
    assert client.files.retrieve(result_id).purpose == "fine-tune-results"
    rows = list(csv.DictReader(io.StringIO(client.files.content(result_id).text)))
    assert list(rows[0]) == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert float(rows[-1]["train_loss"]) > 0 and rows[-1]["step"] == "18"

    names = {model.id for model in client.models.list()}
    assert {"tiny", job.fine_tuned_model} <= names
    with pytest.raises(BadRequestError):
        client.fine_tuning.jobs.create(model="tiny", training_file=result_id)

    adapter = folder / "adapter"
    downloaded = service.dpo("models", "download", job.fine_tuned_model, "--output", str(adapter))
    assert downloaded.returncode == 0, downloaded.stderr
    with service.http() as http:
        content = http.get(f"/models/{checkpoints[-1].fine_tuned_model_checkpoint}/download").content
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        assert "adapter_model.safetensors" in archive.getnames()

    assert client.models.delete(job.fine_tuned_model).deleted
    with pytest.raises(NotFoundError):
        client.models.retrieve(job.fine_tuned_model)
    return adapter


def log_probs_are_as_reported(adapter: Path, validation: list[dict[str, str]]) -> None:
    """Plain peft on the same quantised base gives the log-probs that the job reported."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, quantization_config=quantization, dtype=torch.float32)
    model.train()  # bitsandbytes on some CPUs computes with other weights in evaluation mode
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    reported = [json.loads(line) for line in (adapter / "validation_logps.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in reported] == list(range(1, len(validation) + 1))
    for entry, row in zip(reported, validation, strict=True):
        for side, value in zip(("chosen", "rejected"), entry["logps"], strict=True):
            text = row["prompt"] + row[side] + tokenizer.eos_token
            encoded = tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
            with torch.no_grad():
                logps = model(input_ids=encoded.input_ids).logits[0].log_softmax(-1)
            answer = [i for i, (_, end) in enumerate(encoded.offset_mapping[0].tolist()) if end > len(row["prompt"])]
            expected = sum(logps[i - 1, encoded.input_ids[0, i]].item() for i in answer)
            assert value == pytest.approx(expected, rel=1e-5)


def test_the_command_line_walks_the_same_path(service: Running, tmp_path: Path) -> None:
    """`dpo jobs create --watch` uploads, follows and says what to do next; a bad file fails with line and field."""
    training = write(tmp_path / "train.jsonl", pairs(24, seed=1))
    done = service.dpo(
        "jobs",
        "create",
        "--model",
        "tiny",
        "--training-file",
        str(training),
        "--sft",
        "--beta",
        "0.2",
        "--loss",
        "hinge",
        "--epochs",
        "2",
        "--learning-rate",
        "0.0005",
        "--watch",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "AutoPeftModelForCausalLM" in done.stdout and "vllm serve tiny" in done.stdout
    listed, *_ = json.loads(service.dpo("jobs", "list", "--json").stdout)
    assert listed["status"] == "succeeded"
    assert service.dpo("jobs", "logs", listed["id"]).returncode == 0
    shown = json.loads(service.dpo("jobs", "show", listed["id"], "--json").stdout)
    set_here = {"beta": 0.2, "loss": "hinge", "n_epochs": 2, "learning_rate": 0.0005}
    assert set_here.items() <= shown["method"]["dpo"]["hyperparameters"].items()
    assert service.dpo("jobs", "cancel", listed["id"]).returncode == 2

    # A model made here is where the next job starts: its adapter goes on.
    body = {"model": listed["fine_tuned_model"], "method": {"type": "dpo"}, "suffix": "again"}
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(body | {"training_file": listed["training_file"]}))
    chained = service.dpo("jobs", "create", "--spec", str(spec), "--watch", "--json")
    assert chained.returncode == 0, chained.stdout + chained.stderr
    assert json.loads(chained.stdout)["fine_tuned_model"].startswith("ft:tiny:default:again:")

    training.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "b"}\n')
    failed = service.dpo("jobs", "create", "--model", "tiny", "--training-file", str(training), "--watch")
    assert failed.returncode == 1
    assert "Line 2" in failed.stdout and "'rejected'" in failed.stdout
    unknown = service.dpo("jobs", "create", "--model", "nothing", "--training-file", str(training))
    assert unknown.returncode == 2 and "does not exist" in unknown.stderr


def test_an_adapter_on_a_fully_trained_model(service: Running, tmp_path: Path) -> None:
    """Full parameters first; then DPO starts from that model, whose folder is the adapter's base."""
    client = service.openai()
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs(24, seed=1)]
    sft = client.files.create(file=write(tmp_path / "sft.jsonl", rows), purpose="fine-tune")
    dpo = client.files.create(file=write(tmp_path / "dpo.jsonl", pairs(24, seed=2)), purpose="fine-tune")
    full = client.fine_tuning.jobs.create(
        model="tiny", training_file=sft.id, seed=1, extra_body={"adapter": "none"}, suffix="full"
    )
    made = service.wait_for(full.id, lambda job: job["status"] == "succeeded")["fine_tuned_model"]
    job = client.fine_tuning.jobs.create(model=made, training_file=dpo.id, method={"type": "dpo"}, seed=1)
    tuned = service.wait_for(job.id, lambda seen: seen["status"] == "succeeded")["fine_tuned_model"]
    service.dpo("models", "download", tuned, "--output", str(tmp_path / "adapter"))
    # A third job starts from the adapter: it still sits on the full model, not on the base below that.
    again = client.fine_tuning.jobs.create(model=tuned, training_file=dpo.id, method={"type": "dpo"}, seed=1)
    third = service.wait_for(again.id, lambda seen: seen["status"] == "succeeded")["fine_tuned_model"]
    service.dpo("models", "download", third, "--output", str(tmp_path / "third"))
    service.dpo("models", "download", made, "--output", str(tmp_path / "full"))
    for name in ("adapter", "third"):
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == made
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= {
        path.name for path in (tmp_path / "full").iterdir()
    }
    first, last = (json.loads(p.read_text()) for p in (tmp_path / "full/spec.json", tmp_path / "adapter/spec.json"))
    assert (first["adapter"], first["quantization"], last["quantization"]) == ("none", "none", "nf4")


def test_the_trainer_runs_alone(home: Path, tmp_path: Path) -> None:
    """`dpo train` makes the same artifact folder with no service."""
    write(tmp_path / "train.jsonl", pairs(24, seed=1))
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"model": "tiny", "training_file": "train.jsonl", "method": {"type": "dpo"}, "seed": 1}))
    service = Running("", "", home, {"DPO_HOME": str(home), "PATH": ""}, None)  # type: ignore[arg-type]
    output = tmp_path / "made"
    done = service.dpo("train", str(spec), "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "metrics.csv", "spec.json"} <= {
        path.name for path in output.iterdir()
    }
    assert service.dpo("train", str(spec), "--output", str(output)).returncode == 2, "a folder with things in it"
    spec.write_text(json.dumps({"model": "../tiny", "training_file": "train.jsonl"}))
    refused = service.dpo("train", str(spec), "--output", str(tmp_path / "other"))
    assert refused.returncode == 2 and not (tmp_path / "other").exists()


def test_a_sweep_shares_the_reference_and_a_reward_model_is_a_classifier(service: Running, tmp_path: Path) -> None:
    """What jobs on the same file have in common is computed once, through the object store."""
    client: Any = service.openai()
    file = client.files.create(file=write(tmp_path / "train.jsonl", pairs(24, seed=7)), purpose="fine-tune")

    def train(name: str, **hyperparameters: Any) -> str:
        method = {"type": "dpo", "dpo": {"hyperparameters": {"batch_size": 8, **hyperparameters}}}
        job = client.fine_tuning.jobs.create(
            model="tiny",
            training_file=file.id,
            method=method,
            seed=3,
            suffix=name,
            extra_body={"adapter": {"r": 4}},
        )
        service.wait_for(job.id, lambda seen: seen["status"] == "succeeded")
        return str(job.id)

    def told(job_id: str) -> str:
        return "\n".join(event.message for event in client.fine_tuning.jobs.list_events(job_id, limit=100))

    first, second = train("low", beta=0.05), train("high", beta=0.5)
    assert "Reference log-probs computed" in told(first)
    assert "Reference log-probs found in the cache" in told(second)

    policy = client.fine_tuning.jobs.retrieve(first).fine_tuned_model
    held = train("held", reference_model=policy)
    assert "Reference log-probs computed" in told(held)

    rewards = client.fine_tuning.jobs.retrieve(train("judge", loss="reward_model")).fine_tuned_model
    assert policy is not None and rewards is not None
    folder = tmp_path / "rewards"
    downloaded = service.dpo("models", "download", rewards, "--output", str(folder))
    assert downloaded.returncode == 0, downloaded.stderr
    for body in ({"model": rewards}, {"model": "tiny", "method": reference_by(rewards)}):
        with pytest.raises(BadRequestError, match="reward model"):
            client.fine_tuning.jobs.create(training_file=file.id, **body)
    judge = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        assert judge(**tokenizer("see</s>", return_tensors="pt")).logits.shape == (1, 1)


def reference_by(model: str) -> dict[str, Any]:
    return {"type": "dpo", "dpo": {"hyperparameters": {"reference_model": model}}}

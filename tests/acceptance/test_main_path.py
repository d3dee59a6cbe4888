"""The main path of a user: the official client, then plain peft and transformers on the result."""

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import BadRequestError, NotFoundError, OpenAI
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

from tests.helpers.preferences import pairs, write
from tests.helpers.service import Running, get_when_ready


def test_an_uploaded_file_becomes_an_adapter_that_plain_peft_loads(
    service_on_each_stack: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validation = pairs(12, seed=2)
    adapter = train_with_the_official_client(service_on_each_stack, tmp_path, validation)
    # The adapter names its base by the model's name, which is here also the name of its folder.
    monkeypatch.chdir(service_on_each_stack.home / "models")
    check_that_peft_computes_the_reported_logps(adapter, validation)


def train_with_the_official_client(service: Running, folder: Path, validation: list[dict[str, str]]) -> Path:
    """Train an SFT and a DPO stage. Check every object on the way. Returns the folder of the adapter."""
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
    service.wait_for(job.id, lambda state: state["status"] == "succeeded")
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.fine_tuned_model is not None and job.fine_tuned_model.startswith("ft:tiny:default:echo:")
    assert job.trained_tokens and job.finished_at and job.error is None

    events = list(client.fine_tuning.jobs.list_events(job.id, limit=7))
    assert len({event.id for event in events}) == len(events), "pages overlap"
    metrics = [event.data for event in reversed(events) if event.type == "metrics"]
    dpo_metrics = [data for data in metrics if isinstance(data, dict) and data["stage"] == "dpo" and "loss" in data]
    assert [data["step"] for data in dpo_metrics] == [*range(7, 19)]
    assert dpo_metrics[0]["loss"] == pytest.approx(0.693147, abs=1e-5), "the reference is the policy at step 0"

    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert {checkpoint.fine_tuning_job_id for checkpoint in checkpoints} == {job.id}
    steps = [checkpoint.step_number for checkpoint in checkpoints]
    assert steps[0] == 18 and steps == sorted(steps, reverse=True)

    (result_id,) = job.result_files
    assert client.files.retrieve(result_id).purpose == "fine-tune-results"
    rows = list(csv.DictReader(io.StringIO(client.files.content(result_id).text)))
    assert list(rows[0]) == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert float(rows[-1]["train_loss"]) > 0 and rows[-1]["step"] == "18"

    model_ids = {model.id for model in client.models.list()}
    assert {"tiny", job.fine_tuned_model} <= model_ids
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


def check_that_peft_computes_the_reported_logps(adapter: Path, validation: list[dict[str, str]]) -> None:
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
    assert [item["line"] for item in reported] == list(range(1, len(validation) + 1))
    for item, row in zip(reported, validation, strict=True):
        for side, value in zip(("chosen", "rejected"), item["logps"], strict=True):
            text = row["prompt"] + row[side] + tokenizer.eos_token
            encoded = tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
            with torch.no_grad():
                logps = model(input_ids=encoded.input_ids).logits[0].log_softmax(-1)
            response = [i for i, (_, end) in enumerate(encoded.offset_mapping[0].tolist()) if end > len(row["prompt"])]
            expected = sum(logps[i - 1, encoded.input_ids[0, i]].item() for i in response)
            assert value == pytest.approx(expected, rel=1e-5)


def test_the_command_line_creates_follows_and_chains_jobs(service: Running, tmp_path: Path) -> None:
    """`dpo jobs create --watch` uploads, follows and prints the next steps. A bad file fails with line and field."""
    training = write(tmp_path / "train.jsonl", pairs(24, seed=1))
    created = service.dpo(
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
    assert created.returncode == 0, created.stdout + created.stderr
    assert "AutoPeftModelForCausalLM" in created.stdout and "vllm serve tiny" in created.stdout
    job, *_ = json.loads(service.dpo("jobs", "list", "--json").stdout)
    assert job["status"] == "succeeded"
    assert service.dpo("jobs", "logs", job["id"]).returncode == 0
    shown = json.loads(service.dpo("jobs", "show", job["id"], "--json").stdout)
    options = {"beta": 0.2, "loss": "hinge", "n_epochs": 2, "learning_rate": 0.0005}
    assert options.items() <= shown["method"]["dpo"]["hyperparameters"].items()
    assert service.dpo("jobs", "cancel", job["id"]).returncode == 2

    # A job that starts from a fine-tuned model continues its adapter.
    body = {"model": job["fine_tuned_model"], "method": {"type": "dpo"}, "suffix": "again"}
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(body | {"training_file": job["training_file"]}))
    chained = service.dpo("jobs", "create", "--spec", str(spec), "--watch", "--json")
    assert chained.returncode == 0, chained.stdout + chained.stderr
    assert json.loads(chained.stdout)["fine_tuned_model"].startswith("ft:tiny:default:again:")

    training.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "b"}\n')
    failed = service.dpo("jobs", "create", "--model", "tiny", "--training-file", str(training), "--watch")
    assert failed.returncode == 1
    assert "Line 2" in failed.stdout and "'rejected'" in failed.stdout
    unknown = service.dpo("jobs", "create", "--model", "nothing", "--training-file", str(training))
    assert unknown.returncode == 2 and "does not exist" in unknown.stderr


def test_an_adapter_can_be_trained_on_a_fully_trained_model(service: Running, tmp_path: Path) -> None:
    """SFT trains all parameters. DPO then trains an adapter, whose base is the SFT model."""
    client = service.openai()
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs(24, seed=1)]
    sft_file = client.files.create(file=write(tmp_path / "sft.jsonl", rows), purpose="fine-tune")
    dpo_file = client.files.create(file=write(tmp_path / "dpo.jsonl", pairs(24, seed=2)), purpose="fine-tune")
    sft_job = client.fine_tuning.jobs.create(
        model="tiny", training_file=sft_file.id, seed=1, extra_body={"adapter": "none"}, suffix="full"
    )
    full_model = service.wait_for(sft_job.id, lambda state: state["status"] == "succeeded")["fine_tuned_model"]
    dpo_job = client.fine_tuning.jobs.create(
        model=full_model, training_file=dpo_file.id, method={"type": "dpo"}, seed=1
    )
    dpo_model = service.wait_for(dpo_job.id, lambda state: state["status"] == "succeeded")["fine_tuned_model"]
    service.dpo("models", "download", dpo_model, "--output", str(tmp_path / "adapter"))
    # A third job starts from the adapter. The base stays the full model, not the base model below it.
    third_job = client.fine_tuning.jobs.create(
        model=dpo_model, training_file=dpo_file.id, method={"type": "dpo"}, seed=1
    )
    third_model = service.wait_for(third_job.id, lambda state: state["status"] == "succeeded")["fine_tuned_model"]
    service.dpo("models", "download", third_model, "--output", str(tmp_path / "third"))
    service.dpo("models", "download", full_model, "--output", str(tmp_path / "full"))
    for name in ("adapter", "third"):
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == full_model
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= {
        path.name for path in (tmp_path / "full").iterdir()
    }
    sft_spec = json.loads((tmp_path / "full/spec.json").read_text())
    dpo_spec = json.loads((tmp_path / "adapter/spec.json").read_text())
    assert (sft_spec["adapter"], sft_spec["quantization"], dpo_spec["quantization"]) == ("none", "none", "nf4")


def test_dpo_train_needs_no_service(home: Path, tmp_path: Path) -> None:
    """`dpo train` writes the same artifact folder without a service."""
    write(tmp_path / "train.jsonl", pairs(24, seed=1))
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"model": "tiny", "training_file": "train.jsonl", "method": {"type": "dpo"}, "seed": 1}))
    service = Running("", "", home, {"DPO_HOME": str(home), "PATH": ""}, None)  # type: ignore[arg-type]
    output = tmp_path / "artifact"
    training = service.dpo("train", str(spec), "--output", str(output))
    assert training.returncode == 0, training.stdout + training.stderr
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "metrics.csv", "spec.json"} <= {
        path.name for path in output.iterdir()
    }
    assert service.dpo("train", str(spec), "--output", str(output)).returncode == 2, "the output folder is not empty"
    spec.write_text(json.dumps({"model": "../tiny", "training_file": "train.jsonl"}))
    refused = service.dpo("train", str(spec), "--output", str(tmp_path / "other"))
    assert refused.returncode == 2 and not (tmp_path / "other").exists()


def test_jobs_share_reference_logps_and_a_reward_model_is_a_classifier(service: Running, tmp_path: Path) -> None:
    """Reference log-probs of the same file and reference are computed once and shared through the object store."""
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
        service.wait_for(job.id, lambda state: state["status"] == "succeeded")
        return str(job.id)

    def messages(job_id: str) -> str:
        return "\n".join(event.message for event in client.fine_tuning.jobs.list_events(job_id, limit=100))

    low_beta, high_beta = train("low", beta=0.05), train("high", beta=0.5)
    assert "Reference log-probs computed" in messages(low_beta)
    assert "Reference log-probs found in the cache" in messages(high_beta)

    policy = client.fine_tuning.jobs.retrieve(low_beta).fine_tuned_model
    other_reference = train("held", reference_model=policy)
    assert "Reference log-probs computed" in messages(other_reference)

    reward_model = client.fine_tuning.jobs.retrieve(train("judge", loss="reward_model")).fine_tuned_model
    assert policy is not None and reward_model is not None
    folder = tmp_path / "rewards"
    downloaded = service.dpo("models", "download", reward_model, "--output", str(folder))
    assert downloaded.returncode == 0, downloaded.stderr
    for body in ({"model": reward_model}, {"model": "tiny", "method": dpo_with_reference(reward_model)}):
        with pytest.raises(BadRequestError, match="reward model"):
            client.fine_tuning.jobs.create(training_file=file.id, **body)
    grader = {"type": "reward_model", "name": "learned", "model": reward_model}
    settings = {"batch_size": 4, "samples": 4, "max_tokens": 8, "max_steps": 2}
    method = {"type": "reinforcement", "reinforcement": {"grader": grader, "hyperparameters": settings}}
    # As by default, this client does not validate answers: OpenAI has no such grader.
    with OpenAI(base_url=service.url, api_key=service.key, max_retries=0) as plain:
        asked: Any = {"model": policy, "training_file": file.id, "method": method, "seed": 3}
        job = plain.fine_tuning.jobs.create(**asked)
        service.wait_for(job.id, lambda state: state["status"] == "succeeded")
        with service.http() as http:
            estimate = get_when_ready(http, "POST", "/fine_tuning/estimate", json=asked).json()
        assert estimate["seconds"] > 0 and estimate["memory"]["graders"] > 0 and estimate["memory"]["rollouts"] > 0
        grader["model"] = policy
        with pytest.raises(BadRequestError, match="not a reward model") as refused:
            plain.fine_tuning.jobs.create(**asked)
    assert refused.value.param == "method.reinforcement.grader.model"
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        assert classifier(**tokenizer("see</s>", return_tensors="pt")).logits.shape == (1, 1)


def dpo_with_reference(model: str) -> dict[str, Any]:
    return {"type": "dpo", "dpo": {"hyperparameters": {"reference_model": model}}}

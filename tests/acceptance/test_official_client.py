"""Every resource and error through the official client, sync and async, with strict response validation."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, AzureOpenAI, OpenAI

from tests.helpers.preferences import pairs, write
from tests.helpers.service import Running

SHORT: dict[str, Any] = {
    "method": {"type": "dpo", "dpo": {"hyperparameters": {"batch_size": 8, "max_steps": 2}}},
    "quantization": "none",
}


def test_the_official_client_handles_every_resource_and_error(service_on_each_stack: Running, tmp_path: Path) -> None:
    service = service_on_each_stack.in_project("official-client")
    with service.openai() as client:
        check_resources(service, client, tmp_path)
        check_graders(client)
        check_reinforcement(service, client, tmp_path)
        check_errors(service_on_each_stack, client)
    check_azures_client(service, tmp_path)
    asyncio.run(check_concurrent_requests(service, tmp_path))


def check_resources(service: Running, client: OpenAI, folder: Path) -> None:
    """The sync client: files, uploads, jobs, events, checkpoints and models."""
    path = write(folder / "train.jsonl", pairs(32, seed=1))
    files = [
        client.files.create(file=path, purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600})
        for _ in range(3)
    ]
    assert files[0].expires_at == files[0].created_at + 3600
    assert [file.id for file in client.files.list(order="asc", limit=2)] == [file.id for file in files]
    assert client.files.retrieve(files[0].id) == files[0]
    assert client.files.content(files[0].id).read() == path.read_bytes()
    assert client.files.delete(files[2].id).deleted

    content = path.read_bytes()
    upload = client.uploads.create(
        filename="train.jsonl", purpose="fine-tune", bytes=len(content), mime_type="text/jsonl"
    )
    half = len(content) // 2
    parts = [client.uploads.parts.create(upload.id, data=piece) for piece in (content[:half], content[half:])]
    completed = client.uploads.complete(
        upload.id, part_ids=[part.id for part in parts], md5=hashlib.md5(content).hexdigest()
    )
    assert completed.status == "completed" and completed.file is not None
    chunked = client.uploads.upload_file_chunked(
        file=path, mime_type="text/jsonl", purpose="fine-tune", part_size=max(1, len(content) // 3)
    )
    assert chunked.file is not None and client.files.content(chunked.file.id).read() == content
    cancelled = client.uploads.create(filename="x", purpose="fine-tune", bytes=1, mime_type="text/jsonl")
    assert client.uploads.cancel(cancelled.id).status == "cancelled"

    paused = client.fine_tuning.jobs.create(
        model="tiny", training_file=completed.file.id, metadata={"run": "held"}, extra_body=SHORT
    )
    assert client.fine_tuning.jobs.pause(paused.id).id == paused.id
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=completed.file.id, metadata={"run": "first"}, extra_body=SHORT, suffix="s", seed=1
    )
    service.wait_for(job.id, lambda state: state["status"] == "succeeded")
    assert client.fine_tuning.jobs.resume(paused.id).id == paused.id
    service.wait_for(paused.id, lambda state: state["status"] == "succeeded")
    assert [listed.id for listed in client.fine_tuning.jobs.list(metadata={"run": "first"})] == [job.id]
    assert {listed.id for listed in client.fine_tuning.jobs.list(limit=1)} == {job.id, paused.id}
    assert len(list(client.fine_tuning.jobs.list_events(job.id, limit=3))) >= 6
    (checkpoint, *_) = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert checkpoint.fine_tuning_job_id == job.id
    model = client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model
    assert model is not None and client.models.retrieve(model).id == model
    assert model in {listed.id for listed in client.models.list()}
    assert client.models.delete(model).deleted


def check_azures_client(service: Running, folder: Path) -> None:
    """The official client for Azure has other paths and another header."""
    endpoint = service.url.removesuffix("/v1")
    with AzureOpenAI(azure_endpoint=endpoint, api_key=service.key, api_version="2024-10-21", max_retries=0) as client:
        path = write(folder / "azure.jsonl", pairs(12, seed=1))
        file = client.files.create(file=path, purpose="fine-tune")
        assert client.files.content(file.id).read() == path.read_bytes()
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, extra_body=SHORT)
        assert job.id in [listed.id for listed in client.fine_tuning.jobs.list(limit=5).data]
        client.fine_tuning.jobs.cancel(job.id)
        assert client.fine_tuning.jobs.retrieve(job.id).status == "cancelled"
        assert client.fine_tuning.jobs.list_events(job.id).data
    wrong = AzureOpenAI(azure_endpoint=endpoint, api_key="wrong", api_version="2024-10-21", max_retries=0)
    with wrong, pytest.raises(openai.AuthenticationError):
        wrong.files.list()


def check_graders(client: OpenAI) -> None:
    """Graders are checked and tried before a training uses them."""
    graders, exact = client.fine_tuning.alpha.graders, dict[str, Any]()
    exact |= {"type": "string_check", "name": "exact", "input": "{{sample.output_text}}", "operation": "eq"}
    exact["reference"] = "{{item.answer}}"
    valid = graders.validate(grader=exact)  # type: ignore[arg-type]
    assert valid.grader is not None and valid.grader.to_dict() == exact
    run = graders.run(grader=exact, model_sample="42", item={"answer": "42"})  # type: ignore[arg-type]
    assert run.reward == 1 and run.metadata.name == "exact" and not run.metadata.errors.other_error
    failed = graders.run(grader=exact, model_sample="42")  # type: ignore[arg-type]
    assert failed.reward == 0 and failed.metadata.errors.invalid_variable_error
    near = exact | {"type": "text_similarity", "name": "near", "evaluation_metric": "rouge_1"}
    del near["operation"]
    both: Any = {"exact": exact, "near": near}
    multi: Any = {"type": "multi", "name": "both", "graders": both, "calculate_output": "exact + near ^ 2"}
    run = graders.run(grader=multi, model_sample="42 is it", item={"answer": "42"})
    assert run.reward == 0.25 and run.sub_rewards == {"exact": 0.0, "near": 0.5}
    with pytest.raises(openai.BadRequestError) as refused:
        graders.validate(grader=multi | {"calculate_output": "__import__('os')"})
    assert refused.value.param == "grader.calculate_output"


def check_reinforcement(service: Running, client: OpenAI, folder: Path) -> None:
    """A job with a grader, with the fields that the client types."""
    rows = [{"messages": [{"role": "user", "content": f"{number}. a?"}], "answer": "e"} for number in range(12)]
    questions = folder / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = client.files.create(file=questions, purpose="fine-tune")
    grader: Any = {
        "type": "string_check", "name": "has it", "input": "{{sample.output_text}}", "reference": "{{item.answer}}",
        "operation": "like",
    }  # fmt: skip
    settings: Any = {
        "batch_size": 4, "n_epochs": 1, "compute_multiplier": 0.5, "eval_samples": 2, "eval_interval": "auto",
        "learning_rate_multiplier": "auto", "reasoning_effort": "default",
    }  # fmt: skip
    method: Any = {"type": "reinforcement", "reinforcement": {"grader": grader, "hyperparameters": settings}}
    extra = {"quantization": "none", "validation_split": 0.25}
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=file.id, method=method, seed=1, extra_body=extra, timeout=60
    )
    assert job.method is not None and job.method.reinforcement is not None
    service.wait_for(job.id, lambda state: state["status"] in ("succeeded", "failed"))
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=100))
    ended = client.fine_tuning.jobs.retrieve(job.id)
    assert ended.status == "succeeded" and ended.fine_tuned_model is not None, events
    metrics = [event.data for event in events if event.type == "metrics"]
    assert any("reward" in str(data) and "eval/reward" in str(data) for data in metrics)
    assert client.models.delete(ended.fine_tuned_model).deleted


def check_errors(service: Running, client: OpenAI) -> None:
    """Each error raises the right exception class with its code."""
    created = service.dpo("keys", "create", "--name", "reader", "--scope", "read")
    reader = OpenAI(base_url=service.url, api_key=created.stdout.strip(), max_retries=0)
    unauthenticated = OpenAI(base_url=service.url, api_key="dpo_wrong", max_retries=0)
    ended_job = next(iter(client.fine_tuning.jobs.list(limit=1)))
    cases: list[tuple[type[openai.APIStatusError], str, Callable[[], object]]] = [
        (openai.BadRequestError, "model_not_found", lambda: client.fine_tuning.jobs.create(model="none", training_file="x")),
        (openai.BadRequestError, "invalid_value", lambda: client.files.create(file=b"x", purpose="none")),  # type: ignore[arg-type]
        (openai.AuthenticationError, "invalid_api_key", lambda: unauthenticated.files.list()),
        (openai.PermissionDeniedError, "insufficient_scope", lambda: reader.files.create(file=b"x", purpose="fine-tune")),
        (openai.NotFoundError, "file_not_found", lambda: client.files.retrieve("file-none")),
        (openai.NotFoundError, "fine_tuning_job_not_found", lambda: client.fine_tuning.jobs.retrieve("ftjob-none")),
        (openai.NotFoundError, "upload_not_found", lambda: client.uploads.cancel("upload-none")),
        (openai.NotFoundError, "model_not_found", lambda: client.models.retrieve("org/none")),
        (openai.ConflictError, "job_already_ended", lambda: client.fine_tuning.jobs.cancel(ended_job.id)),
        (openai.ConflictError, "job_already_ended", lambda: client.fine_tuning.jobs.pause(ended_job.id)),
    ]  # fmt: skip
    for exception, code, call in cases:
        with pytest.raises(exception) as raised:
            call()
        assert raised.value.code == code
    reader.close()
    unauthenticated.close()


async def check_concurrent_requests(service: Running, folder: Path) -> None:
    """The async client: concurrent parts, two concurrent jobs, and an iteration over pages."""
    async with AsyncOpenAI(
        base_url=service.url, api_key=service.key, _strict_response_validation=True, max_retries=0
    ) as client:
        content = (folder / "train.jsonl").read_bytes()
        upload = await client.uploads.create(
            filename="a.jsonl", purpose="fine-tune", bytes=len(content), mime_type="text/jsonl"
        )
        size = len(content) // 4 + 1
        pieces = [content[start : start + size] for start in range(0, len(content), size)]
        parts = await asyncio.gather(*(client.uploads.parts.create(upload.id, data=piece) for piece in pieces))
        completed = await client.uploads.complete(upload.id, part_ids=[part.id for part in parts])
        assert completed.file is not None
        file_id = completed.file.id
        jobs = await asyncio.gather(
            *(client.fine_tuning.jobs.create(model="tiny", training_file=file_id, extra_body=SHORT) for _ in range(2))
        )
        assert jobs[0].id != jobs[1].id
        cancelled = await asyncio.gather(*(client.fine_tuning.jobs.cancel(job.id) for job in jobs))
        assert {job.status for job in cancelled} == {"cancelled"}
        events: AsyncIterator[Any] = aiter(client.fine_tuning.jobs.list_events(jobs[0].id, limit=1))
        assert len([event async for event in events]) >= 2
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve("file-none")
        assert (await client.files.delete(file_id)).deleted

"""Extensions of the API on a real service: pauses, timeouts, gates, estimates, reports, streams, merges and wandb."""

import hashlib
import json
import threading
from pathlib import Path

import httpx2
import pytest
from transformers import AutoModelForCausalLM

from tests.helpers.preferences import pairs, write
from tests.helpers.service import (
    Running,
    busy_trainer_pid,
    create_job,
    frozen_until_sigterm,
    get_when_ready,
    job_body,
    trainer_pids,
)


def adapter_hash(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_a_pause_frees_the_gpu_and_changes_no_bit(service_on_servers: Running, tmp_path: Path) -> None:
    service = service_on_servers
    with service.http() as http:
        client = service.openai()
        file = client.files.create(file=write(tmp_path / "train.jsonl", pairs(64, seed=1)), purpose="fine-tune")
        body = job_body(file.id, hyperparameters={"max_steps": 200, "eval_every": 200})
        estimate = get_when_ready(http, "POST", "/fine_tuning/estimate", json=body).json()
        assert estimate["ok"] and estimate["fits"] and estimate["device"]["kind"] == "cpu"
        assert [stage["steps"] for stage in estimate["stages"]] == [5, 200]

        plain_id = create_job(http, **body)
        plain = service.wait_for(plain_id, lambda state: state["status"] == "succeeded")
        estimated_tokens = sum(stage["tokens"] for stage in estimate["stages"])
        assert plain["trained_tokens"] == pytest.approx(estimated_tokens, rel=0.02)
        assert (
            service.dpo("models", "download", plain["fine_tuned_model"], "--output", str(tmp_path / "plain")).returncode
            == 0
        )

        paused_id = create_job(http, **body)
        service.wait_for(paused_id, lambda state: bool(state["progress"]) and state["progress"]["step"] >= 8)
        with frozen_until_sigterm(busy_trainer_pid(service.home)):
            assert client.fine_tuning.jobs.pause(paused_id).id == paused_id
        paused = service.wait_for(paused_id, lambda state: state["status"] == "queued" and state["paused"])
        assert not trainer_pids(service.home) and paused["queue_position"] is None
        assert client.fine_tuning.jobs.checkpoints.list(paused_id).data, "a checkpoint for the resume"

        # Meanwhile the GPU is free for other jobs.
        other_id = create_job(
            http, **job_body(file.id, hyperparameters={"max_steps": 2}, gates=[{"metric": "loss", "max": 0.0001}])
        )
        watched = service.dpo("jobs", "watch", other_id, "--json")
        assert watched.returncode == 4, watched.stderr
        (gate,) = json.loads(watched.stdout)["gates"]
        assert gate["met"] is False and gate["value"] > 0.0001
        assert service.job(other_id)["fine_tuned_model"], "the model is kept although a gate is not met"

        assert client.fine_tuning.jobs.resume(paused_id).id == paused_id
        resumed = service.wait_for(paused_id, lambda state: state["status"] == "succeeded")
        assert resumed["attempt"] == plain["attempt"] + 1
        assert (
            service.dpo(
                "models", "download", resumed["fine_tuned_model"], "--output", str(tmp_path / "resumed")
            ).returncode
            == 0
        )
        assert adapter_hash(tmp_path / "resumed") == adapter_hash(tmp_path / "plain")

        merged = service.dpo(
            "models", "download", plain["fine_tuned_model"], "--merged", "--output", str(tmp_path / "merged")
        )
        assert merged.returncode == 0, merged.stderr
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.dtype is not None
        report = json.loads(service.dpo("files", "report", file.id, "--model", "tiny", "--json").stdout)
        assert report["kept"] == 64 and report["tokens"]["samples"][0]["prompt"].endswith(": ")
        second_estimate = get_when_ready(http, "POST", "/fine_tuning/estimate", json=job_body(file.id)).json()
        assert second_estimate["pace"]["jobs"] >= 2 and second_estimate["seconds"] > 0


def test_a_job_past_its_timeout_fails_and_keeps_its_checkpoint(service: Running, tmp_path: Path) -> None:
    client = service.openai()
    with service.http() as http:
        file = client.files.create(file=write(tmp_path / "train.jsonl", pairs(40, seed=1)), purpose="fine-tune")
        for seconds in (3, 10, 30, 90):  # a slow machine needs longer until the first checkpoint
            endless = {"max_steps": 100_000, "eval_every": 100_000}
            job_id = create_job(http, **job_body(file.id, hyperparameters=endless, timeout_seconds=seconds))
            service.until(lambda: service.job(job_id)["status"] == "failed", "the timeout")  # noqa: B023
            failed = service.job(job_id)
            assert failed["error"]["code"] == "timeout_exceeded" and failed["error"]["param"] == "timeout_seconds"
            assert not trainer_pids(service.home)
            checkpoints = client.fine_tuning.jobs.checkpoints.list(job_id).data
            if checkpoints:
                break
        assert checkpoints
        next_id = create_job(
            http,
            **job_body(file.id, hyperparameters={"max_steps": 1})
            | {"model": checkpoints[0].fine_tuned_model_checkpoint},
        )
        service.wait_for(next_id, lambda state: state["status"] == "succeeded")


def test_a_stream_follows_a_job_from_its_beginning_to_its_end(service: Running, tmp_path: Path) -> None:
    """The first stream is cut in the middle, and a second continues it. Each event comes once, in order."""
    with service.http() as http:
        file = service.openai().files.create(
            file=write(tmp_path / "train.jsonl", pairs(40, seed=1)), purpose="fine-tune"
        )
        job_id = create_job(http, **job_body(file.id))
        url = http.post(f"/fine_tuning/jobs/{job_id}/stream_token").json()["url"]
        event_ids: list[str] = []
        statuses: list[str] = []

        def follow(client: httpx2.Client, target: str, headers: dict[str, str], limit: int) -> None:
            with client.stream("GET", target, headers=headers, timeout=120) as answer:
                event_type, event_id = "", None
                for line in answer.iter_lines():
                    field, _, value = line.partition(": ")
                    if field == "event":
                        event_type = value
                    elif field == "id":
                        event_id = value
                    elif field == "data" and event_type == "job":
                        statuses.append(json.loads(value)["status"])
                    elif not line and event_id:
                        event_ids.append(event_id)
                        event_id = None
                        if len(event_ids) == limit:
                            return

        with httpx2.Client() as browser:
            follow(browser, str(httpx2.URL(service.url).join(url)), {}, 6)
        assert len(event_ids) == 6
        follow(http, f"/fine_tuning/jobs/{job_id}/stream", {"Last-Event-ID": event_ids[-1]}, -1)
        listed_ids = [event.id for event in service.openai().fine_tuning.jobs.list_events(job_id, limit=200)][::-1]
        assert event_ids == listed_ids
        assert statuses[-1] == "succeeded" and "running" in statuses
        series = http.get(f"/fine_tuning/jobs/{job_id}/metrics").json()
        assert [point["step"] for point in series["series"]["loss"]] == list(range(1, 46))


def test_one_api_process_serves_two_hundred_streams(service: Running, tmp_path: Path) -> None:
    with service.http() as http:
        file = service.openai().files.create(
            file=write(tmp_path / "train.jsonl", pairs(40, seed=1)), purpose="fine-tune"
        )
        job_id = create_job(http, **job_body(file.id))
        http.post(f"/fine_tuning/jobs/{job_id}/pause")
        last_events: list[str] = []
        opened = threading.Semaphore(0)

        def follow() -> None:
            last_event = ""
            with (
                service.http() as client,
                client.stream("GET", f"/fine_tuning/jobs/{job_id}/stream", timeout=180) as answer,
            ):
                opened.release()
                for line in answer.iter_lines():
                    if line.startswith("event: "):
                        last_event = line
            last_events.append(last_event)

        threads = [threading.Thread(target=follow, daemon=True) for _ in range(200)]
        for thread in threads:
            thread.start()
        for _ in threads:
            assert opened.acquire(timeout=60)
        assert http.get(f"/fine_tuning/jobs/{job_id}").status_code == 200, "the API still answers"
        http.post(f"/fine_tuning/jobs/{job_id}/cancel")
        for thread in threads:
            thread.join(60)
        assert last_events == ["event: job"] * 200


def test_wandb_gets_the_metrics(service: Running, tmp_path: Path) -> None:
    """wandb runs offline, so it writes its data to a file."""
    with service.http() as http:
        file = service.openai().files.create(
            file=write(tmp_path / "train.jsonl", pairs(40, seed=1)), purpose="fine-tune"
        )
        wandb = [{"type": "wandb", "wandb": {"project": "tests", "tags": ["ci"]}}]
        job_id = create_job(http, **job_body(file.id, integrations=wandb, hyperparameters={"max_steps": 3}))
        job = service.wait_for(job_id, lambda state: state["status"] == "succeeded")
        assert job["integrations"][0]["wandb"]["project"] == "tests"
    # On a busy machine wandb starts after the job has ended, which does not wait for it.
    pattern = f"*{job_id}*.wandb"
    service.until(lambda: any(file.stat().st_size for file in service.home.rglob(pattern)), "the file of the run")


def test_the_dataset_check_needs_no_service(service: Running, tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", [*pairs(12, seed=1), {"prompt": "x", "chosen": "a", "rejected": "a"}])
    check = service.dpo("files", "check", str(path), "--model", "tiny", "--json")
    assert check.returncode == 0, check.stderr
    report = json.loads(check.stdout)
    assert report["dropped"] == {"identical_responses": 1} and report["tokens"]["sampled_rows"] == 12
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": 1}\n')
    bad_check = service.dpo("files", "check", str(tmp_path / "bad.jsonl"))
    assert bad_check.returncode == 1 and "Line 2" in bad_check.stdout
    table = tmp_path / "t.csv"
    table.write_text("q,good,bad\none,a,b\n")
    mapping = json.dumps({"prompt": "{q}?", "chosen": "good", "rejected": "bad"})
    assert service.dpo("files", "check", str(table), "--mapping", mapping).returncode == 0
    assert service.dpo("files", "check", str(table)).returncode == 1
    uploaded = service.dpo("files", "upload", str(table), "--mapping", mapping, "--expires-in", "3600", "--json")
    assert json.loads(uploaded.stdout)["expires_at"] is not None


def test_a_prune_deletes_no_recent_object(service: Running, tmp_path: Path) -> None:
    with service.openai() as client:
        client.files.create(file=write(tmp_path / "train.jsonl", pairs(4, seed=1)), purpose="fine-tune")
    prune = service.dpo("storage", "prune", "--delete", "--json")
    report = json.loads(prune.stdout)
    assert report["needed"] >= 1 and (report["not_needed"], report["deleted"]) == (0, True)
    assert "objects needed, 0 not needed" in service.dpo("storage", "prune").stdout

"""What the service adds, through real processes: pauses, deadlines, gates, estimates, reports, streams, merges, wandb."""

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import httpx2
import pytest
from transformers import AutoModelForCausalLM

from tests.helpers.preferences import pairs, write
from tests.helpers.servers import wait_until
from tests.helpers.service import (
    Running,
    body,
    create,
    held_until_asked_to_stop,
    trainer_at_work,
    trainers,
)


def adapter_hash(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def ready(client: httpx2.Client, method: str, path: str, **options: Any) -> httpx2.Response:
    """The answer, once it is not 202."""
    found: list[httpx2.Response] = []

    def look() -> bool:
        found.append(client.request(method, path, **options))
        return found[-1].status_code != 202

    wait_until(look, path)
    assert found[-1].status_code == 200, found[-1].text
    return found[-1]


def test_a_pause_frees_the_gpu_and_changes_no_bit(service_on_servers: Running, tmp_path: Path) -> None:
    service = service_on_servers
    with service.http() as http:
        official = service.openai()
        file = official.files.create(file=write(tmp_path / "train.jsonl", pairs(64, seed=1)), purpose="fine-tune")
        long = body(file.id, hyperparameters={"max_steps": 200, "eval_every": 200})
        estimate = ready(http, "POST", "/fine_tuning/estimate", json=long).json()
        assert estimate["ok"] and estimate["fits"] and estimate["device"]["kind"] == "cpu"
        assert [stage["steps"] for stage in estimate["stages"]] == [5, 200]

        plain = create(http, **long)
        done = service.wait_for(plain, lambda seen: seen["status"] == "succeeded")
        expected = sum(stage["tokens"] for stage in estimate["stages"])
        assert done["trained_tokens"] == pytest.approx(expected, rel=0.02)
        assert (
            service.dpo("models", "download", done["fine_tuned_model"], "--output", str(tmp_path / "plain")).returncode
            == 0
        )

        paused = create(http, **long)
        service.wait_for(paused, lambda seen: bool(seen["progress"]) and seen["progress"]["step"] >= 8)
        with held_until_asked_to_stop(trainer_at_work(service.home)):
            assert official.fine_tuning.jobs.pause(paused).id == paused
        held = service.wait_for(paused, lambda seen: seen["status"] == "queued" and seen["paused"])
        assert not trainers(service.home) and held["queue_position"] is None
        assert official.fine_tuning.jobs.checkpoints.list(paused).data, "it has where to go on from"

        # The GPU is free for others meanwhile.
        other = create(
            http, **body(file.id, hyperparameters={"max_steps": 2}, gates=[{"metric": "loss", "max": 0.0001}])
        )
        watched = service.dpo("jobs", "watch", other, "--json")
        assert watched.returncode == 4, watched.stderr
        (verdict,) = json.loads(watched.stdout)["gates"]
        assert verdict["met"] is False and verdict["value"] > 0.0001
        assert service.job(other)["fine_tuned_model"], "a gate that is not met keeps the model"

        assert official.fine_tuning.jobs.resume(paused).id == paused
        resumed = service.wait_for(paused, lambda seen: seen["status"] == "succeeded")
        assert resumed["attempt"] == done["attempt"] + 1
        assert (
            service.dpo(
                "models", "download", resumed["fine_tuned_model"], "--output", str(tmp_path / "resumed")
            ).returncode
            == 0
        )
        assert adapter_hash(tmp_path / "resumed") == adapter_hash(tmp_path / "plain")

        merged = service.dpo(
            "models", "download", done["fine_tuned_model"], "--merged", "--output", str(tmp_path / "merged")
        )
        assert merged.returncode == 0, merged.stderr
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.dtype is not None
        report = json.loads(service.dpo("files", "report", file.id, "--model", "tiny", "--json").stdout)
        assert report["kept"] == 64 and report["tokens"]["samples"][0]["prompt"].endswith(": ")
        later = ready(http, "POST", "/fine_tuning/estimate", json=body(file.id)).json()
        assert later["pace"]["jobs"] >= 2 and later["seconds"] > 0


def test_a_job_past_its_time_fails_and_keeps_its_checkpoint(service: Running, tmp_path: Path) -> None:
    official = service.openai()
    with service.http() as http:
        file = official.files.create(file=write(tmp_path / "train.jsonl", pairs(40, seed=1)), purpose="fine-tune")
        for seconds in (3, 10, 30, 90):  # it would train for hours; how long its start takes is the machine's
            endless = {"max_steps": 100_000, "eval_every": 100_000}
            job_id = create(http, **body(file.id, hyperparameters=endless, timeout_seconds=seconds))
            service.until(lambda: service.job(job_id)["status"] == "failed", "the end of its time")  # noqa: B023
            failed = service.job(job_id)
            assert failed["error"]["code"] == "timeout_exceeded" and failed["error"]["param"] == "timeout_seconds"
            assert not trainers(service.home)
            checkpoints = official.fine_tuning.jobs.checkpoints.list(job_id).data
            if checkpoints:
                break
        assert checkpoints
        again = create(
            http,
            **body(file.id, hyperparameters={"max_steps": 1}) | {"model": checkpoints[0].fine_tuned_model_checkpoint},
        )
        service.wait_for(again, lambda seen: seen["status"] == "succeeded")


def test_a_stream_follows_a_job_from_its_beginning_to_its_end(service: Running, tmp_path: Path) -> None:
    """Cut in the middle, gone on with by another; an event comes once, in its order."""
    with service.http() as http:
        file = service.openai().files.create(
            file=write(tmp_path / "train.jsonl", pairs(40, seed=1)), purpose="fine-tune"
        )
        job_id = create(http, **body(file.id))
        url = http.post(f"/fine_tuning/jobs/{job_id}/stream_token").json()["url"]
        seen: list[str] = []
        states: list[str] = []

        def follow(client: httpx2.Client, target: str, headers: dict[str, str], limit: int) -> None:
            with client.stream("GET", target, headers=headers, timeout=120) as answer:
                kind, event_id = "", None
                for line in answer.iter_lines():
                    field, _, value = line.partition(": ")
                    if field == "event":
                        kind = value
                    elif field == "id":
                        event_id = value
                    elif field == "data" and kind == "job":
                        states.append(json.loads(value)["status"])
                    elif not line and event_id:
                        seen.append(event_id)
                        event_id = None
                        if len(seen) == limit:
                            return

        with httpx2.Client() as browser:
            follow(browser, str(httpx2.URL(service.url).join(url)), {}, 6)
        assert len(seen) == 6
        follow(http, f"/fine_tuning/jobs/{job_id}/stream", {"Last-Event-ID": seen[-1]}, -1)
        listed = [event.id for event in service.openai().fine_tuning.jobs.list_events(job_id, limit=200)][::-1]
        assert seen == listed
        assert states[-1] == "succeeded" and "running" in states
        series = http.get(f"/fine_tuning/jobs/{job_id}/metrics").json()
        assert [point["step"] for point in series["series"]["loss"]] == list(range(1, 46))


def test_two_hundred_streams_on_one_api_process(service: Running, tmp_path: Path) -> None:
    with service.http() as http:
        file = service.openai().files.create(
            file=write(tmp_path / "train.jsonl", pairs(40, seed=1)), purpose="fine-tune"
        )
        job_id = create(http, **body(file.id))
        http.post(f"/fine_tuning/jobs/{job_id}/pause")
        ended: list[str] = []
        opened = threading.Semaphore(0)

        def follow() -> None:
            last = ""
            with (
                service.http() as client,
                client.stream("GET", f"/fine_tuning/jobs/{job_id}/stream", timeout=180) as answer,
            ):
                opened.release()
                for line in answer.iter_lines():
                    if line.startswith("event: "):
                        last = line
            ended.append(last)

        threads = [threading.Thread(target=follow, daemon=True) for _ in range(200)]
        for thread in threads:
            thread.start()
        for _ in threads:
            assert opened.acquire(timeout=60)
        assert http.get(f"/fine_tuning/jobs/{job_id}").status_code == 200, "the API still answers"
        http.post(f"/fine_tuning/jobs/{job_id}/cancel")
        for thread in threads:
            thread.join(60)
        assert ended == ["event: job"] * 200


def test_wandb_gets_the_metrics(service: Running, tmp_path: Path) -> None:
    """Offline: what would be sent is written, by wandb itself."""
    with service.http() as http:
        file = service.openai().files.create(
            file=write(tmp_path / "train.jsonl", pairs(40, seed=1)), purpose="fine-tune"
        )
        wandb = [{"type": "wandb", "wandb": {"project": "tests", "tags": ["ci"]}}]
        job_id = create(http, **body(file.id, integrations=wandb, hyperparameters={"max_steps": 3}))
        done = service.wait_for(job_id, lambda seen: seen["status"] == "succeeded")
        assert done["integrations"][0]["wandb"]["project"] == "tests"
    (written,) = service.home.rglob(f"*{job_id}*.wandb")
    assert written.stat().st_size > 0


def test_the_dataset_check_needs_no_service(service: Running, tmp_path: Path) -> None:
    rows = write(tmp_path / "pairs.jsonl", [*pairs(12, seed=1), {"prompt": "x", "chosen": "a", "rejected": "a"}])
    done = service.dpo("files", "check", str(rows), "--model", "tiny", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["dropped"] == {"identical_responses": 1} and found["tokens"]["sampled_rows"] == 12
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": 1}\n')
    bad = service.dpo("files", "check", str(tmp_path / "bad.jsonl"))
    assert bad.returncode == 1 and "Line 2" in bad.stdout
    table = tmp_path / "t.csv"
    table.write_text("q,good,bad\none,a,b\n")
    mapping = json.dumps({"prompt": "{q}?", "chosen": "good", "rejected": "bad"})
    assert service.dpo("files", "check", str(table), "--mapping", mapping).returncode == 0
    assert service.dpo("files", "check", str(table)).returncode == 1
    uploaded = service.dpo("files", "upload", str(table), "--mapping", mapping, "--expires-in", "3600", "--json")
    assert json.loads(uploaded.stdout)["expires_at"] is not None


def test_a_sweep_finds_nothing_that_is_young(service: Running, tmp_path: Path) -> None:
    with service.openai() as client:
        client.files.create(file=write(tmp_path / "train.jsonl", pairs(4, seed=1)), purpose="fine-tune")
    done = service.dpo("storage", "prune", "--delete", "--json")
    found = json.loads(done.stdout)
    assert found["needed"] >= 1 and (found["not_needed"], found["deleted"]) == (0, True)
    assert "objects needed, 0 not needed" in service.dpo("storage", "prune").stdout

"""The surroundings that users and platforms give the service: the folder where it is started, and its environment."""

from pathlib import Path

import pytest
from openai import OpenAI

from tests.helpers.preferences import pairs, write
from tests.helpers.preload import needs_compiler, preloaded, wrong_clock
from tests.helpers.servers import postgres
from tests.helpers.service import create_job, job_body, running, upload
from tests.helpers.tiny_model import make_tiny_model
from tests.helpers.webhook_receiver import webhook_receiver

OWN_MODULES = ("app", "worker", "migrations", "torch", "transformers", "celery", "structlog", "json")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A DPO_HOME with signs in its name that have a meaning in URLs, and a space."""
    folder = tmp_path / "a b?c#d%20e&f"
    make_tiny_model(folder / "models" / "tiny")
    return folder


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A user's folder with modules of the same names as ours and our libraries'. Each leaves a mark if it is run."""
    folder = tmp_path / "repository"
    for name in OWN_MODULES:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"open({str(folder / 'ran')!r}, 'a').write('{name} ')")
    return folder


@needs_compiler
def test_a_home_may_have_any_name_and_no_links_and_no_code_of_the_callers_folder_is_run(
    home: Path, repository: Path, tmp_path: Path
) -> None:
    """`dpo serve`, started in a user's folder, checks files and trains."""
    environment = preloaded("no_links.c", tmp_path) | {"NO_LINKS": str(home)}
    with running(home, environment, folder=repository) as service:
        file = upload(service, _pairs(tmp_path), "fine-tune")
        with service.http() as client:
            job_id = create_job(client, **job_body(file, hyperparameters={"max_steps": 5}))
        job = service.wait_for(job_id, lambda job: job["status"] == "succeeded")
        adapter = str(tmp_path / "adapter")
        assert service.dpo("models", "download", job["fine_tuned_model"], "--output", adapter).returncode == 0
    assert not (repository / "ran").exists()
    assert {path.name for path in tmp_path.iterdir()} == {
        home.name,
        "repository",
        "pairs.jsonl",
        "adapter",
        "no_links.so",
    }


@needs_compiler
def test_a_host_whose_clock_is_wrong_signs_what_others_accept(home: Path, tmp_path: Path) -> None:
    """The hosts of the service are ten minutes off, and the database is not. Webhooks and stream tokens are good."""
    clock = wrong_clock(-600, tmp_path)
    with postgres() as database, webhook_receiver() as receiver:
        settings = {**clock, "DPO_DATABASE_URL": database, "DPO_PRIVATE_WEBHOOKS": "localhost:*"}
        with running(home, settings) as service, service.http() as client:
            webhook = client.post("/webhooks", json={"url": receiver.url}).raise_for_status().json()
            job_id = create_job(client, **job_body(upload(service, _pairs(tmp_path), "fine-tune")))
            token = client.post(f"/fine_tuning/jobs/{job_id}/stream_token").raise_for_status().json()
            with client.stream("GET", service.url.removesuffix("/v1") + token["url"]) as stream:
                assert stream.status_code == 200
            client.post(f"/fine_tuning/jobs/{job_id}/cancel").raise_for_status()
            service.until(lambda: receiver.got, "the webhook")
    headers, body = receiver.got[0]
    event = OpenAI(api_key="x", webhook_secret=webhook["secret"]).webhooks.unwrap(body, headers)
    assert event.type == "fine_tuning.job.cancelled" and event.data.id == job_id


def _pairs(folder: Path) -> Path:
    return write(folder / "pairs.jsonl", pairs(24, seed=1))

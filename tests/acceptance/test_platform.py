"""What users and platforms put around the service: the folder where it is started, and its environment."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.preferences import pairs, write
from tests.helpers.service import DPO, create_job, job_body, running, upload

OWN_MODULES = ("app", "worker", "migrations", "torch", "transformers", "celery", "structlog", "json")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A user's folder with modules of the same names as ours and our libraries'. Each leaves a mark if it is run."""
    folder = tmp_path / "repository"
    for name in OWN_MODULES:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"open({str(folder / 'ran')!r}, 'a').write('{name} ')")
    return folder


def test_no_code_of_the_folder_where_it_is_started_is_run(home: Path, repository: Path, tmp_path: Path) -> None:
    """`dpo serve` checks files, trains and merges there, and `dpo train` trains there too."""
    with running(home, folder=repository) as service:
        file = upload(service, write(tmp_path / "pairs.jsonl", pairs(24, seed=1)), "fine-tune")
        with service.http() as client:
            job_id = create_job(client, **job_body(file, hyperparameters={"max_steps": 5}))
        job = service.wait_for(job_id, lambda job: job["status"] == "succeeded")
        model, merged = job["fine_tuned_model"], str(tmp_path / "merged")
        done = service.dpo("models", "download", model, "--merged", "--output", merged)
        assert done.returncode == 0, done.stderr
    spec = job_body(str(tmp_path / "pairs.jsonl"), hyperparameters={"max_steps": 5})
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    trained = subprocess.run(
        [DPO, "train", str(tmp_path / "spec.json"), "--output", str(tmp_path / "adapter")],
        cwd=repository, env=os.environ | {"DPO_HOME": str(home)}, capture_output=True, text=True,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert not (repository / "ran").exists()

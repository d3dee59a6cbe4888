"""What may import what: checked in a fresh interpreter, by what is loaded."""

import subprocess
import sys

import pytest


def loaded_by(module: str) -> set[str]:
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["app.main", "app.cli.main"])
def test_the_api_and_the_cli_import_neither_torch_nor_the_worker(module: str) -> None:
    assert loaded_by(module).isdisjoint({"torch", "transformers", "peft", "worker"})


def test_the_worker_process_does_not_import_torch() -> None:
    """Nothing may fork, or hold the GPU, but the trainer."""
    assert loaded_by("worker.celery_app").isdisjoint({"torch", "transformers", "peft"})


def test_the_trainer_knows_no_database_no_http_and_no_celery() -> None:
    loaded = loaded_by("worker.trainer.loop")
    assert loaded.isdisjoint({"sqlalchemy", "fastapi", "celery", "obstore", "pydantic_settings"})

"""Where a worker keeps what it works on."""

from pathlib import Path

from app.services import Services


def work_folder(services: Services) -> Path:
    """A folder for the folders of jobs and tasks."""
    folder = services.settings.home / "work"
    folder.mkdir(parents=True, exist_ok=True)
    return folder

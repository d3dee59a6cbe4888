"""The folder in which a worker keeps its temporary files."""

from pathlib import Path

from app.services import Services


def work_folder(services: Services) -> Path:
    """The folder that holds the temporary folders of jobs and artifacts. It is created if it is missing."""
    folder = services.settings.home / "work"
    folder.mkdir(parents=True, exist_ok=True)
    return folder

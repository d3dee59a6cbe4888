"""The CPU lane in this process."""

import threading

from app.derived_artifacts import repository as artifacts
from app.services import Services
from tests.helpers.reader import READER
from worker.base_models import BaseModels
from worker.derived_artifacts import make_artifact


def work(services: Services) -> int:
    """Make all waiting artifacts, as the CPU lane does. Returns their number."""
    base_models = BaseModels(services.settings)
    count = 0
    while True:
        with services.database.write() as session:
            task = artifacts.claim(session, "test", list(base_models.folders()))
        if task is None:
            return count
        make_artifact(services, base_models, READER, task, threading.Event())
        count += 1

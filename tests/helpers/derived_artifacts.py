"""The CPU lane in this process."""

from app.derived_artifacts import repository as artifacts
from app.services import Services
from worker.base_models import BaseModels
from worker.derived_artifacts import make_artifact


def work(services: Services) -> int:
    """Do all that is waiting, as the CPU lane does; returns how much it was."""
    found = BaseModels(services.settings)
    done = 0
    while True:
        with services.database.write() as session:
            task = artifacts.claim(session, "test", list(found.folders()))
        if task is None:
            return done
        make_artifact(services, found, task)
        done += 1

"""A lane's loop: look for a job, run it, look again. Wake-ups only make it look sooner."""

import os
import socket
import threading
import time

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app.broker import Lane
from app.jobs import repository
from app.jobs.states import Status
from app.models import repository as models
from app.services import Services
from worker.base_models import BaseModels
from worker.housekeeping import keep_house
from worker.runner import Run
from worker.validator import validate

log = structlog.get_logger(__name__)

LOOK_SECONDS = 2.0
REGISTER_SECONDS = 30.0


class LaneWorker:
    """The threads of one worker process: one that works, one that keeps house."""

    def __init__(self, services: Services, lane: Lane) -> None:
        self.services, self.lane = services, lane
        self.base_models = BaseModels(services.settings)
        self.owner = f"{lane.value}@{socket.gethostname()}:{os.getpid()}"
        self.stopping = threading.Event()
        self._bell = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name=f"{lane.value}-lane"),
            threading.Thread(target=self._keep_house, name="housekeeping"),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def ring(self) -> None:
        """A wake-up came."""
        self._bell.set()

    def stop(self) -> None:
        """Drain: a running trainer writes a checkpoint, and its job goes back to the queue."""
        self.stopping.set()
        self._bell.set()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while not self.stopping.is_set():
            try:
                while not self.stopping.is_set() and self._work_once():
                    pass
            except SQLAlchemyError as error:
                log.warning("database out of reach", reason=str(error))
            except Exception as error:  # one job's trouble must not end the lane
                log.error("unexpected error in the lane", exc_info=error)
            self._bell.wait(LOOK_SECONDS)
            self._bell.clear()

    def _work_once(self) -> bool:
        """Claim and run one job; False where there is none."""
        if self.lane == Lane.CPU:
            with self.services.database.write() as session:
                job = repository.claim(session, Status.VALIDATING, self.owner)
            if job is not None:
                validate(self.services, job)
            return job is not None
        served = self.base_models.served()
        with self.services.database.write() as session:
            job = repository.claim(session, Status.QUEUED, self.owner, served)
        if job is not None:
            Run(self.services, self.base_models, job, self.stopping).run()
        return job is not None

    def _keep_house(self) -> None:
        registered = -REGISTER_SECONDS
        while not self.stopping.is_set():
            try:
                keep_house(self.services)
                if self.lane == Lane.GPU and time.monotonic() - registered >= REGISTER_SECONDS:
                    self._register()
                    registered = time.monotonic()
            except Exception as error:  # whatever it is, the next round may do better
                log.warning("housekeeping failed", reason=str(error))
            self.stopping.wait(LOOK_SECONDS)

    def _register(self) -> None:
        """Tell the API which base models there are."""
        found = self.base_models.local()
        with self.services.database.write() as session:
            for model in found:
                models.register(session, model.name, model.revision, model.details)
            for pattern in self.base_models.patterns:
                models.register_hub(session, pattern)

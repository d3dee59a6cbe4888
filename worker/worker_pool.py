"""A lane's loop: look for a job, run it, look again. Wake-ups only make it look sooner."""

import gc
import os
import socket
import threading
import time
from contextlib import suppress

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app.broker import Lane
from app.derived_artifacts import repository as artifacts
from app.jobs import queue as job_queue
from app.jobs.kinds import EVALUATION, TRAINING
from app.jobs.states import Status
from app.models import repository as models
from app.services import Services
from app.workers import repository as workers
from worker import integrations
from worker.base_models import BaseModels
from worker.derived_artifacts import make_artifact
from worker.device import device
from worker.evaluation_run import Evaluation
from worker.housekeeping import clear_out, forget, keep_house
from worker.processes import ForkServer
from worker.reaper import Reaper
from worker.training_run import Training
from worker.validator import validate
from worker.webhooks import Sender

log = structlog.get_logger(__name__)

ATTEMPTS: dict[str, type[Training | Evaluation]] = {TRAINING.name: Training, EVALUATION.name: Evaluation}
"""The attempt at a job, by its kind."""
LOOK_SECONDS = 2.0
"""An idle worker looks by itself so often, should a wake-up be lost; so often it keeps house."""
REGISTER_SECONDS = 30.0
PRUNE_SECONDS = 3600.0


class WorkerPool:
    """The threads of one worker process: one that works, one that keeps house, one that takes leases of the lost."""

    def __init__(self, services: Services, lane: Lane) -> None:
        self.services, self.lane = services, lane
        self.base_models = BaseModels(services.settings)
        self.owner = f"{lane.value}@{socket.gethostname()}:{os.getpid()}"
        self.device = device() if lane == Lane.GPU else None
        self.stopping = threading.Event()
        self.fork_server = ForkServer()
        self._bell = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name=f"{lane.value}-lane"),
            threading.Thread(target=self._keep_house, name="housekeeping"),
            threading.Thread(target=self._reap, name="reaper"),
        ]
        if lane == Lane.CPU:
            self._threads.append(
                threading.Thread(target=Sender(services, self.stopping, self.owner).run, name="webhooks")
            )

    def start(self) -> None:
        for thread in self._threads:
            thread.start()
        if self.lane == Lane.CPU:  # not waited for at the end: pruning may end anywhere
            threading.Thread(target=self._prune, name="pruner", daemon=True).start()

    def ring(self) -> None:
        """A wake-up came."""
        log.debug("woken", lane=self.lane)
        self._bell.set()

    def stop(self) -> None:
        """Drain: a running trainer writes a checkpoint, and its job goes back to the queue."""
        self.stopping.set()
        self._bell.set()

    def join(self) -> None:
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def _work(self) -> None:
        while not self.stopping.is_set():
            try:
                while not self.stopping.is_set() and self._work_once():
                    # What a job leaves in cycles would stay until the next full collection, which is jobs away.
                    gc.collect()
            except SQLAlchemyError as error:
                log.warning("database out of reach", reason=str(error))
            except Exception as error:  # one job's trouble must not end the lane
                log.error("unexpected error in the lane", exc_info=error)
            self._bell.wait(LOOK_SECONDS)
            self._bell.clear()
        self.fork_server.close()

    def _work_once(self) -> bool:
        """Claim and run one job; False where there is none."""
        if self.lane == Lane.CPU:
            with self.services.database.write() as session:
                job = job_queue.claim(session, Status.VALIDATING, self.owner)
            if job is not None:
                validate(self.services, self.base_models, job)
                return True
            with self.services.database.write() as session:
                task = artifacts.claim(session, self.owner, self.base_models.served())
            if task is not None:
                make_artifact(self.services, self.base_models, task)
            return task is not None
        served = self.base_models.served()
        with self.services.database.write() as session:
            job = job_queue.claim(session, Status.QUEUED, self.owner, served)
        if job is not None:
            ATTEMPTS[job.kind](self.services, self.base_models, job, self.stopping, self.fork_server).run()
        if not self.stopping.is_set():
            self.fork_server.prepare()
        return job is not None

    def _keep_house(self) -> None:
        registered = -REGISTER_SECONDS
        while not self.stopping.is_set():
            try:
                keep_house(self.services)
                if time.monotonic() - registered >= REGISTER_SECONDS:
                    self._register()
                    registered = time.monotonic()
            except Exception as error:  # whatever it is, the next round may do better
                log.warning("housekeeping failed", reason=str(error))
            self.stopping.wait(LOOK_SECONDS)
        with suppress(SQLAlchemyError), self.services.database.write() as session:
            workers.leave(session, self.owner)

    def _reap(self) -> None:
        """In a thread of its own: an object store that hangs must not keep jobs from going on."""
        reaper = Reaper(self.services)
        while not self.stopping.is_set():
            try:
                reaper.look()
            except Exception as error:  # whatever it is, the next look may do better
                log.warning("leases could not be looked at", reason=str(error))
            self.stopping.wait(LOOK_SECONDS)

    def _prune(self) -> None:
        while not self.stopping.wait(PRUNE_SECONDS):
            for work in (forget, clear_out):
                try:
                    work(self.services)
                except Exception as error:  # the store or the database are away; the next round comes
                    log.warning("housekeeping failed", reason=str(error))

    def _register(self) -> None:
        """Tell the API who is here, on what device, and which base models there are."""
        gpu = self.lane == Lane.GPU
        found = self.base_models.local() if gpu else []
        serves = [*(model.name for model in found), *self.base_models.patterns] if gpu else []
        details = {"device": self.device, "integrations": integrations.configured()} if gpu else {}
        with self.services.database.write() as session:
            workers.report(session, self.owner, self.lane, serves, details)
            for model in found:
                models.register(session, model.name, model.revision, model.details)
            for pattern in self.base_models.patterns if gpu else ():
                models.register_hub(session, pattern)

"""The loop of a lane: look for a job, run it, look again. A wake-up only makes it look sooner."""

import gc
import math
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from itertools import pairwise

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app.broker import Lane
from app.derived_artifacts import repository as artifacts
from app.derived_artifacts.tables import DerivedArtifact
from app.jobs import queue as job_queue
from app.jobs.kinds import EVALUATION_JOB, LABELLING_JOB, TRAINING_JOB
from app.jobs.states import Status
from app.jobs.tables import Job
from app.models import repository as models
from app.operations.service import is_read_only, may_claim
from app.secret_rotation import require_known_key
from app.services import Services
from app.spec.json_types import JsonObject
from app.spec.version import SPEC_VERSION
from app.workers import repository as workers
from worker import integrations
from worker.base_models import BaseModels
from worker.cluster.health import ClusterHealth
from worker.derived_artifacts import make_artifact
from worker.device import Device, choose, on_machines, use_of, without
from worker.device_health import DeviceHealth
from worker.evaluation_run import Evaluation
from worker.housekeeping import (
    apply_retention,
    count_usage,
    keep_house,
    label_jobs,
    pack_events,
    prune_objects,
    retain_checkpoints,
)
from worker.labelling_run import Labelling
from worker.lease import AskedToStop
from worker.processes import ForkServer
from worker.reader.client import Reader
from worker.reaper import Reaper
from worker.store_health import StoreHealth
from worker.training_run import Training
from worker.validator import validate
from worker.webhooks import Sender
from worker.work import work_folder

log = structlog.get_logger(__name__)

ATTEMPTS: dict[str, type[Training | Evaluation | Labelling]] = {
    TRAINING_JOB.name: Training,
    EVALUATION_JOB.name: Evaluation,
    LABELLING_JOB.name: Labelling,
}
"""The class that runs a job, by the job's kind."""
POLL_SECONDS = 2.0
"""Interval at which an idle worker looks for work, in case a wake-up was lost. Housekeeping and reaper use it too."""
IDLE_SHARE = 0.001
"""The share of a core that a thread may take to look for work. A long queue takes longer to look at."""
MOST_POLL_SECONDS = 10.0
REGISTER_SECONDS = 30.0
"""Interval at which the worker registers itself and its base models."""
WORK_SECONDS, JOIN_SECONDS = 19.0, 3.0
"""How long after the stop the process waits for its work, which then has hung, and for its other threads."""
SLOTS = 4
"""Checks and artifacts that a worker of the CPU lane has in hand at a time. A project has one of them at most.

A file that takes long to read therefore delays its own project, and no other.
"""
ALIVE_SECONDS = 10.0
"""Interval of a worker's signs of life."""
CHORE_SECONDS = 30.0
"""Interval at which a worker looks whether old events and unneeded objects are to be removed."""


def _pause_after(began: float) -> float:
    """Seconds until a thread looks for work again. It has found none since `began`, a time by its own CPU clock."""
    return min(max(POLL_SECONDS, (time.thread_time() - began) / IDLE_SHARE), MOST_POLL_SECONDS)


class WorkerPool:
    """The threads of one worker process: work, housekeeping and reaper, and in the CPU lane also webhooks."""

    def __init__(self, services: Services, lane: Lane) -> None:
        self.services, self.lane = services, lane
        self.base_models = BaseModels(services.settings)
        self.owner = f"{lane.value}@{socket.gethostname()}:{os.getpid()}"
        self.stopping, self._stopped_at = threading.Event(), math.inf
        settings = services.settings
        self.health = (
            DeviceHealth("cpu", check=self._check)
            if lane == Lane.CPU
            else ClusterHealth(settings, self._check)
            if settings.ray_address
            else DeviceHealth(settings.device, settings.cpu_devices, self._check)
        )
        self.store_health = StoreHealth(services.storage)
        program, variables = ("worker.cluster", ("RAY_",)) if settings.ray_address else ("worker.trainer", ())
        self.fork_server, self.reader = ForkServer(program, variables=variables), Reader()
        self._shown: tuple[bool, tuple[int, ...]] = (True, ())
        """Whether the worker was usable, and its devices by machine, when others were told last."""
        self._key_is_known = False
        self._woken = threading.Event()
        self._in_hand: dict[threading.Thread, Job | DerivedArtifact] = {}
        """The work, by the thread that does it."""
        self._taken: dict[threading.Thread, list[Device]] = {}
        """The devices of each running job, by the thread that runs it until the job's last traces are tidied."""
        self._threads = [
            threading.Thread(target=self._work, name=f"{lane.value}-lane"),
            threading.Thread(target=self._keep_house, name="housekeeping", daemon=True),
            threading.Thread(target=self._reap, name="reaper", daemon=True),
            threading.Thread(target=self._live, name="sign of life", daemon=True),
        ]
        if lane == Lane.CPU:
            self._threads.append(
                threading.Thread(target=Sender(services, self.stopping, self.owner).run, name="webhooks")
            )

    def start(self) -> None:
        """Start all threads."""
        gc.collect()
        gc.freeze()  # what is imported stays alive: the collection after each job need not walk it
        for thread in self._threads:
            thread.start()
        if self.lane == Lane.CPU:  # a daemon: pruning may be interrupted at any point
            threading.Thread(target=self._prune, name="pruner", daemon=True).start()

    def wake_up(self) -> None:
        """Look for work now. Called for each wake-up message."""
        log.debug("woken", lane=self.lane)
        self._woken.set()

    def stop(self) -> None:
        """Begin to drain: a running trainer writes a checkpoint, and its job goes back to the queue."""
        self._stopped_at = time.monotonic()
        self.stopping.set()
        self._woken.set()

    def join(self) -> None:
        """Wait for the end of the threads, each for a bounded time. A server that hangs may hold them for minutes."""
        for thread in self._threads:
            seconds = WORK_SECONDS if thread is self._threads[0] else JOIN_SECONDS
            if thread.is_alive():
                thread.join(max(0.0, self._stopped_at + seconds - time.monotonic()))

    def _check(self) -> None:
        """Raise `AskedToStop` if the worker drains."""
        if self.stopping.is_set():
            raise AskedToStop

    def _work(self) -> None:
        if self.lane == Lane.CPU:
            self.reader.prepare()
        while not self.stopping.is_set():
            began = time.thread_time()
            try:
                while not self.stopping.is_set() and self._work_once():
                    began = time.thread_time()
            except AskedToStop:
                break
            except SQLAlchemyError as error:
                log.warning("database out of reach", reason=str(error))
            except Exception as error:  # an error in one job must not end the lane
                log.error("unexpected error in the lane", exc_info=error)
            self._woken.wait(_pause_after(began))
            self._woken.clear()
        for thread in list(self._in_hand):
            thread.join()
        self.fork_server.close()
        self.reader.close()
        self.health.close()

    def _work_once(self) -> bool:
        """Claim one job or artifact and do it, or begin it; False if there is none, or if this worker cannot do any."""
        if self.lane == Lane.CPU and len(self._in_hand) == SLOTS:
            return False
        if not self._key_is_known:
            require_known_key(self.services.database, self.services.secret_box)
            self._key_is_known = True
        with self.services.database.read() as session:
            if not may_claim(session, self.owner):
                return False
        if not self._usable():
            return False
        done = self._begin_check_or_artifact() if self.lane == Lane.CPU else self._begin_training_or_evaluation()
        if done:
            self.store_health.doubt()
        return done

    def _begin_check_or_artifact(self) -> bool:
        """Claim the check of a job's files or an artifact, and do it in a thread; False if there is none."""
        in_hand = list(self._in_hand.values())
        busy = {work.project for work in in_hand}
        work: Job | DerivedArtifact | None
        with self.services.database.write() as session:
            work = job_queue.claim(session, Status.VALIDATING, self.owner, busy=busy)
        if work is None:
            merges = any(isinstance(work, DerivedArtifact) and work.kind == artifacts.MERGE for work in in_hand)
            kinds = (artifacts.REPORT,) if merges else (artifacts.REPORT, artifacts.MERGE)
            with self.services.database.write() as session:
                work = artifacts.claim(session, self.owner, self.base_models.served(), kinds, busy)
        if work is None:
            return False
        shared = (self.services, self.base_models, self.reader)
        if isinstance(work, Job):
            self._begin(work, partial(validate, *shared, work, self.stopping))
        else:
            self._begin(work, partial(make_artifact, *shared, work, self.stopping))
        return True

    def _begin(self, work: Job | DerivedArtifact, do: Callable[[], None], devices: Sequence[Device] = ()) -> None:
        """Let a thread do the claimed `work`, which takes `devices` until the thread ends."""
        thread = threading.Thread(target=self._do, args=(do,), name=f"{self.lane.value} work", daemon=True)
        self._in_hand[thread], self._taken[thread] = work, list(devices)
        thread.start()

    def _do(self, do: Callable[[], None]) -> None:
        try:
            do()
        except Exception as error:
            log.error("unexpected error in the lane", exc_info=error)
        finally:
            thread = threading.current_thread()
            del self._in_hand[thread], self._taken[thread]
            gc.collect()
            self._woken.set()

    def _begin_training_or_evaluation(self) -> bool:
        """Claim a job that fits the free devices, and run it in a thread; False if there is none."""
        self.fork_server.prepare()
        taken = [device for devices in list(self._taken.values()) for device in devices]
        known = list(self.health.devices)
        free = without(known, taken)
        if not free:
            return False
        memory, served = min(device.memory_bytes for device in free), self.base_models.served()
        devices = job_queue.Devices(on_machines(free), on_machines(known))
        with self.services.database.write() as session:
            job = job_queue.claim(session, Status.QUEUED, self.owner, served, memory, devices=devices)
        if job is None:
            return False
        chosen = choose(free, job.devices or 1, job.nodes)
        self._begin(job, partial(self._run_job, job, chosen), chosen)
        return True

    def _run_job(self, job: Job, devices: list[Device]) -> None:
        """Run one job on `devices`."""
        shared = (self.services, self.base_models, job, self.stopping, self.fork_server, self.health)
        ATTEMPTS[job.kind](*shared, devices).run()
        if not self.stopping.is_set():
            self._usable()

    def _usable(self) -> bool:
        """Whether the device and the object store can be trusted. Others are told at once what has changed."""
        usable = (self.lane == Lane.CPU or self.health.usable()) and self.store_health.usable()
        shown = (usable, on_machines(self.health.devices))
        if shown != self._shown:
            self._register()
            self._shown = shown
        return usable

    def _keep_house(self) -> None:
        registered_at = -REGISTER_SECONDS
        while not self.stopping.is_set():
            began = time.thread_time()
            try:
                if not is_read_only(self.services.database):
                    keep_house(self.services)
                if time.monotonic() - registered_at >= REGISTER_SECONDS:
                    self._register()
                    registered_at = time.monotonic()
            except Exception as error:  # the next round may succeed
                log.warning("housekeeping failed", reason=str(error))
            self.stopping.wait(_pause_after(began))
        with suppress(SQLAlchemyError), self.services.database.write() as session:
            workers.leave(session, self.owner)

    def _reap(self) -> None:
        """Reap in a thread of its own: housekeeping may hang in the object store, and lost jobs must still go on."""
        reaper = Reaper(self.services)
        while not self.stopping.is_set():
            try:
                reaper.inspect()
            except Exception as error:  # the next inspection may succeed
                log.warning("leases could not be looked at", reason=str(error))
            self.stopping.wait(POLL_SECONDS)

    def _live(self) -> None:
        """Touch a file every few seconds, by which a supervisor sees that this process does not hang."""
        path = self.services.settings.home / f"{self.lane.value}-worker.alive"
        while not self.stopping.is_set():
            with suppress(OSError):  # a full disk is no reason to restart the worker
                path.touch()
            self.stopping.wait(ALIVE_SECONDS)

    def _prune(self) -> None:
        while not self.stopping.wait(CHORE_SECONDS):
            for work in (count_usage, pack_events, label_jobs, apply_retention, retain_checkpoints, prune_objects):
                try:
                    if not is_read_only(self.services.database):
                        work(self.services)
                except Exception as error:  # the next round may succeed
                    log.warning("housekeeping failed", reason=str(error))

    def _register(self) -> None:
        """Register this worker with its device, its integrations and its base models."""
        gpu = self.lane == Lane.GPU
        local = self.base_models.local() if gpu else []
        serves = [*(model.name for model in local), *self.base_models.patterns] if gpu else []
        work = work_folder(self.services)
        details: JsonObject = {"spec_version": SPEC_VERSION, "disk_free_bytes": shutil.disk_usage(work).free}
        if gpu:
            devices, problem = list(self.health.devices), self.health.problem
            device = devices[0] if devices else None
            details |= {"device": device and device.as_json(), "integrations": integrations.configured()}
            if device is not None:
                totals = on_machines(devices)
                machines = [most - fewer for fewer, most in pairwise((0, *totals))]
                details |= {"devices": totals[0], "machines": machines}
            details |= {"problem": problem} if problem else {}
            use = None if device is None else use_of(devices)
            details |= {} if use is None else {"gpu_use": asdict(use)}
        if self.store_health.problem is not None:
            details["store_problem"] = self.store_health.problem
        with self.services.database.write() as session:
            workers.report(session, self.owner, self.lane, serves, details)
            for model in local:
                models.register(session, model.name, model.revision, model.details)
            for pattern in self.base_models.patterns if gpu else ():
                models.register_hub(session, pattern)

"""The Celery application of a worker process, and its one task: a doorbell.

The task returns at once, so that no message is ever held while a training runs: visibility timeouts, late
acknowledgements and redeliveries have nothing to act on. What is to be done is in the database.
"""

import os
import sys
import threading
import warnings

from celery import Celery
from celery.exceptions import SecurityWarning
from celery.signals import worker_init, worker_shutting_down

from app.broker import WAKE_TASK, Lane, make_celery
from app.logging import configure_logging
from app.services import Services
from app.settings import Settings
from worker.worker_pool import WorkerPool


def make_worker(settings: Settings, lane: Lane) -> tuple[Celery, WorkerPool]:
    """The application of a worker of `lane` and its threads, which start and stop with the Celery worker."""
    services = Services.of(settings)
    worker = WorkerPool(services, lane)
    celery = make_celery(settings)

    @celery.task(name=WAKE_TASK)  # type: ignore[untyped-decorator]
    def wake(_lane: str) -> None:
        worker.ring()

    def end() -> None:
        worker.join()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    def drain() -> None:
        worker.stop()
        # Celery's loop looks twice, two seconds each, before it ends by itself; with no message held, it has nothing
        # to finish once the lane's threads have.
        threading.Thread(target=end, name="end").start()

    # At worker_init, before the broker is reached: a worker without a broker still looks by itself.
    worker_init.connect(lambda **_: worker.start(), weak=False)
    worker_shutting_down.connect(lambda **_: drain(), weak=False)
    return celery, worker


def run(lane: Lane) -> None:
    """Run a worker of `lane` in this process until SIGTERM or Ctrl-C."""
    settings = Settings()
    configure_logging(settings.log_level)
    # Celery warns root of pickled messages; this service's messages are JSON, and name a lane.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    celery, worker = make_worker(settings, lane)
    arguments = [
        "--quiet",
        "worker",
        "--pool=threads",
        "--concurrency=1",
        f"--queues={lane.value}",
        f"--hostname={lane.value}@%h",
    ]
    arguments += ["--loglevel=WARNING", "--without-gossip", "--without-mingle"]
    try:
        celery.worker_main(arguments)
    finally:
        if not worker.stopping.is_set():
            # Celery has ended by itself, at an error that it logs: a lane without it would neither hear of SIGTERM nor
            # be able to start threads. Whoever runs this process starts another.
            worker.stop()
            worker.join()
            os._exit(1)
    sys.exit(0)

"""The Celery application of a worker process. Its only task wakes the worker.

The task returns at once, so no message is held while a training runs. Visibility timeouts, late acknowledgements and
redeliveries therefore do not matter. The database says what there is to do.
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
from app.private_files import keep_private
from app.services import Services
from app.settings import Settings
from worker.worker_pool import WorkerPool


def make_worker(settings: Settings, lane: Lane) -> tuple[Celery, WorkerPool]:
    """The Celery application of a worker of `lane`, and its threads. They start and stop with the Celery worker."""
    services = Services.of(settings)
    worker = WorkerPool(services, lane)
    celery = make_celery(settings)

    @celery.task(name=WAKE_TASK)  # type: ignore[untyped-decorator]
    def wake(_lane: str) -> None:
        worker.wake_up()

    def end() -> None:
        worker.join()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    def drain() -> None:
        worker.stop()
        # Celery's own shutdown takes up to four seconds. It holds no message, so the process can end as soon as the
        # lane's threads have ended.
        threading.Thread(target=end, name="end").start()

    # worker_init comes before the connection to the broker: without a broker, the worker still polls the database.
    worker_init.connect(lambda **_: worker.start(), weak=False)
    worker_shutting_down.connect(lambda **_: drain(), weak=False)
    return celery, worker


def run(lane: Lane) -> None:
    """Run a worker of `lane` in this process until SIGTERM or Ctrl-C."""
    settings = Settings()
    keep_private(settings.home)
    configure_logging(settings.log_level)
    # Celery warns the root user of pickled messages. The messages of this service are JSON and only name a lane.
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
            # Celery ended because of an error, which it has logged. Without it, the lane gets no SIGTERM and cannot
            # start threads. The supervisor of this process starts another.
            worker.stop()
            worker.join()
            os._exit(1)
    sys.exit(0)

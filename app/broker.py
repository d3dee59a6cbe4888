"""Wake-ups: messages that tell the workers of a lane to look at the database.

A wake-up names a lane, not a job. It may be lost, late or delivered twice. The job's row is the truth: an idle worker
also polls the database every few seconds.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from enum import StrEnum
from pathlib import Path
from queue import Empty

import structlog
from celery import Celery
from kombu import Exchange, Queue
from kombu.transport import TRANSPORT_ALIASES, filesystem

from app.file_lock import locked
from app.settings import Settings
from app.spec.json_types import JsonObject

log = structlog.get_logger(__name__)

WAKE_TASK = "dpo.wake"


class Lane(StrEnum):
    """A group of workers. GPU workers train and evaluate; CPU workers check datasets and do all other work."""

    GPU = "gpu"
    CPU = "cpu"


class FolderChannel(filesystem.Channel):  # type: ignore[misc]
    """kombu's folder channel, made safe against files that another process has not finished.

    Plain kombu raises an error there. Celery takes that for a lost broker, and the worker ends. A message that is read
    while it is being written is dropped, as any wake-up may be. The bindings of an exchange have a lock. Bindings whose
    writer was killed are no bindings: whoever needs one writes it anew.
    """

    def _bindings_locked(self) -> AbstractContextManager[None]:
        """Hold the lock of all bindings. Kombu's own lock comes too late: it first looks for the file, or makes it."""
        return locked(self.control_folder / "bindings.lock")

    def get_table(self, exchange: str) -> list[filesystem.exchange_queue_t]:
        with self._bindings_locked():
            try:
                bindings: list[filesystem.exchange_queue_t] = super().get_table(exchange)
            except ValueError:
                return []
            return bindings

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str, queue: str) -> None:
        with self._bindings_locked():
            try:
                super()._queue_bind(exchange, routing_key, pattern, queue)
            except ValueError:
                self._exchange_file(exchange).unlink()
                super()._queue_bind(exchange, routing_key, pattern, queue)

    def _get(self, queue: str) -> JsonObject:
        try:
            message: JsonObject = super()._get(queue)
        except ValueError:
            raise Empty from None
        return message


class FolderTransport(filesystem.Transport):  # type: ignore[misc]
    """A transport that keeps messages as files in a folder."""

    Channel = FolderChannel


TRANSPORT_ALIASES["filesystem"] = f"{__name__}:{FolderTransport.__name__}"


def make_celery(settings: Settings) -> Celery:
    """The Celery application for the broker of `settings`. The worker registers its task on it."""
    celery = Celery("dpo", broker=settings.broker_url)
    options: dict[str, object] = {"socket_timeout": 5, "socket_connect_timeout": 5}
    if settings.broker_url.startswith("filesystem:"):
        messages, control = settings.home / "broker" / "messages", settings.home / "broker" / "control"
        for folder in (messages, control):
            Path(folder).mkdir(parents=True, exist_ok=True)
        options = {
            "data_folder_in": str(messages),
            "data_folder_out": str(messages),
            "control_folder": str(control),
            "polling_interval": 0.1,
        }
    celery.conf.update(
        accept_content=["json"],
        task_serializer="json",
        result_serializer="json",
        task_ignore_result=True,
        task_queues=[Queue(lane.value, Exchange("dpo"), routing_key=lane.value) for lane in Lane],
        task_create_missing_queues=False,
        task_default_queue=Lane.CPU.value,
        broker_transport_options=options,
        broker_connection_timeout=5,
        broker_connection_retry_on_startup=True,
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        # Whoever reaches the broker can wake workers, and do nothing else with them.
        worker_enable_remote_control=False,
        worker_send_task_events=False,
    )
    return celery


class Broker:
    """Sends wake-ups from its own thread, so that an unreachable broker delays no request and loses no job."""

    def __init__(self, settings: Settings) -> None:
        self.celery = make_celery(settings)
        self._sender = ThreadPoolExecutor(max_workers=1, thread_name_prefix="wake-ups")
        self._pending: set[Lane] = set()

    def wake(self, lane: Lane) -> None:
        """Tell one idle worker of `lane` to look at the database. Call it after the commit."""
        if lane not in self._pending:  # a pending wake-up says the same
            self._pending.add(lane)
            self._sender.submit(self._send, lane)

    def _send(self, lane: Lane) -> None:
        self._pending.discard(lane)
        try:
            self.celery.send_task(WAKE_TASK, args=[lane.value], queue=lane.value, retry=False)
        except Exception as error:  # kombu passes on any error of its transport; idle workers poll anyway
            log.warning("wake-up not sent", lane=lane.value, reason=str(error))

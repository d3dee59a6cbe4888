"""The broker that is a folder: processes that start together, and processes that were killed while they wrote.

A process of kombu binds a queue once. So each case has an exchange of its own.
"""

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from celery import Celery
from kombu import Exchange, Queue

from app.broker import Broker, Lane, make_celery
from app.programs import command
from app.settings import Settings
from tests.helpers.servers import redis_server, wait_until

WORKERS = [f"worker-{number}" for number in range(4)]


def declare(celery: Celery, exchange: str, queues: list[str]) -> None:
    """Bind the queues to the exchange, as a worker that starts does."""
    with celery.connection_for_write() as connection:
        for queue in queues:
            Queue(queue, Exchange(exchange), routing_key=queue)(connection.default_channel).declare()


def bindings_file(home: Path, exchange: str) -> Path:
    return home / "broker" / "control" / f"{exchange}.exchange"


def bound_queues(home: Path, exchange: str) -> list[str]:
    return sorted(queue for _, _, queue in json.loads(bindings_file(home, exchange).read_text()))


def test_workers_that_start_together_all_find_their_queue_bound(tmp_path: Path) -> None:
    """Plain kombu loses bindings here, or fails at a file that is still empty."""
    celery, barrier = make_celery(Settings(home=tmp_path)), Barrier(len(WORKERS))

    def start(exchange: str, queue: str) -> None:
        barrier.wait()
        declare(celery, exchange, [queue])

    with ThreadPoolExecutor(len(WORKERS)) as pool:
        for exchange in (f"exchange-{number}" for number in range(50)):
            list(pool.map(start, [exchange] * len(WORKERS), WORKERS))
            assert bound_queues(tmp_path, exchange) == WORKERS


@pytest.mark.parametrize("remains", ["", '[["worker-0", "", "wor'], ids=["nothing", "a part"])
def test_bindings_whose_writer_was_killed_are_written_anew(remains: str, tmp_path: Path) -> None:
    """The next worker starts. A sender that finds only the remains sends nothing and raises nothing."""
    celery, exchange = make_celery(Settings(home=tmp_path)), f"after-{len(remains)}-bytes"
    bindings_file(tmp_path, exchange).write_text(remains)
    with celery.connection_for_write() as connection:
        assert connection.default_channel.get_table(exchange) == []
    declare(celery, exchange, WORKERS)
    assert bound_queues(tmp_path, exchange) == WORKERS


def test_whoever_reaches_the_broker_cannot_control_workers(tmp_path: Path) -> None:
    """A running worker answers no command of Celery's remote control, but wakes up."""
    with redis_server() as broker:
        environment = os.environ | {"DPO_HOME": str(tmp_path), "DPO_BROKER_URL": broker, "DPO_LOG_LEVEL": "debug"}
        subprocess.run(command("app.cli.main", "migrate"), env=environment, check=True, stdout=subprocess.DEVNULL)
        settings, log = Settings(home=tmp_path, broker_url=broker), tmp_path / "log"
        with log.open("wb") as output:
            worker = subprocess.Popen(command("worker", "cpu"), env=environment, stdout=output, stderr=output)
        try:
            sender = Broker(settings)

            def has_woken() -> bool:
                sender.wake(Lane.CPU)
                return b'"woken"' in log.read_bytes()

            wait_until(has_woken, "the worker", worker)
            assert not sender.celery.control.ping(timeout=1)
            sender.celery.control.shutdown()
            log.write_bytes(b"")
            wait_until(has_woken, "the worker, which goes on", worker)
        finally:
            worker.terminate()
            worker.wait(60)

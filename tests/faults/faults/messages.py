"""Redis, and messages that come too often, too early, or not at all."""

import os
import signal
import time

from app.broker import WAKE_TASK, Lane, make_celery
from tests.faults.proxy import Connection
from tests.faults.scene import Scene, Strike, evidence_of


def restart_redis(scene: Scene) -> Strike | None:
    """Redis is killed and comes back empty."""
    scene.cluster.redis.end(signal.SIGKILL)
    struck = scene.line("WARNING celery.worker.consumer", seconds=10, job=False)
    still_running = scene.running()
    scene.cluster.redis.start()
    return Strike(evidence_of(struck), same_attempt=True) if struck and still_running else None


def restart_redis_with_a_queue(scene: Scene) -> Strike | None:
    """Redis comes back empty while 100 jobs are queued. The database still has them."""
    queued = [scene.workload.submit("short", priority=-1) for _ in range(100)]
    strike = restart_redis(scene)
    for job in queued[1:]:
        scene.workload.cancel(job)
    return strike and Strike(strike.evidence, same_attempt=True)


def hold_redis(scene: Scene) -> Strike | None:
    """No message passes to or from Redis for eight seconds."""
    broker = scene.cluster.broker
    struck_before = len(broker.struck)
    broker.hold(True)
    try:
        job = scene.workload.submit("short")
        time.sleep(8)
    finally:
        broker.hold(False)
    held_messages = broker.struck[struck_before:]
    return (
        Strike(f"{len(held_messages)} messages to Redis held", same_attempt=True, other_jobs=[job])
        if held_messages
        else None
    )


def freeze_redis(scene: Scene) -> Strike | None:
    """Redis stands still: it takes connections and answers nothing. Meanwhile a job is accepted and succeeds."""
    pid = scene.cluster.redis.process.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        job = scene.workload.submit("short")
        scene.workload.wait_end(job)
    finally:
        os.kill(pid, signal.SIGCONT)
    seconds = time.monotonic() - began
    return Strike(f"{job} was accepted and ended in the {seconds:.0f} s", same_attempt=True, other_jobs=[job])


def deliver_three_times(scene: Scene) -> Strike | None:
    """Every wake-up comes three times, to busy workers."""
    celery = make_celery(scene.cluster.services.settings)
    for lane in Lane:
        for _ in range(3):
            celery.send_task(WAKE_TASK, args=[lane.value], queue=lane.value)
    celery.close()
    woken = scene.line("woken", seconds=10, job=False)
    return Strike(evidence_of(woken), same_attempt=True) if woken and scene.running() else None


def commit_without_publish(scene: Scene) -> Strike | None:
    """A job is committed while Redis accepts no message. A worker still finds it."""
    broker = scene.cluster.broker
    broker.refuse = True
    broker.cut()
    try:
        job = scene.workload.submit("short")
        line = scene.line("wake-up not sent", seconds=30, job=False)
    finally:
        broker.refuse = False
    return Strike(evidence_of(line), same_attempt=True, other_jobs=[job]) if line else None


def publish_without_commit(scene: Scene) -> Strike | None:
    """A wake-up is sent for a job whose commit is lost, or the answer to it. In the end there is exactly one job."""
    celery, database = make_celery(scene.cluster.services.settings), scene.cluster.api_database
    broken: list[Connection] = []
    upstream = scene.random.random() < 0.5

    def spoil(connection: Connection, from_client: bool, chunk: bytes) -> bool:
        if from_client != upstream or b"COMMIT" not in chunk or len(broken) >= 3:
            return False
        broken.append(connection)
        return True

    database.spoil = spoil
    try:
        celery.send_task(WAKE_TASK, args=[Lane.CPU.value], queue=Lane.CPU.value)
        job = scene.workload.submit("short")
        line = scene.line("database out of reach", seconds=5, job=False)
    finally:
        database.spoil = None
        celery.close()
    return Strike(evidence_of(line), same_attempt=True, other_jobs=[job]) if line and broken else None

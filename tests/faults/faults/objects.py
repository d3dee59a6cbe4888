"""The object store, and uploads to it."""

import socket
import time
from collections.abc import Callable

from sqlalchemy import select

from app.files.tables import File
from tests.faults.cluster import ADMIN_KEY
from tests.faults.proxy import Connection, Proxy
from tests.faults.scene import Scene, Strike, evidence_of
from tests.helpers.servers import wait_until
from tests.helpers.service import half_upload


def _objects(scene: Scene, disturb: Callable[[Proxy], None], seconds: float) -> Strike | None:
    """Disturb the object store for a while. The strike needs a disturbed request about this job."""
    proxy = scene.cluster.objects
    struck_before = len(proxy.struck)
    disturb(proxy)
    try:
        time.sleep(seconds)
    finally:
        proxy.heal()
    hit = [request for _at, request in proxy.struck[struck_before:] if scene.attempt.job in request]
    return Strike(f"S3: {hit[0]} ({len(hit)} requests)", recovery=None) if hit else None


def s3_errors(scene: Scene) -> Strike | None:
    """The object store answers 503 to everything."""
    return _objects(scene, lambda proxy: setattr(proxy, "busy", True), scene.random.uniform(2, 5))


def s3_timeouts(scene: Scene) -> Strike | None:
    """The object store answers nothing."""
    return _objects(scene, lambda proxy: proxy.hold(True), scene.random.uniform(2, 8))


def s3_half_uploads(scene: Scene) -> Strike | None:
    """Connections break in the middle of an upload or of an answer."""
    limit = scene.random.randint(1, 60_000)

    def spoil(connection: Connection, from_client: bool, _chunk: bytes) -> bool:
        return (from_client and connection.passed > limit) or scene.random.random() < 0.1

    return _objects(scene, lambda proxy: setattr(proxy, "spoil", spoil), scene.random.uniform(2, 5))


def s3_slow_bodies(scene: Scene) -> Strike | None:
    """All traffic of the object store is slow."""
    return _objects(scene, lambda proxy: setattr(proxy, "rate", 50_000.0), scene.random.uniform(2, 5))


def _long_outage(scene: Scene, disturb: Callable[[Proxy], None], seconds: float) -> Strike | None:
    """Disturb the object store for longer than its clients try again. Neither this job nor a queued one may fail."""
    proxy = scene.cluster.objects
    disturb(proxy)
    proxy.cut()
    try:
        line = scene.line("object store out of reach", seconds=seconds, job=False)
        queued = [scene.workload.submit("short") for _ in range(2)]
        time.sleep(max(0.0, scene.began + seconds - time.monotonic()))
    finally:
        proxy.heal()
        proxy.cut()
    return Strike(evidence_of(line), same_attempt=True, other_jobs=queued) if line else None


def store_away(scene: Scene) -> Strike | None:
    """The object store refuses connections for five minutes."""
    return _long_outage(scene, lambda proxy: setattr(proxy, "refuse", True), 300)


def store_errors(scene: Scene) -> Strike | None:
    """The object store answers 503 to everything for a minute and a half."""
    return _long_outage(scene, lambda proxy: setattr(proxy, "busy", True), 90)


def store_slow(scene: Scene) -> Strike | None:
    """The object store takes and gives 2 kB a second for a minute and a half: a small request takes a second."""
    proxy = scene.cluster.objects
    struck_before = len(proxy.struck)
    proxy.rate = 2_000.0
    try:
        queued = [scene.workload.submit("short") for _ in range(2)]
        time.sleep(max(0.0, scene.began + 90 - time.monotonic()))
    finally:
        proxy.heal()
    hit = [request for _at, request in proxy.struck[struck_before:] if scene.attempt.job in request]
    return Strike(f"S3: {hit[0]} ({len(hit)} pieces)", same_attempt=True, other_jobs=queued) if hit else None


def cut_uploads(scene: Scene) -> Strike | None:
    """An upload breaks off at a random byte and leaves nothing."""
    size = scene.random.randint(1, 3_000_000)
    with socket.create_connection(("127.0.0.1", scene.cluster.front.port)) as client:
        client.sendall(half_upload(ADMIN_KEY, size))
        front = scene.cluster.front
        wait_until(lambda: any(connection.passed >= size for connection in front._connections), "the upload at the API")
        front.cut()
    wait_until(lambda: not _without_a_row(scene), "the removal of the upload's objects")
    return Strike(f"POST /v1/files cut after {size} bytes while {scene.attempt.job} ran", same_attempt=True)


def _without_a_row(scene: Scene) -> set[str]:
    """Keys of stored files that have no row."""
    services = scene.cluster.services
    stored_keys = {key for key, _size in services.storage.list("files")}
    with services.database.read() as session:
        return stored_keys - {file.key for file in session.scalars(select(File))}

"""What goes wrong: each fault strikes a training at a random moment, says which log line shows that it did, and undoes
itself.

A fault returns a `Strike`, or None where it came too late or changed nothing; then it does not count.
"""

import hashlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import httpx2

from app.broker import WAKE_TASK, Lane, make_celery
from app.jobs.states import ACTIVE
from tests.faults.cluster import ADMIN_KEY, REPOSITORY, Cluster, Line, Program
from tests.faults.proxy import Connection, Proxy
from tests.faults.workload import LONG, Attempt, Workload
from tests.servers import wait_until

HANDED_BACK = "The worker stops; the job will resume."
CGROUP = Path("/sys/fs/cgroup/memory")
NEXT_FIELD = "    what_the_next_version_knows_{number}: int = {number}\n    priority: "
NEXT_MIGRATION = '''"""What the next version adds"""

import sqlalchemy as sa
from alembic import op

revision = "{revision}"
down_revision = "{before}"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("added_{revision}", sa.String(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "added_{revision}")
'''


@dataclass
class Strike:
    """That a fault has struck: the line that shows it, and seconds from a kill to the next attempt's process."""

    evidence: str
    recovery: float | None = None
    same_attempt: bool = False
    """The training must have gone on as if nothing had been."""
    more: list[str] = field(default_factory=list)
    """Other jobs that it made, which must succeed."""


@dataclass
class Scene:
    """A training that runs, and the means to disturb it."""

    cluster: Cluster
    workload: Workload
    random: Random
    attempt: Attempt
    began: float = field(default_factory=time.monotonic)

    @property
    def runner(self) -> Program:
        return self.cluster.programs[self.attempt.program]

    def running(self) -> bool:
        return self.workload.row(self.attempt.job).status in ACTIVE

    def line(self, *events: str, seconds: float = 60.0, job: bool = True) -> Line | None:
        """The next line of one of `events`, about this job unless said otherwise."""

        def wanted(line: Line) -> bool:
            return str(line.get("event", "")).startswith(events) and (not job or line.get("job") == self.attempt.job)

        return self.cluster.logs.wait(wanted, self.began, seconds)

    def next_attempt(self, seconds: float = 90.0) -> float | None:
        """Seconds from the strike to the next attempt's process."""
        found = self.workload.started(self.attempt.job, self.attempt.number + 1, seconds)
        return None if found is None else found.seen - self.began

    def after_next_attempt(self, line: Line | None, recovery: bool = True) -> Strike | None:
        """The strike that `line` shows, once another attempt runs."""
        if line is None:
            return None
        seconds = self.next_attempt()
        if seconds is None:
            self.workload.problems.append(f"{self.attempt.job}: no new attempt after {line['event']}")
        return Strike(_shown(line), seconds if recovery else None)


def _shown(line: Line) -> str:
    return f"{line['program']}: {line.get('event')} ({line.get('job', 'no job named')})"


Fault = Callable[[Scene], Strike | None]


# -- processes ---------------------------------------------------------------------------------------------------


def kill_runner(scene: Scene) -> Strike | None:
    """kill -9 of the worker that runs the job; its trainer ends by itself."""
    scene.runner.kill()
    scene.runner.start()
    return scene.after_next_attempt(scene.line("lease expired"))


def kill_trainer(scene: Scene) -> Strike | None:
    """kill -9 of the process that trains."""
    os.kill(scene.attempt.pid, signal.SIGKILL)
    return scene.after_next_attempt(scene.line("attempt lost", seconds=10))


def kill_runner_and_trainer(scene: Scene) -> Strike | None:
    """kill -9 of both at once."""
    os.kill(scene.attempt.pid, signal.SIGKILL)
    scene.runner.kill()
    scene.runner.start()
    return scene.after_next_attempt(scene.line("lease expired"))


def kill_api(scene: Scene) -> Strike | None:
    """kill -9 of an API while it streams the job's events and takes another job."""
    job, api, broken = scene.attempt.job, scene.cluster.programs["api-1"], threading.Event()
    opened = threading.Event()

    def follow() -> None:
        with suppress(httpx2.HTTPError), scene.workload.http.stream("GET", f"/fine_tuning/jobs/{job}/stream") as stream:
            for _ in stream.iter_bytes():
                opened.set()
        broken.set()

    threading.Thread(target=follow, daemon=True).start()
    if not opened.wait(10):
        return None
    made: list[str] = []
    creating = threading.Thread(target=lambda: made.append(scene.workload.submit(short=True)))
    creating.start()
    time.sleep(scene.random.uniform(0.0, 0.03))
    api.kill()
    struck = scene.running()
    broken.wait(10)
    api.start()
    creating.join()
    return Strike(f"the stream of {job} broke", same_attempt=True, more=made) if struck else None


def stop_runner(scene: Scene) -> Strike | None:
    """SIGSTOP of the worker until another has the job, then SIGCONT: what it still writes must touch no row."""
    scene.runner.signal(signal.SIGSTOP)
    try:
        strike = scene.after_next_attempt(scene.line("lease expired"))
    finally:
        scene.runner.signal(signal.SIGCONT)
    stale = scene.line("lease lost")
    if strike is not None and (stale is None or stale["attempt"] != scene.attempt.number):
        scene.workload.problems.append(f"{scene.attempt.job}: the stale attempt did not notice")
    return strike


def drain_worker(scene: Scene) -> Strike | None:
    """SIGTERM: a checkpoint, back to the queue, no attempt counted as lost."""
    before = scene.workload.messages(scene.attempt.job).count(HANDED_BACK)
    scene.runner.signal(signal.SIGTERM)
    scene.runner.wait(60)
    if scene.workload.messages(scene.attempt.job).count(HANDED_BACK) == before:
        return None
    if scene.workload.row(scene.attempt.job).lost_attempts:
        scene.workload.problems.append(f"{scene.attempt.job}: draining cost an attempt")
    scene.runner.start()
    seconds = scene.next_attempt()
    return None if seconds is None else Strike(f"{scene.attempt.job}: {HANDED_BACK}")


def run_out_of_memory(scene: Scene) -> Strike | None:
    """The kernel's out-of-memory killer takes the trainer."""
    group = CGROUP / f"dpo-faults-{scene.attempt.pid}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(2**16))
        with suppress(ProcessLookupError):
            (group / "cgroup.procs").write_text(str(scene.attempt.pid))
        strike = scene.after_next_attempt(scene.line("attempt lost", seconds=20))
        kills = (group / "memory.oom_control").read_text()
        return strike if "oom_kill 0" not in kills else None
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text(), "the end of the trainer")
        group.rmdir()


def two_reapers(scene: Scene) -> Strike | None:
    """kill -9 of the worker; all others are stopped until its lease is over, and look at the same moment."""
    others = [program for program in scene.cluster.workers() if program is not scene.runner]
    lost, job = "The worker of this job was lost. The job will resume.", scene.attempt.job
    before = scene.workload.messages(job).count(lost)
    for program in others:
        program.signal(signal.SIGSTOP)
    scene.runner.kill()
    time.sleep(16)
    for program in others:
        program.signal(signal.SIGCONT)
    scene.runner.start()
    strike = scene.after_next_attempt(scene.line("lease expired"), recovery=False)
    told = scene.workload.messages(job).count(lost) - before
    if strike is not None and told != 1:
        scene.workload.problems.append(f"{job}: recovered {told} times")
    return strike


def poison(scene: Scene) -> Strike | None:
    """A job whose trainer dies at once, each time: it is given up, and the error says whose fault that is."""
    job = scene.workload.submit(short=True)
    shown = None
    for number in range(2, 5):  # the first attempt is the check of its files
        attempt = scene.workload.started(job, number)
        if attempt is None:
            scene.workload.problems.append(f"{job}: no attempt {number}")
            return None
        with suppress(ProcessLookupError):
            os.kill(attempt.pid, signal.SIGKILL)
        shown = scene.cluster.logs.wait(
            lambda line: line.get("event") == "attempt lost" and line["job"] == job, attempt.seen, 10
        )
    row = scene.workload.wait_end(job)
    if row.status != "failed" or (row.error or {}).get("code") != "worker_lost":
        scene.workload.problems.append(f"{job}: ended as {row.status}, {row.error}")
    return None if shown is None else Strike(_shown(shown), same_attempt=True)


# -- messages ----------------------------------------------------------------------------------------------------


def restart_redis(scene: Scene) -> Strike | None:
    """Redis is killed and comes back empty."""
    scene.cluster.redis.end(signal.SIGKILL)
    struck = scene.line("WARNING celery.worker.consumer", seconds=10, job=False)
    still = scene.running()
    scene.cluster.redis.start()
    return Strike(_shown(struck), same_attempt=True) if struck and still else None


def restart_redis_with_a_queue(scene: Scene) -> Strike | None:
    """Redis comes back empty while 100 jobs are in the queue: they are in the database."""
    queued = [scene.workload.submit(short=True, priority=-1) for _ in range(100)]
    strike = restart_redis(scene)
    for job in queued[1:]:
        scene.workload.cancel(job)
    return strike and Strike(strike.evidence, same_attempt=True)


def hold_redis(scene: Scene) -> Strike | None:
    """Nothing comes through to Redis or from it for eight seconds."""
    broker = scene.cluster.broker
    before = len(broker.struck)
    broker.hold(True)
    try:
        made = scene.workload.submit(short=True)
        time.sleep(8)
    finally:
        broker.hold(False)
    held = broker.struck[before:]
    return Strike(f"{len(held)} messages to Redis held", same_attempt=True, more=[made]) if held else None


def deliver_three_times(scene: Scene) -> Strike | None:
    """Every wake-up comes three times, to workers that have enough to do."""
    celery = make_celery(scene.cluster.services.settings)
    for lane in Lane:
        for _ in range(3):
            celery.send_task(WAKE_TASK, args=[lane.value], queue=lane.value)
    celery.close()
    woken = scene.line("woken", seconds=10, job=False)
    return Strike(_shown(woken), same_attempt=True) if woken and scene.running() else None


def commit_without_publish(scene: Scene) -> Strike | None:
    """A job is committed while Redis takes no message: a worker finds it all the same."""
    broker = scene.cluster.broker
    broker.refuse = True
    broker.cut()
    try:
        made = scene.workload.submit(short=True)
        shown = scene.line("wake-up not sent", seconds=30, job=False)
    finally:
        broker.refuse = False
    return Strike(_shown(shown), same_attempt=True, more=[made]) if shown else None


def publish_without_commit(scene: Scene) -> Strike | None:
    """A wake-up for a job whose commit is lost on the way, or whose answer is: one job in the end, not none, not two."""
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
        made = scene.workload.submit(short=True)
        shown = scene.line("database out of reach", seconds=5, job=False)
    finally:
        database.spoil = None
        celery.close()
    return Strike(_shown(shown), same_attempt=True, more=[made]) if shown and broken else None


# -- the database ------------------------------------------------------------------------------------------------


def restart_postgres(scene: Scene) -> Strike | None:
    """PostgreSQL dies with all its connections, and comes back."""
    family = _family(scene.cluster.postgres.process.pid)
    scene.cluster.postgres.end(signal.SIGQUIT)
    # One that still ends keeps the shared memory, without which the next does not start.
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family), "the end of PostgreSQL")
    scene.cluster.postgres.start()
    shown = scene.line("heartbeat failed", "database out of reach", seconds=8)
    return Strike(_shown(shown)) if shown else None


def cut_postgres(scene: Scene) -> Strike | None:
    """Every worker's connection breaks once, in the middle of a transaction: on the way there or on the way back."""
    upstream, cut, deadline = scene.random.random() < 0.5, set[Connection](), time.monotonic() + 4

    def spoil(connection: Connection, from_client: bool, chunk: bytes) -> bool:
        if from_client != upstream or len(cut) >= 12 or time.monotonic() > deadline:
            return False
        if b"COMMIT" not in chunk and b"UPDATE" not in chunk:
            return False
        cut.add(connection)
        return True

    scene.cluster.database.spoil = spoil
    try:
        shown = scene.line("heartbeat failed", "database out of reach", seconds=5)
    finally:
        scene.cluster.database.spoil = None
    return Strike(_shown(shown)) if shown else None


def pause_postgres(scene: Scene) -> Strike | None:
    """PostgreSQL does nothing for 30 s, longer than a lease: the training goes on, and no attempt is lost."""
    found = _family(scene.cluster.postgres.process.pid)
    for pid in found:
        os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(30)
    finally:
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    shown = scene.line("lease not renewed in time", seconds=5)
    return Strike(_shown(shown), same_attempt=True) if shown else None


def set_the_clock(scene: Scene) -> Strike | None:
    """PostgreSQL's clock jumps by five minutes, forth or back, and later back again."""
    jump = scene.random.choice([-300.0, 300.0])
    scene.cluster.set_clock(jump)
    try:
        shown = scene.line("no lease is taken for a while", seconds=10, job=False)
        time.sleep(scene.random.uniform(0, 4))
        struck = scene.running()
    finally:
        scene.cluster.set_clock(0.0)
    return Strike(f"{jump:+.0f} s; {_shown(shown)}", same_attempt=True) if shown and struck else None


def _family(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *map(int, children)]


# -- the object store --------------------------------------------------------------------------------------------


def _objects(scene: Scene, disturb: Callable[[Proxy], None], seconds: float) -> Strike | None:
    """Disturb the object store for a while; the strike is a request about this job that was hit."""
    proxy = scene.cluster.objects
    before = len(proxy.struck)
    disturb(proxy)
    try:
        time.sleep(seconds)
    finally:
        proxy.heal()
    hit = [request for _at, request in proxy.struck[before:] if scene.attempt.job in request]
    return Strike(f"S3: {hit[0]} ({len(hit)} requests)", recovery=None) if hit else None


def s3_errors(scene: Scene) -> Strike | None:
    """The object store answers 503 to everything."""
    return _objects(scene, lambda proxy: setattr(proxy, "busy", True), scene.random.uniform(1, 4))


def s3_timeouts(scene: Scene) -> Strike | None:
    """The object store answers nothing."""
    return _objects(scene, lambda proxy: proxy.hold(True), scene.random.uniform(2, 8))


def s3_half_uploads(scene: Scene) -> Strike | None:
    """Connections break in the middle of what is uploaded, or of what is answered."""
    most = scene.random.randint(1, 60_000)

    def spoil(connection: Connection, from_client: bool, _chunk: bytes) -> bool:
        return (from_client and connection.passed > most) or scene.random.random() < 0.1

    return _objects(scene, lambda proxy: setattr(proxy, "spoil", spoil), scene.random.uniform(1, 3))


def s3_slow_bodies(scene: Scene) -> Strike | None:
    """Everything from and to the object store creeps."""
    return _objects(scene, lambda proxy: setattr(proxy, "rate", 50_000.0), scene.random.uniform(2, 4))


# -- disks, uploads, deployments ---------------------------------------------------------------------------------


def fill_the_disk(scene: Scene) -> Strike | None:
    """The worker's disk is full until an attempt has failed for it."""
    with _full(scene.cluster.home / scene.runner.name / "work"):
        shown = scene.line("attempt lost", "the attempt failed", seconds=20)
    return scene.after_next_attempt(shown, recovery=False)


def fill_the_services_disk(scene: Scene) -> Strike | None:
    """All that an embedded service has is on a disk that is full for a while: SQLite, objects, messages, work.

    What is sent meanwhile is kept whole or refused, and what was accepted comes to its end.
    """
    with scene.cluster.embedded() as service, service.http() as http:
        content = scene.cluster.services.storage.read(f"files/{scene.workload.file}")
        file = http.post("/files", files={"file": ("p.jsonl", content)}, data={"purpose": "fine-tune"}).json()["id"]
        job = http.post("/fine_tuning/jobs", json=LONG | {"training_file": file}).raise_for_status().json()["id"]
        service.wait_for(job, lambda seen: bool(seen["progress"]))
        log = service.home / "serve.log"
        place = log.stat().st_size
        time.sleep(scene.random.uniform(0.0, 2.0))
        with _full(service.home):
            answer = http.post("/files", files={"file": ("p.jsonl", content * 9)}, data={"purpose": "fine-tune"})
            time.sleep(scene.random.uniform(1.0, 6.0))
        if answer.status_code == 200:  # something had just made room
            kept = http.get(f"/files/{answer.json()['id']}/content").content == content * 9
            scene.workload.problems += [] if kept else ["an upload beside a full disk was cut short"]
        elif answer.status_code != 503:
            scene.workload.problems.append(f"an upload to a full disk was answered {answer.status_code}")
        ended = service.wait_for(job, lambda seen: seen["status"] == "succeeded")
        made = http.get(f"/models/{ended['fine_tuned_model']}/download").raise_for_status().content
        with tarfile.open(fileobj=io.BytesIO(made)) as archive:
            adapter = next(name for name in archive.getnames() if name.endswith("adapter_model.safetensors"))
            weights = archive.extractfile(adapter)
            digest = hashlib.sha256(weights.read() if weights else b"").hexdigest()
        expected = scene.workload.expected[False]
        if digest != expected.adapter:
            scene.workload.problems.append(f"{job} made other bytes beside a full disk")
        told = [line for line in log.read_bytes()[place:].decode().splitlines() if job in line and "warning" in line]
    return Strike(f"embedded: {told[0][:120]}", same_attempt=True) if told else None


@contextmanager
def _full(folder: Path) -> Iterator[None]:
    """No byte more fits into the file system of `folder` while the block runs."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    try:
        yield
    finally:
        filler.unlink()


def cut_uploads(scene: Scene) -> Strike | None:
    """Uploads break off at a random byte; nothing of them stays."""
    size = scene.random.randint(1, 3_000_000)
    body = (
        b'--xx\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        b'--xx\r\nContent-Disposition: form-data; name="file"; filename="p.jsonl"\r\n\r\n'
    ) + b"x" * size
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {ADMIN_KEY}\r\n"
        f"Content-Type: multipart/form-data; boundary=xx\r\nContent-Length: {len(body) + 10_000}\r\n\r\n"
    )
    storage = scene.cluster.services.storage
    before = storage.list("files")
    with socket.create_connection(("127.0.0.1", scene.cluster.front.port)) as connection:
        connection.sendall(head.encode() + body)
        front = scene.cluster.front
        wait_until(lambda: any(c.passed >= size for c in front._connections), "the upload at the API", 20)
        front.cut()
    wait_until(lambda: storage.list("files") == before, "the end of what came of the upload")
    return Strike(f"POST /v1/files cut after {size} bytes while {scene.attempt.job} ran", same_attempt=True)


def deploy(scene: Scene) -> Strike | None:
    """A version with a new migration: the schema first, then one process after the other, while the job runs."""
    cluster = scene.cluster
    number = len(list(cluster.home.glob("version-*"))) + 1
    folder = cluster.home / f"version-{number}"
    for name in ("app", "worker", "migrations"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    versions = folder / "migrations" / "versions"
    before = sorted(path.name[:4] for path in versions.glob("0*.py"))[-1]
    for step in range(1, number + 1):
        revision = f"{int(before) + 1:04d}"
        text = NEXT_MIGRATION.format(revision=revision, before=before)
        (versions / f"{revision}_next_{step}.py").write_text(text)
        before = revision
    spec = folder / "app" / "jobs" / "spec.py"
    spec.write_text(spec.read_text().replace("    priority: ", NEXT_FIELD.format(number=number), 1))
    environment = cluster.programs["cpu-1"].environment | {"PYTHONPATH": str(folder)}
    # As a process of its own: the new version's migrations are another package of the same name.
    migrate = [sys.executable, "-m", "app.cli.main", "migrate"]
    subprocess.run(migrate, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    ready = httpx2.get(f"http://127.0.0.1:{cluster.front.port}/readyz").json()
    if ready["status"] != "ok":
        scene.workload.problems.append(f"the old version is not ready beside the new schema: {ready}")
    told_before, struck = scene.workload.messages(scene.attempt.job).count(HANDED_BACK), scene.running()
    for program in cluster.programs.values():
        program.folder, program.environment = folder, program.environment | {"PYTHONPATH": str(folder)}
        program.signal(signal.SIGTERM)
        program.wait(60)
        program.start()
    resumed = scene.workload.messages(scene.attempt.job).count(HANDED_BACK) > told_before
    return Strike(f"{scene.attempt.job}: {HANDED_BACK}") if struck and resumed else None


def missing(fault: str, cluster: Cluster) -> str | None:
    """What this machine lacks for a fault, by name."""
    if fault == "run_out_of_memory" and not os.access(CGROUP, os.W_OK):
        return f"a memory controller that may be written to ({CGROUP})"
    if fault.startswith("fill_the") and not cluster.small_disks:
        return "the right to mount a small file system"
    return None


FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        kill_runner, kill_trainer, kill_api, kill_runner_and_trainer, stop_runner, drain_worker, run_out_of_memory,
        two_reapers, poison, restart_redis, restart_redis_with_a_queue, hold_redis, deliver_three_times,
        commit_without_publish, publish_without_commit, restart_postgres, cut_postgres, pause_postgres, set_the_clock,
        s3_errors, s3_timeouts, s3_half_uploads, s3_slow_bodies, fill_the_disk, fill_the_services_disk, cut_uploads,
        deploy,
    )
}  # fmt: skip

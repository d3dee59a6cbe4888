"""Processes that die, stop, or are replaced by those of a new version."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx2

from app.jobs.states import ACTIVE
from tests.faults.cluster import REPOSITORY
from tests.faults.scene import HANDED_BACK, Scene, Strike, evidence_of
from tests.helpers.servers import wait_until

CGROUP = Path("/sys/fs/cgroup/memory")
NEXT_FIELD = "    next_version_field_{number}: int = {number}\n    priority: "
NEXT_MIGRATION = '''"""A column of the next version"""

import sqlalchemy as sa
from alembic import op

revision = "{revision}"
down_revision = "{last_revision}"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("added_{revision}", sa.String(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "added_{revision}")
'''


def kill_runner(scene: Scene) -> Strike | None:
    """kill -9 of the worker that runs the job. Its trainer ends by itself."""
    scene.runner.kill()
    scene.runner.start()
    return scene.after_next_attempt(scene.line("lease expired"))


def kill_trainer(scene: Scene) -> Strike | None:
    """kill -9 of the process that trains."""
    os.kill(scene.attempt.pid, signal.SIGKILL)
    return scene.after_next_attempt(scene.line("attempt lost", seconds=10))


def kill_one_rank(scene: Scene) -> Strike | None:
    """kill -9 of one of the processes that train together. The others end within seconds."""
    return _strike_one_rank(scene, signal.SIGKILL)


def stop_one_rank(scene: Scene) -> Strike | None:
    """SIGSTOP of one of the processes that train together. The trainer kills it when it has been silent for long."""
    return _strike_one_rank(scene, signal.SIGSTOP)


def _strike_one_rank(scene: Scene, how: signal.Signals) -> Strike | None:
    beats = list((scene.cluster.home / scene.runner.name / "work").glob("*/ranks/*/beat"))
    with suppress(FileNotFoundError, ValueError):
        ranks = [pid for pid in (int(beat.read_text()) for beat in beats) if _parent(pid) == scene.attempt.pid]
        if len(ranks) < 2:
            return None  # the attempt has one device
        os.kill(scene.random.choice(ranks), how)
        return scene.after_next_attempt(scene.line("attempt lost"))
    return None  # it has just ended


def _parent(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("PPid:"))


def kill_runner_and_trainer(scene: Scene) -> Strike | None:
    """kill -9 of both at once."""
    os.kill(scene.attempt.pid, signal.SIGKILL)
    scene.runner.kill()
    scene.runner.start()
    return scene.after_next_attempt(scene.line("lease expired"))


def kill_api(scene: Scene) -> Strike | None:
    """kill -9 of an API while it streams the job's events and accepts another job."""
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
    jobs: list[str] = []
    creating = threading.Thread(target=lambda: jobs.append(scene.workload.submit("short")))
    creating.start()
    time.sleep(scene.random.uniform(0.0, 0.03))
    api.kill()
    struck = scene.running()
    broken.wait(10)
    api.start()
    creating.join()
    return Strike(f"the stream of {job} broke", same_attempt=True, other_jobs=jobs) if struck else None


def stop_runner(scene: Scene) -> Strike | None:
    """SIGSTOP of the worker until another has the job, then SIGCONT. Its late writes must change no row."""
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
    """SIGTERM: the worker writes a checkpoint and hands the job back. No attempt counts as lost."""
    handed_back_before = scene.workload.messages(scene.attempt.job).count(HANDED_BACK)
    scene.runner.signal(signal.SIGTERM)
    scene.runner.wait(60)
    if scene.workload.messages(scene.attempt.job).count(HANDED_BACK) == handed_back_before:
        return None
    if scene.workload.row(scene.attempt.job).lost_attempts:
        scene.workload.problems.append(f"{scene.attempt.job}: draining cost an attempt")
    scene.runner.start()
    seconds = scene.next_attempt()
    return None if seconds is None else Strike(f"{scene.attempt.job}: {HANDED_BACK}")


def drain_while_the_store_hangs(scene: Scene) -> Strike | None:
    """SIGTERM while the object store answers nothing: the worker ends within 20 s, and no attempt counts as lost."""
    scene.cluster.objects.hold(True)
    time.sleep(scene.random.uniform(0, 3))
    began, running = time.monotonic(), scene.running()
    scene.runner.signal(signal.SIGTERM)
    try:
        scene.runner.wait(20)
    except subprocess.TimeoutExpired:
        scene.workload.problems.append(f"{scene.attempt.job}: the worker did not end within 20 s")
    seconds = time.monotonic() - began
    scene.cluster.objects.heal()
    row = scene.workload.row(scene.attempt.job)
    if not running or row.status not in ACTIVE:
        return None
    if row.lost_attempts:
        scene.workload.problems.append(f"{scene.attempt.job}: draining cost an attempt")
    scene.runner.start()
    if scene.next_attempt() is None:
        scene.workload.problems.append(f"{scene.attempt.job}: no new attempt after the drain")
    return Strike(f"{scene.attempt.job}: the worker ended {seconds:.1f} s after SIGTERM")


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
    """kill -9 of the worker. All others are stopped until its lease has expired, and then inspect at once."""
    other_workers = [program for program in scene.cluster.workers() if program is not scene.runner]
    job = scene.attempt.job

    def recoveries() -> int:
        return sum(text.startswith("The worker of this job was lost.") for text in scene.workload.messages(job))

    recoveries_before = recoveries()
    for program in other_workers:
        program.signal(signal.SIGSTOP)
    scene.runner.kill()
    time.sleep(16)
    for program in other_workers:
        program.signal(signal.SIGCONT)
    scene.runner.start()
    strike = scene.after_next_attempt(scene.line("lease expired"), recovery=False)
    if strike is not None and recoveries() != recoveries_before + 1:
        scene.workload.problems.append(f"{job}: recovered {recoveries() - recoveries_before} times")
    return strike


def poison(scene: Scene) -> Strike | None:
    """A job whose trainer dies at once in each attempt. It is given up with the error `worker_lost`."""
    job = scene.workload.submit("short")
    line = None
    for number in range(2, 5):  # the first attempt is the check of its files
        attempt = scene.workload.started(job, number)
        if attempt is None:
            scene.workload.problems.append(f"{job}: no attempt {number}")
            return None
        with suppress(ProcessLookupError):
            os.kill(attempt.pid, signal.SIGKILL)
        line = scene.cluster.logs.wait(
            lambda line: line.get("event") == "attempt lost" and line["job"] == job, attempt.seen_at, 10
        )
    row = scene.workload.wait_end(job)
    if row.status != "failed" or (row.error or {}).get("code") != "worker_lost":
        scene.workload.problems.append(f"{job}: ended as {row.status}, {row.error}")
    return None if line is None else Strike(evidence_of(line), same_attempt=True)


def deploy(scene: Scene) -> Strike | None:
    """A version with a new migration is deployed while the job runs: first the schema, then process by process.

    The training stands still while the version is made. Otherwise it would end before its worker's turn.
    """
    os.kill(scene.attempt.pid, signal.SIGSTOP)
    try:
        folder = _next_version(scene)
    finally:
        os.kill(scene.attempt.pid, signal.SIGCONT)
    ready = httpx2.get(f"http://127.0.0.1:{scene.cluster.front.port}/readyz").json()
    if ready["status"] != "ok":
        scene.workload.problems.append(f"the old version is not ready beside the new schema: {ready}")
    handed_back_before, struck = scene.workload.messages(scene.attempt.job).count(HANDED_BACK), scene.running()
    # Workers before APIs, as in a real deployment. The busy worker is first, before its training ends by itself.
    order = sorted(
        scene.cluster.programs.values(),
        key=lambda program: (program is not scene.runner, program.name.startswith("api")),
    )
    for program in order:
        path = os.pathsep.join(filter(None, (str(folder), program.environment.get("PYTHONPATH"))))
        program.folder, program.environment = folder, program.environment | {"PYTHONPATH": path}
        program.signal(signal.SIGTERM)
        program.wait(60)
        program.start()
    resumed = scene.workload.messages(scene.attempt.job).count(HANDED_BACK) > handed_back_before
    return Strike(f"{scene.attempt.job}: {HANDED_BACK}") if struck and resumed else None


def _next_version(scene: Scene) -> Path:
    """Write the code of a version with one more field and one more migration, and migrate. Returns its folder."""
    cluster = scene.cluster
    number = len(list(cluster.home.glob("version-*"))) + 1
    folder = cluster.home / f"version-{number}"
    for name in ("app", "worker", "migrations"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    versions = folder / "migrations" / "versions"
    last_revision = sorted(path.name[:4] for path in versions.glob("0*.py"))[-1]
    for step in range(1, number + 1):
        revision = f"{int(last_revision) + 1:04d}"
        text = NEXT_MIGRATION.format(revision=revision, last_revision=last_revision)
        (versions / f"{revision}_next_{step}.py").write_text(text)
        last_revision = revision
    spec = folder / "app" / "spec" / "job.py"
    before, priority, after = spec.read_text().partition("    priority: ")
    assert priority, f"{spec} has no field 'priority', before which the next version's field goes"
    spec.write_text(before + NEXT_FIELD.format(number=number) + after)
    environment = cluster.programs["cpu-1"].environment | {"PYTHONPATH": str(folder)}
    # A separate process: the new version's migrations are another package of the same name.
    migrate = [sys.executable, "-m", "app.cli.main", "migrate"]
    subprocess.run(migrate, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    return folder

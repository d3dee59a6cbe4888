"""PostgreSQL: dead, paused, cut off, restored, or with a clock that jumps; and the PgBouncer before it."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from app.jobs.states import ACTIVE
from tests.faults.cluster import REPOSITORY, Line
from tests.faults.proxy import Connection
from tests.faults.scene import Scene, Strike, evidence_of
from tests.helpers.servers import postgres_program, wait_until

STEPS_AFTER_DUMP = 30
"""Steps that a training goes on after a dump: it writes two more checkpoints."""


def restart_postgres(scene: Scene) -> Strike | None:
    """PostgreSQL dies with all its connections, and comes back."""
    family = _family(scene.cluster.postgres.process.pid)
    scene.cluster.postgres.end(signal.SIGQUIT)
    # A dying process still holds the shared memory, and then the next server does not start.
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family), "the end of PostgreSQL")
    scene.cluster.postgres.start()
    line = scene.line("heartbeat failed", "database out of reach", seconds=8)
    return Strike(evidence_of(line)) if line else None


def restart_pgbouncer(scene: Scene) -> Strike | None:
    """PgBouncer is killed with all its connections, and comes back."""
    scene.cluster.pooler.end(signal.SIGKILL)
    time.sleep(scene.random.uniform(0, 3))
    scene.cluster.pooler.start()
    line = scene.line("heartbeat failed", "database out of reach", seconds=8)
    return Strike(evidence_of(line), same_attempt=True) if line else None


def cut_postgres(scene: Scene) -> Strike | None:
    """Connections of the workers break in the middle of a transaction, on the way there or on the way back."""
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
        line = scene.line("heartbeat failed", "database out of reach", seconds=5)
    finally:
        scene.cluster.database.spoil = None
    return Strike(evidence_of(line)) if line else None


def pause_postgres(scene: Scene) -> Strike | None:
    """PostgreSQL does nothing for 30 s, longer than a lease. The training goes on, and no attempt is lost."""
    pids = _family(scene.cluster.postgres.process.pid)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(30)
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    line = scene.line("lease not renewed in time", seconds=5)
    return Strike(evidence_of(line), same_attempt=True) if line else None


def read_only_postgres(scene: Scene) -> Strike | None:
    """PostgreSQL answers and takes no writes for a minute, as in a failover. No attempt is lost."""
    with scene.cluster.sql() as connection:
        connection.execute("SET default_transaction_read_only = off")
        connection.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        connection.execute("SELECT pg_reload_conf()")
        try:
            line = scene.line("heartbeat failed", "database out of reach", seconds=30)
            time.sleep(max(0.0, scene.began + 60 - time.monotonic()))
        finally:
            connection.execute("SET default_transaction_read_only = off")
            connection.execute("ALTER SYSTEM RESET default_transaction_read_only")
            connection.execute("SELECT pg_reload_conf()")
    return Strike(evidence_of(line), same_attempt=True) if line else None


def set_the_clock(scene: Scene) -> Strike | None:
    """PostgreSQL's clock jumps by five minutes, forward or back. Later it is set right."""
    jump = scene.random.choice([-300.0, 300.0])
    scene.cluster.set_clock(jump)
    try:
        line = scene.line("no lease is taken for a while", seconds=10, job=False)
        time.sleep(scene.random.uniform(0, 4))
        struck = scene.running()
    finally:
        scene.cluster.set_clock(0.0)
    return Strike(f"{jump:+.0f} s; {evidence_of(line)}", same_attempt=True) if line and struck else None


def restore(scene: Scene) -> Strike | None:
    """All machines are lost. The database comes back from a dump, and the objects are newer than it.

    Half of the times another attempt has gone on after the dump. The steps are those of docs/deployment.md.
    """
    cluster, job = scene.cluster, scene.attempt.job
    dump, url = str(cluster.home / "dump.sql"), f"host=127.0.0.1 port={cluster.postgres.port} user=dpo dbname=postgres"
    step = (scene.workload.row(job).progress or {}).get("step", 0)
    subprocess.run([postgres_program("pg_dump"), "--no-owner", "--clean", "--file", dump, url], check=True)
    if not scene.running():
        return None
    if scene.random.random() < 0.5:
        scene.runner.signal(signal.SIGTERM)
        scene.runner.wait(60)
        scene.runner.start()

    def went_on() -> bool:
        row = scene.workload.row(job)
        return row.status not in ACTIVE or (row.progress or {}).get("step", 0) >= step + STEPS_AFTER_DUMP

    wait_until(went_on, f"{job} to go on after the dump")
    for program in cluster.programs.values():
        program.kill()
    # In one transaction: the harness prunes beside, and must never see an empty table of files.
    psql = [
        postgres_program("psql"),
        "--quiet",
        "--set",
        "ON_ERROR_STOP=1",
        "--single-transaction",
        "--file",
        dump,
        url,
    ]
    subprocess.run(psql, check=True, stdout=subprocess.DEVNULL)
    restored_at = time.monotonic()
    fsck = [sys.executable, "-m", "app.cli.main", "fsck", "--repair", "--drop-webhooks"]
    program = cluster.programs["cpu-1"]
    mended = subprocess.run(fsck, cwd=REPOSITORY, env=program.environment, capture_output=True, text=True)
    if mended.returncode:
        scene.workload.problems.append(f"fsck ended with status {mended.returncode}: {mended.stdout}{mended.stderr}")
    cluster.revive()

    def starts_again(line: Line) -> bool:
        return line.get("event") == "trainer started" and line["job"] == job

    if cluster.logs.wait(starts_again, restored_at, 90) is None:
        scene.workload.problems.append(f"{job}: no attempt after the restore")
    said = next((line for line in mended.stdout.splitlines() if job in line), f"{job} is at step {step} again")
    return Strike(f"fsck: {said}")


def _family(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *map(int, children)]

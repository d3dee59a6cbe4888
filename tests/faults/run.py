"""One cluster's share of a fault run: faults are injected into trainings one by one, and everything is checked."""

import json
import math
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from app.jobs.states import ACTIVE
from app.prune import prune
from tests.faults.cluster import Cluster, cluster
from tests.faults.faults import FAULTS, missing
from tests.faults.scene import Scene
from tests.faults.workload import Attempt, Workload, orphans
from tests.helpers.servers import wait_until

PRUNE_SECONDS, MIN_AGE_SECONDS = 30.0, 120.0
TRIES = 5
"""Tries of a fault. A try that comes too late or changes nothing does not count as a strike."""


@dataclass
class ClusterOutcome:
    """The outcome of one cluster: its strikes, its problems, and the counts at the end."""

    strikes: list[dict[str, object]] = field(default_factory=list)
    misses: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    lacking: dict[str, str] = field(default_factory=dict)
    counted: dict[str, int] = field(default_factory=dict)
    fakes_time: bool = False


def inject(plan: list[str], seed: int, minutes: float = math.inf) -> ClusterOutcome:
    """Inject the faults of `plan` one by one into a new cluster, as many as `minutes` allow."""
    outcome, deadline = ClusterOutcome(), time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="dpo-faults-", ignore_cleanup_errors=True) as name:
        home = Path(name)
        with _keep_logs(home / "logs", outcome), cluster(home) as running_cluster:
            outcome.fakes_time = running_cluster.fakes_time
            outcome.lacking = {fault: lack for fault in set(plan) if (lack := missing(fault, running_cluster))}
            workload = Workload(running_cluster, random.Random(seed))
            workload.prepare()
            remaining = [fault for fault in plan if fault not in outcome.lacking]
            stop = threading.Event()
            pruner = threading.Thread(target=_prune, args=(workload, stop))
            pruner.start()
            while remaining and time.monotonic() < deadline:
                _one_training(remaining, running_cluster, workload, outcome)
                print(f"cluster {seed}: {len(remaining)} of {len(plan)} faults left", file=sys.stderr, flush=True)
            stop.set()
            pruner.join()
            outcome.counted = workload.check_all()
            workload.close()
            outcome.problems += workload.problems
        if outlived := orphans(home):
            outcome.problems.append(f"processes that outlived the service: {outlived}")
    return outcome


def _prune(workload: Workload, stop: threading.Event) -> None:
    """Prune again and again beside the faults, as workers do every hour. PostgreSQL may be unavailable."""
    while not stop.wait(PRUNE_SECONDS):
        with suppress(SQLAlchemyError):
            prune(workload.cluster.services, delete=True, min_age=MIN_AGE_SECONDS)


@contextmanager
def _keep_logs(logs: Path, outcome: ClusterOutcome) -> Iterator[None]:
    """Copy the logs of a run that had problems. A run that breaks off is itself a problem."""
    try:
        yield
    except Exception as error:
        outcome.problems.append(f"the run broke off: {type(error).__name__}: {error}")
    if outcome.problems:
        copy = Path(tempfile.mkdtemp(prefix="dpo-faults-logs-"))
        shutil.copytree(logs, copy, dirs_exist_ok=True)
        outcome.problems.append(f"logs kept in {copy}")


def _one_training(remaining: list[str], running_cluster: Cluster, workload: Workload, outcome: ClusterOutcome) -> None:
    """Disturb one training until it has ended or no faults remain, and check its result."""
    job, strikes = workload.submit(), list[dict[str, object]]()
    problems_before = len(workload.problems)
    while remaining and (attempt := _at_work(job, workload)) is not None:
        time.sleep(workload.random.uniform(0.0, 1.5))
        strike = _strike(remaining[0], Scene(running_cluster, workload, workload.random, attempt))
        if strike is None:
            outcome.misses.append(remaining[0])
            if Counter(outcome.misses)[remaining[0]] % TRIES == 0:
                print(f"{remaining[0]}: does not strike", file=sys.stderr, flush=True)
                remaining.pop(0)
        else:
            strikes.append(strike)
            remaining.pop(0)
    workload.check(job)
    new_problems = workload.problems[problems_before:]
    for strike in strikes:
        strike["wrong"] = new_problems
    if new_problems:
        print(json.dumps([[strike["fault"] for strike in strikes], new_problems]), file=sys.stderr, flush=True)
    outcome.strikes += strikes


def _at_work(job: str, workload: Workload) -> Attempt | None:
    """The attempt that trains now and has made progress. None if the job has ended."""
    attempts: list[Attempt] = []

    def progress() -> bool:
        row = workload.row(job)
        if row.status not in ACTIVE:
            return True
        if row.status == "running" and row.lost_attempts == 0 and (row.progress or {}).get("step"):
            attempt = workload.started(job, row.attempt, seconds=0)
            attempts.extend([attempt] if attempt else [])
        return bool(attempts)

    wait_until(progress, f"progress of {job}")
    return attempts[-1] if attempts else None


def _strike(fault: str, scene: Scene) -> dict[str, object] | None:
    """Inject one fault, undo all disturbances, and check that the training goes on."""
    workload, job = scene.workload, scene.attempt.job
    try:
        strike = FAULTS[fault](scene)
    except ProcessLookupError:  # the training had just ended
        strike = None
    except Exception as error:
        workload.problems.append(f"{fault} on {job}: {type(error).__name__}: {error}")
        strike = None
    for proxy in scene.cluster.proxies:
        proxy.heal()
    scene.cluster.revive()
    if strike is None:
        return None
    for other_job in strike.other_jobs:
        workload.check(other_job)
    if strike.same_attempt:
        healed_at = time.monotonic()
        step = (workload.row(job).progress or {}).get("step", 0)

        def went_on() -> bool:
            row = workload.row(job)
            moved = (row.progress or {}).get("step", 0) > step and time.monotonic() > healed_at
            return row.status not in ACTIVE or row.attempt != scene.attempt.number or moved

        wait_until(went_on, f"{job} to go on after {fault}")
        if workload.row(job).attempt != scene.attempt.number:
            workload.problems.append(f"{fault} cost {job} an attempt")
    return {"fault": fault, "evidence": strike.evidence, "recovery": strike.recovery}

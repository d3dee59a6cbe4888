"""One cluster's share of a fault run: fault after fault into trainings that go on, and everything checked at the end."""

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
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from app.jobs.states import ACTIVE
from app.prune import prune
from tests.faults.cluster import Cluster, cluster
from tests.faults.faults import FAULTS, missing
from tests.faults.scene import Scene
from tests.faults.workload import Attempt, Workload, orphans
from tests.helpers.servers import wait_until

PRUNE_SECONDS, GRACE_SECONDS = 30.0, 120.0
TRIES = 5
"""For a fault that struck too late or changed nothing: that does not count, and it is tried again."""


@dataclass
class Found:
    """What one cluster saw: strikes by fault, what was wrong, and what was counted at the end."""

    strikes: list[dict[str, Any]] = field(default_factory=list)
    misses: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    lacking: dict[str, str] = field(default_factory=dict)
    counted: dict[str, int] = field(default_factory=dict)
    fakes_time: bool = False


def inject(plan: list[str], seed: int, minutes: float = math.inf) -> Found:
    """Inject the faults of `plan` one after the other into a cluster of its own, those that it comes to in `minutes`."""
    found, deadline = Found(), time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="dpo-faults-", ignore_cleanup_errors=True) as name:
        home = Path(name)
        with _kept(home / "logs", found), cluster(home) as parts:
            found.fakes_time = parts.fakes_time
            found.lacking = {fault: lack for fault in set(plan) if (lack := missing(fault, parts))}
            workload = Workload(parts, random.Random(seed))
            workload.prepare()
            left = [fault for fault in plan if fault not in found.lacking]
            stop = threading.Event()
            pruner = threading.Thread(target=_prune, args=(workload, stop))
            pruner.start()
            while left and time.monotonic() < deadline:
                _one_training(left, parts, workload, found)
                print(f"cluster {seed}: {len(left)} of {len(plan)} faults left", file=sys.stderr, flush=True)
            stop.set()
            pruner.join()
            found.counted = workload.check_all()
            workload.close()
            found.problems += workload.problems
        if outlived := orphans(parts):
            found.problems.append(f"processes that outlived the service: {outlived}")
    return found


def _prune(workload: Workload, stop: threading.Event) -> None:
    """Sweep beside all that goes wrong, as workers do every hour; PostgreSQL may be away."""
    while not stop.wait(PRUNE_SECONDS):
        with suppress(SQLAlchemyError):
            prune(workload.cluster.services, delete=True, grace=GRACE_SECONDS)


@contextmanager
def _kept(logs: Path, found: Found) -> Iterator[None]:
    """Copy the logs of a run in which something was wrong, and say so where the run itself breaks off."""
    try:
        yield
    except Exception as error:
        found.problems.append(f"the run broke off: {type(error).__name__}: {error}")
    if found.problems:
        kept = Path(tempfile.mkdtemp(prefix="dpo-faults-logs-"))
        shutil.copytree(logs, kept, dirs_exist_ok=True)
        found.problems.append(f"logs kept in {kept}")


def _one_training(left: list[str], parts: Cluster, workload: Workload, found: Found) -> None:
    """Disturb one training until it has ended or there are no faults `left`, and check what it made."""
    job, strikes = workload.submit(), list[dict[str, Any]]()
    before = len(workload.problems)
    while left and (attempt := _at_work(job, workload)) is not None:
        time.sleep(workload.random.uniform(0.0, 1.5))
        strike = _strike(left[0], Scene(parts, workload, workload.random, attempt))
        if strike is None:
            found.misses.append(left[0])
            if Counter(found.misses)[left[0]] % TRIES == 0:
                print(f"{left[0]}: does not strike", file=sys.stderr, flush=True)
                left.pop(0)
        else:
            strikes.append(strike)
            left.pop(0)
    workload.check(job)
    wrong = workload.problems[before:]
    for strike in strikes:
        strike["wrong"] = wrong
    if wrong:
        print(json.dumps([[strike["fault"] for strike in strikes], wrong]), file=sys.stderr, flush=True)
    found.strikes += strikes


def _at_work(job: str, workload: Workload) -> Attempt | None:
    """The attempt that trains now and has got further than the one before it; None where the job has ended."""
    seen: list[Attempt] = []

    def progress() -> bool:
        row = workload.row(job)
        if row.status not in ACTIVE:
            return True
        if row.status == "running" and row.lost_attempts == 0 and row.progress:
            attempt = workload.started(job, row.attempt, seconds=0)
            seen.extend([attempt] if attempt else [])
        return bool(seen)

    wait_until(progress, f"progress of {job}")
    return seen[-1] if seen else None


def _strike(fault: str, scene: Scene) -> dict[str, Any] | None:
    """Inject one fault, make everything whole again, and see that the training goes on as it should."""
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
    for other in strike.more:
        workload.check(other)
    if strike.same_attempt:
        after = time.monotonic()
        step = (workload.row(job).progress or {}).get("step", 0)

        def went_on() -> bool:
            row = workload.row(job)
            moved = (row.progress or {}).get("step", 0) > step and time.monotonic() > after
            return row.status not in ACTIVE or row.attempt != scene.attempt.number or moved

        wait_until(went_on, f"{job} to go on after {fault}")
        if workload.row(job).attempt != scene.attempt.number:
            workload.problems.append(f"{fault} cost {job} an attempt")
    return {"fault": fault, "evidence": strike.evidence, "recovery": strike.recovery}

"""The training that a fault strikes, and the strike that the fault reports."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from app.jobs.states import ACTIVE
from tests.faults.cluster import Cluster, Line, Program
from tests.faults.workload import Attempt, Workload

HANDED_BACK = "The worker stops; the job will resume."


@dataclass
class Strike:
    """A fault that has struck: the log line that proves it, and seconds from a kill to the next attempt's process."""

    evidence: str
    recovery: float | None = None
    same_attempt: bool = False
    """The training must go on in the same attempt."""
    other_jobs: list[str] = field(default_factory=list)
    """Other jobs that the fault created. They must succeed."""


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
        """The next log line of one of `events`; a line about this job, unless `job` is false."""

        def matches(line: Line) -> bool:
            return str(line.get("event", "")).startswith(events) and (not job or line.get("job") == self.attempt.job)

        return self.cluster.logs.wait(matches, self.began, seconds)

    def next_attempt(self, seconds: float = 90.0) -> float | None:
        """Seconds from the strike to the next attempt's process."""
        attempt = self.workload.started(self.attempt.job, self.attempt.number + 1, seconds)
        return None if attempt is None else attempt.seen_at - self.began

    def after_next_attempt(self, line: Line | None, recovery: bool = True) -> Strike | None:
        """The strike that `line` proves, once another attempt runs."""
        if line is None:
            return None
        seconds = self.next_attempt()
        if seconds is None:
            self.workload.problems.append(f"{self.attempt.job}: no new attempt after {line['event']}")
        return Strike(evidence_of(line), seconds if recovery else None)


def evidence_of(line: Line) -> str:
    """A log line as evidence in the report."""
    return f"{line['program']}: {line.get('event')} ({line.get('job', 'no job named')})"


Fault = Callable[[Scene], Strike | None]

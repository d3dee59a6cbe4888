"""What a fault sees of the training that it strikes, and what it says of its strike."""

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
        return Strike(shown(line), seconds if recovery else None)


def shown(line: Line) -> str:
    """A line as evidence."""
    return f"{line['program']}: {line.get('event')} ({line.get('job', 'no job named')})"


Fault = Callable[[Scene], Strike | None]

"""A machine of a Ray cluster is cut off. Its job waits for another machine, and goes on there."""

import time

from tests.faults.scene import Scene, Strike, evidence_of
from tests.faults.workload import ON_MACHINES
from tests.helpers.servers import wait_until


def cut_one_node(scene: Scene) -> Strike | None:
    """Pull the network cable of one of the two machines of a training. Another machine comes in its place."""
    hosts, workload = scene.cluster.hosts(), scene.workload
    if "wide" not in workload.expected:
        workload.expect("wide")
    job = workload.submit("wide", **ON_MACHINES)
    wait_until(lambda: (workload.row(job).progress or {}).get("step"), f"progress of {job}")
    attempt = workload.started(job, workload.row(job).attempt)
    assert attempt is not None
    time.sleep(scene.random.uniform(0.0, 2.5))
    cut, began = scene.random.choice(hosts.connected), time.monotonic()
    hosts.cut(cut)
    line = scene.cluster.logs.wait(
        lambda line: line.get("event") == "attempt lost" and line.get("job") == job, began, seconds=60
    )
    hosts.add(2, scene.cluster.wide_models)
    if line is None:  # it ended just before
        workload.check(job)
        return None
    following = workload.started(job, attempt.number + 1)
    if following is None:
        workload.problems.append(f"{job}: no new attempt after the cut of a machine")
        return None
    return Strike(evidence_of(line), following.seen_at - began, other_jobs=[job])

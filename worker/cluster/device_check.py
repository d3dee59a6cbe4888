"""`python -m worker.cluster.device_check ADDRESS RESOURCE MACHINES`: compute on devices of a cluster's machines.

MACHINES is a JSON object: the number of devices by machine. With 0, all of its devices are tested beside the jobs that
use them. If one fails, it says why and ends with status 1.
"""

import json
import os
import subprocess
import sys

from app.programs import command
from worker.cluster.__main__ import connect, last_line
from worker.processes import trainer_environment


def check(kind: str, count: int) -> str | None:
    """Why the devices of this process cannot be used; None if they can. Ray gives it `count`. With 0 it takes all."""
    if count == 0:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    program = command("worker.trainer.device_check", kind)
    done = subprocess.run(program, capture_output=True, text=True, env=trainer_environment())
    said = f"{done.stdout}\n{done.stderr}".strip().splitlines()
    return None if done.returncode == 0 else said[-1] if said else f"status {done.returncode}"


def main() -> None:
    """Check the devices of the command line. A machine that is gone needs no check."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    address, resource, machines = sys.argv[1:]
    connect(address)
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    checks = {}
    for name, count in json.loads(machines).items():
        if name in alive:
            strategy = NodeAffinitySchedulingStrategy(name, soft=False)
            options = {"num_gpus": count, "num_cpus": 0} if resource == "GPU" else {"num_cpus": count}
            task = ray.remote(max_retries=0, scheduling_strategy=strategy, **options)(check)
            checks[name] = task.remote("cuda" if resource == "GPU" else "cpu", count)
    for name, reference in checks.items():
        try:
            problem = ray.get(reference)
        except ray.exceptions.RayError as error:
            problem = last_line(error)
        if problem is not None:
            sys.exit(f"machine {name[:8]} of the cluster: {problem}")


if __name__ == "__main__":
    main()

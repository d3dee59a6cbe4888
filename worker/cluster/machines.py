"""`python -m worker.cluster.machines ADDRESS RESOURCE`: the machines of a Ray cluster that have devices.

It prints them as one line of JSON, again and again, until its standard input closes. A process that has joined a
cluster ends when the cluster does. So the worker, which must live on, asks this one.
"""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

from app.programs import command
from worker.device import DeviceUnusable, find_devices
from worker.processes import kill_group, trainer_environment

TOLD_SECONDS = 1.0
"""Interval of the lines."""
SILENT_SECONDS = 20.0
"""A cluster that tells nothing for so long counts as unreachable."""
HUNG_SECONDS = 150.0
"""A process that tells nothing for so long is replaced. To join a cluster takes up to 120 s."""
RESTART_SECONDS = 10.0
"""The shortest interval at which the process that asks the cluster is started again."""
ASK_AGAIN_SECONDS = 30.0
"""How long a machine that could not tell about its devices is left alone."""


@dataclass(frozen=True)
class Machine:
    """A machine of a cluster: the number of its devices, their name, and the memory of the smallest in bytes.

    `is_planned`: it is still to start.
    """

    id: str
    devices: int
    device_name: str
    memory_bytes: int
    is_planned: bool = False


class Machines:
    """Knows the machines of a cluster. `resource` is the one of Ray that counts devices: GPU or CPU."""

    def __init__(self, address: str, resource: str) -> None:
        self.address, self.resource = address, resource
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._told: list[Machine] = []
        self._heard = self._due = 0.0
        self._last_line = ""

    def now(self) -> list[Machine]:
        """The machines that are there. Raises `DeviceUnusable` if the cluster does not answer."""
        if find_spec("ray") is None:
            raise DeviceUnusable("DPO_RAY_ADDRESS needs Ray: install the extra 'cluster'")
        with self._lock:
            has_ended = self._process is None or self._process.poll() is not None
            now = time.monotonic()
            if now >= self._due and (has_ended or now - max(self._heard, self._due) > HUNG_SECONDS):
                self._start()
        if time.monotonic() - self._heard > SILENT_SECONDS:
            state = "has not answered yet" if self._heard == 0.0 else "does not answer"
            said = f": {self._last_line[:300]}" if self._last_line else ""
            raise DeviceUnusable(f"the Ray cluster at {self.address} {state}{said}")
        return self._told

    def close(self) -> None:
        """End the process that asks the cluster."""
        if self._process is not None:
            kill_group(self._process)

    def _start(self) -> None:
        self.close()
        self._due = time.monotonic() + RESTART_SECONDS
        self._process = subprocess.Popen(
            command("worker.cluster.machines", self.address, self.resource),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=trainer_environment(("RAY_",)),
        )
        threading.Thread(target=self._listen, args=(self._process,), daemon=True).start()

    def _listen(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                told = [Machine(**fields) for fields in json.loads(line)]
            except (ValueError, TypeError):  # Ray or Python says it
                self._last_line = line.decode(errors="replace").strip() or self._last_line
            else:
                self._told, self._heard = told, time.monotonic()


class _Known:
    """Knows the devices of the machines. It asks each machine once."""

    def __init__(self, resource: str) -> None:
        self.resource = resource
        self._told: dict[str, tuple[str, int]] = {}
        self._asked: dict[str, Any] = {}
        self._due: dict[str, float] = {}

    def now(self) -> list[Machine]:
        """The machines that have devices, as far as they have told."""
        import ray

        machines = []
        for node in ray.nodes():
            name, count = node["NodeID"], int(node["Resources"].get(self.resource, 0))
            if not node["Alive"] or count == 0:
                continue
            if name not in self._told:
                self._ask(name, count)
            if name in self._told:
                machines.append(Machine(name, count, *self._told[name]))
        return sorted(machines, key=lambda machine: machine.id)

    def _ask(self, name: str, count: int) -> None:
        """Ask the machine `name` for its devices, or take its answer."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from worker.cluster.__main__ import last_line

        if name not in self._asked and time.monotonic() > self._due.get(name, 0.0):
            strategy = NodeAffinitySchedulingStrategy(name, soft=False)
            task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=strategy)(tell)
            self._asked[name] = task.remote(self.resource, count)
        elif name in self._asked and ray.wait([self._asked[name]], timeout=0)[0]:
            try:
                self._told[name] = ray.get(self._asked.pop(name))
            except ray.exceptions.RayError as error:
                print(f"the machine {name[:8]} does not tell its devices: {last_line(error)}", flush=True)
                self._due[name] = time.monotonic() + ASK_AGAIN_SECONDS


def tell(resource: str, count: int) -> tuple[str, int]:
    """(name, memory of the smallest in bytes) of this machine's devices. `count` is the number of its CPU devices."""
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray hides all GPUs from a task that takes none
    try:
        devices = find_devices("cuda" if resource == "GPU" else "cpu", count)
    except DeviceUnusable as error:  # of a package that its reader may lack
        raise RuntimeError(str(error)) from None
    return devices[0].name, min(device.memory_bytes for device in devices)


def main() -> None:
    """Print the machines of the cluster of the command line."""
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    from worker.cluster.__main__ import connect

    address, resource = sys.argv[1:]
    try:
        connect(address)
    except ConnectionError as error:
        sys.exit(str(error))
    known = _Known(resource)
    while True:
        print(json.dumps([asdict(machine) for machine in known.now()]), flush=True)
        time.sleep(TOLD_SECONDS)


if __name__ == "__main__":
    main()

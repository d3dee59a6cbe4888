"""The devices of a Ray cluster, and whether a worker can trust them."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import structlog

from app.programs import command
from app.settings import Settings
from app.spec.json_types import JsonObject
from worker.cluster.machines import Machine, Machines
from worker.device import Device, DeviceUnusable, placement
from worker.device_health import DeviceHealth
from worker.processes import trainer_environment
from worker.waiting import Check, always_wanted

log = structlog.get_logger(__name__)

PATIENCE, GROWING_PATIENCE = 60.0, 1800.0
"""Seconds that a job waits for its devices, in a cluster of fixed size and in one that starts machines when needed."""


class ClusterHealth(DeviceHealth):
    """The devices of a cluster's machines, with those of the machines that its autoscaler may add."""

    def __init__(self, settings: Settings, check: Check = always_wanted) -> None:
        self.resource = "CPU" if settings.device == "cpu" else "GPU"
        self.growth = settings.growth
        self.is_absent = False
        """Whether nothing but the absence of devices keeps the worker from claiming."""
        self.machines = Machines(settings.ray_address, self.resource)
        super().__init__(settings.device, check=check)

    def usable(self) -> bool:
        """Whether the worker may claim a job now. Machines come and go, so they are looked at each time."""
        try:
            self.devices = self._find()
        except DeviceUnusable as error:
            self._without_devices(str(error))
            return False
        if self.is_absent:
            self.problem, self.is_absent = None, False
        return super().usable()

    def placement(self, devices: Sequence[Device]) -> JsonObject:
        """The fields of `run.json` that tell the training's program its machines."""
        counts = sorted(Counter(devices).items(), key=lambda item: -item[1])
        cluster = {
            "address": self.machines.address,
            "resource": self.resource,
            # In a cluster that grows, nobody knows yet which machine will be there for whom.
            "machines": [[device.machine if self.growth is None else None, count] for device, count in counts],
            "patience": PATIENCE if self.growth is None else GROWING_PATIENCE,
        }
        return placement(devices) | {"cluster": cluster}

    def close(self) -> None:
        self.machines.close()

    def _without_devices(self, reason: str) -> None:
        """The cluster does not answer, or has no machines now."""
        self.devices = []
        if self.problem is None or self.is_absent:  # else a device failed before, and has to be checked
            if reason != self.problem:
                log.warning("no devices", reason=reason)
            self.problem, self.is_absent = reason, True

    def _find(self) -> list[Device]:
        machines = self.machines.now()
        if self.growth is not None:
            count, devices, gigabytes = self.growth
            names = (f"new-{number}" for number in range(count - len(machines)))
            machines = [*machines, *(Machine(name, devices, "device", gigabytes * 10**9, True) for name in names)]
        if not machines:
            raise DeviceUnusable(f"no machine of the Ray cluster at {self.machines.address} has a {self.resource}")
        kind: Literal["cuda", "cpu"] = "cuda" if self.resource == "GPU" else "cpu"
        threads = 1 if kind == "cpu" else None
        found = [
            Device(kind, machine.device_name, machine.memory_bytes, None, threads, machine.id, machine.is_planned)
            for machine in machines
            for _ in range(machine.devices)
        ]
        return sorted(found, key=lambda device: (device.is_planned, device.memory_bytes))  # the smallest one first

    def _test(self, devices: Sequence[Device]) -> tuple[list[str], dict[str, str]]:
        """Without `devices` whose machines are known, each machine tests all of its own beside other jobs."""
        counts = Counter(device.machine for device in devices if self.growth is None)
        if not counts:
            counts = Counter({device.machine: 0 for device in self.devices if not device.is_planned})
        arguments = (self.machines.address, self.resource, json.dumps(counts))
        return command("worker.cluster.device_check", *arguments), trainer_environment(("RAY_",))

"""Whether the device of this worker can be trusted. A worker that doubts it claims no jobs.

A GPU can be lost or break while the worker lives. Then each job that it starts fails at once, and it would drain the
queue within seconds. So after a failure that looks like the device's, a small computation is checked against the CPU.
"""

import subprocess
import time
from collections.abc import Sequence

import structlog

from app.programs import command
from app.settings import DeviceSetting
from app.spec.json_types import JsonObject
from worker.device import Device, DeviceUnusable, find_devices, placement
from worker.processes import trainer_environment
from worker.waiting import Check, always_wanted, run_process, within

log = structlog.get_logger(__name__)

CHECK_SECONDS = 120.0
"""A check that takes longer counts as failed: a broken GPU often hangs."""
FIRST_PAUSE, LONGEST_PAUSE = 10.0, 600.0
"""Seconds out of service before the next check. They double each time, until a job succeeds."""


class DeviceHealth:
    """The devices of a worker, and `problem`: why the worker claims no jobs; None while it may.

    `devices` is empty until one is found. A worker without a device has a problem. A test of the devices ends at once
    with the error that `check` raises.
    """

    def __init__(self, wanted: DeviceSetting, cpu_devices: int = 0, check: Check = always_wanted) -> None:
        self.wanted, self.cpu_devices, self.check = wanted, cpu_devices, check
        self.devices: list[Device] = []
        self.problem: str | None = None
        self._failures, self._pause, self._next_check = 0, FIRST_PAUSE, 0.0
        try:
            self.devices = self._find()
        except DeviceUnusable as error:
            self._without_devices(str(error))

    @property
    def device(self) -> Device | None:
        """The first device; None if there is none. All devices of a worker are of its kind."""
        return self.devices[0] if self.devices else None

    def placement(self, devices: Sequence[Device]) -> JsonObject:
        """The fields of `run.json` that tell a trainer its devices."""
        return placement(devices)

    def usable(self) -> bool:
        """Whether the worker may claim a job now. Checks a device again that is out of service, once that is due."""
        if self.problem is not None and time.monotonic() >= self._next_check:
            problem = self._check()
            if problem is not None:
                self._take_out(problem)
            else:
                log.info("device back in service", was=self.problem)
                self.problem = None
        return self.problem is None

    def worked(self) -> None:
        """Record that a job has succeeded on the device."""
        self._failures, self._pause = 0, FIRST_PAUSE

    def at_fault(self, reason: str, devices: Sequence[Device] | None = None) -> bool:
        """Check `devices`, because of `reason`. Takes the worker out of service and returns True if the check fails.

        Other devices may be full of other jobs, so they are not checked. None checks all.
        """
        problem = self._check(devices)
        if problem is not None:
            self._take_out(f"{reason}; {problem}")
        return problem is not None

    def failed(self, reason: str, devices: Sequence[Device] | None = None) -> bool:
        """Record a failure of `devices` that looks like theirs. Returns whether one is at fault.

        If a check passes, the job may be at fault. After several such failures in a row, with no success between
        them, the device has to rest all the same: it may fail only under load.
        """
        self._failures += 1
        if self.at_fault(reason, devices):
            return True
        if self._failures > 1:
            self._take_out(f"{self._failures} attempts in a row failed on it, the last with: {reason}")
        return False

    def close(self) -> None:
        """Release what finds the devices."""

    def _without_devices(self, reason: str) -> None:
        """No device was found when the worker began."""
        self._take_out(reason)

    def _take_out(self, problem: str) -> None:
        log.error("device out of service", reason=problem, seconds=self._pause)
        self.problem, self._next_check = problem, time.monotonic() + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def _check(self, devices: Sequence[Device] | None = None) -> str | None:
        """Find all devices and compute on each of `devices`. Returns what is wrong with one; None if nothing is."""
        hangs = TimeoutError(f"a small computation on it did not end within {CHECK_SECONDS:.0f} s")
        check = within(CHECK_SECONDS, self.check, hangs)
        try:
            self.devices = self._find()
            program, variables = self._test(devices or ())
            environment = trainer_environment() | variables
            status, printed = run_process(program, check, env=environment, stderr=subprocess.STDOUT)
        except (DeviceUnusable, OSError) as error:
            return str(error)
        if status == 0:
            return None
        said = printed.decode(errors="replace").strip().splitlines()
        return said[-1][:500] if said else f"the program that checks it ended with status {status}"

    def _find(self) -> list[Device]:
        """All devices, at least one. Raises `DeviceUnusable`."""
        return find_devices(self.wanted, self.cpu_devices)

    def _test(self, devices: Sequence[Device]) -> tuple[list[str], dict[str, str]]:
        """The program that computes on `devices`, or on all if it is empty, and its environment variables."""
        visible = [device.visible for device in devices if device.visible is not None]
        variables = {"CUDA_VISIBLE_DEVICES": ",".join(visible)} if visible else {}
        return command("worker.trainer.device_check", self.devices[0].kind), variables

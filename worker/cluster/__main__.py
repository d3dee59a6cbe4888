"""`python -m worker.cluster WORKDIR`: train or evaluate in a work folder, on machines of a Ray cluster.

The program stands for a trainer: it has the same folder, events, answers, signals and exit statuses as
`worker.trainer`. Its part of `run.json` is `cluster`:

- `address`: of the cluster.
- `resource`: the one of Ray that counts devices, GPU or CPU.
- `machines`: a list of [id of a machine, number of devices there]. Without an id, any machine will do.
- `patience`: seconds until they must be there.

    take the machines → send the folder to each → start a trainer on each → relay what the first rank says

The cluster ends the machines' part when this process ends.
"""

import json
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from app.spec.json_types import JsonObject
from app.storage import files_below
from worker.cluster.host import Host, Output, identity, model_files, pieces, write_piece
from worker.disk import is_disk_fault
from worker.model_files import folder_at
from worker.trainer.errors import STOPPED, Stopped
from worker.trainer.events import Broken, DeviceFailed, Events, Failed, read
from worker.waiting import always_wanted, in_thread, within

ENVIRONMENT = {"RAY_ENABLE_AUTO_CONNECT": "0"}
"""Environment variables of Ray. Without this one, some of its calls would start a cluster on this machine."""
SENT_BYTES = 32 << 20
"""The most bytes of a file that are sent to the machines at a time."""
SILENT_SECONDS = 20.0
"""A machine that does not answer a request for so long counts as lost."""
LAST_SECONDS = 40.0
"""How long nothing may come when one machine has ended. A launcher gives its ranks 30 s."""
CONNECT_SECONDS, JOIN_SECONDS = 30.0, 120.0
"""A cluster that takes no connection, or does not let this process join, for so long cannot be used.

Ray's client server starts a process for each that joins, which takes long on a busy machine.
"""
START_SECONDS = 300.0
"""How long a machine may take to start its actor, which loads the service there."""
CLOSE_SECONDS, POLL_SECONDS = 5.0, 0.5


class MachineLost(Exception):
    """A machine of the training is gone, or cannot do its part. The message says which and why."""


class NotPlaced(Exception):
    """The cluster cannot hold the training now. The message says why."""


def load() -> None:
    """Import what every training needs. The fork server does it before the first job."""
    os.environ.update(ENVIRONMENT)
    import ray  # noqa: F401


def run(folder: Path) -> int:
    """Do the work of a job in `folder` on machines of the cluster. Returns the exit status."""
    stream = os.fdopen(os.dup(1), "w")  # only events go to the real standard output, as in a trainer
    os.dup2(2, 1)
    load()
    stopping, answers = threading.Event(), queue.Queue[bytes]()
    threading.Thread(target=_listen, args=(answers,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    about: JsonObject = json.loads((folder / "run.json").read_text())
    events = Events(stream)
    training = Training(folder, about, events, stopping, answers)
    # Ray's library sets a handler that aborts the process. A signal that comes meanwhile waits for ours.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        connect(about["cluster"]["address"])
        signal.signal(signal.SIGTERM, lambda *_: stopping.set())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return training.run()
    except Stopped:
        return STOPPED
    except (NotPlaced, ConnectionError) as error:
        events.emit(Broken(str(error), is_lost=False))
    except MachineLost as error:
        events.emit(Broken(str(error)))
    except OSError as error:
        events.emit(Broken(f"{type(error).__name__}: {error}"[:500], is_lost=not is_disk_fault(error)))
    finally:
        training.close()
    return 1


def connect(address: str) -> None:
    """Join the cluster. Raises `ConnectionError`."""
    import ray

    host, _, port = address.removeprefix("ray://").rpartition(":")
    join = partial(ray.init, address, namespace="dpo", log_to_driver=False, logging_level="error")
    hangs = TimeoutError(f"it does not answer within {JOIN_SECONDS:.0f} s")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        in_thread(join, within(JOIN_SECONDS, always_wanted, hangs))  # Ray itself would try for many minutes
    except Exception as error:  # of many kinds, from Ray and gRPC
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConnectionError(f"the Ray cluster at {address} cannot be used: {reason[0][:300]}") from error


def _listen(answers: "queue.Queue[bytes]") -> None:
    """Queue the runner's answers. End the process when standard input closes."""
    with os.fdopen(0, "rb") as stream:
        for line in stream:
            answers.put(line)
        os._exit(STOPPED)


class Training:
    """A job on several machines, the first of which has the first rank."""

    def __init__(
        self,
        folder: Path,
        about: JsonObject,
        events: Events,
        stopping: threading.Event,
        answers: "queue.Queue[bytes]",
    ) -> None:
        self.folder, self.about, self.events, self.stopping, self.answers = folder, about, events, stopping, answers
        self.cluster: JsonObject = about["cluster"]
        self.sizes = [size for _, size in self.cluster["machines"]]
        """The number of devices on each machine."""
        self.hosts: list[Any] = []
        """Handles of the actors, by machine."""
        self.names: list[str] = []
        """The names of the machines, once they have told them."""
        self.statuses: dict[int, int] = {}
        """The exit statuses of the trainers that have ended, by machine."""
        self.failures: list[Failed | Broken | DeviceFailed] = []
        self._requests: dict[Any, tuple[int, float]] = {}
        """(machine, when it counts as silent) of each request for outputs that is under way."""
        self._is_placing = True
        """Whether no trainer runs yet. Until then, a stop ends the work at once, and a trainer writes a checkpoint."""

    def run(self) -> int:
        """Do the work. Returns the exit status. Raises `NotPlaced`, `MachineLost`, `Stopped` or `OSError`."""
        self._take_machines()
        self._send_folder()
        self._start()
        return self._relay()

    def close(self) -> None:
        """Release the machines."""
        import ray

        if not ray.is_initialized():
            return
        with suppress(Exception):
            closing = [host.close.remote() for host in self.hosts]
            if closing:
                ray.wait(closing, num_returns=len(closing), timeout=CLOSE_SECONDS)
            ray.shutdown()

    # -- before ------------------------------------------------------------------------------------------------

    def _take_machines(self) -> None:
        """Wait until the cluster has the devices, and start an actor on each machine.

        A request that waits is a pending placement group, by which an autoscaler sees what is missing.
        """
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        resource, ids = self.cluster["resource"], [name for name, _ in self.cluster["machines"]]
        group = placement_group(
            [{resource: size} for size in self.sizes],
            strategy="STRICT_SPREAD",
            bundle_label_selector=[{} if name is None else {"ray.io/node-id": name} for name in ids],
        )
        ready, deadline = group.ready(), time.monotonic() + self.cluster["patience"]
        while not ray.wait([ready], timeout=POLL_SECONDS)[0]:
            self._check_stop()
            self.events.working("placing")
            if time.monotonic() > deadline:
                wanted = " and ".join(f"{size} × {resource}" for size in self.sizes)
                machines = "one machine" if len(ids) == 1 else f"{len(ids)} machines"
                raise NotPlaced(f"the Ray cluster had no room for {wanted} on {machines} in time")
        for number, size in enumerate(self.sizes):
            devices: JsonObject = {"num_gpus": size, "num_cpus": 0} if resource == "GPU" else {"num_cpus": size}
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number)
            actor = ray.remote(max_concurrency=4, max_restarts=0, scheduling_strategy=strategy, **devices)(Host)
            self.hosts.append(actor.remote(self.about["device"]))
        for number in range(len(self.hosts)):
            self._request_outputs(number, START_SECONDS)
        self.names = self._ask("name")

    def _send_folder(self) -> None:
        """Send the work folder to each machine. Base models are looked for there before they are sent.

        The folder also has files of the runner, such as those of integrations, which do not travel.
        """
        self.events.working("placing")
        bases: dict[str, str] = self.about.get("bases", {})
        for place, name in bases.items():
            if (self.folder / place).is_file():  # it stands for a base model of this machine
                folder = folder_at(self.folder / place)
                found = self._ask("find_base", place, name, str(folder), identity(folder))
                without = [number for number, has in enumerate(found) if not has]
                for path in model_files(folder) if without else ():
                    self._send(path, f"{place}/{path.relative_to(folder).as_posix()}", without)
        specs = ("spec.json", "evaluation.json", "labelling.json", "answered.jsonl")
        for place in (*specs, "parts", *self.about.get("placed", [])):
            path = self.folder / place
            if not (place in bases and path.is_file()):
                for file in files_below(path) if path.is_dir() else [path] if path.exists() else []:
                    self._send(file, file.relative_to(self.folder).as_posix())

    def _send(self, path: Path, name: str, machines: Sequence[int] | None = None) -> None:
        """Send the file `path` as `name` to `machines`, or to all."""
        import ray

        for offset, data in pieces(path, SENT_BYTES):
            self._ask("write", name, offset, ray.put(data), machines=machines)

    def _start(self) -> None:
        """Start the trainers."""
        self.events.working("loading")  # from here on the devices work, and the time counts
        shared = {name: value for name, value in self.about.items() if name != "cluster"}
        self._is_placing = False
        count = len(self.hosts)
        meetings = self._ask("meeting_place") if count > 1 else []
        for number, size in enumerate(self.sizes):
            machine: JsonObject = {}
            if count > 1:
                endpoint, interface = meetings[0].endpoint, meetings[number].interface
                fields = {"number": number, "count": count, "endpoint": endpoint, "interface": interface}
                machine = {"machine": fields}
            self._ask("start", shared | {"ranks": size} | machine, machines=[number])

    # -- during ------------------------------------------------------------------------------------------------

    def _relay(self) -> int:
        """Pass on events, files, logs and answers until all trainers have ended. Returns the exit status."""
        told, deadline = False, float("inf")
        while len(self.statuses) < len(self.hosts) and time.monotonic() < deadline:
            if self.stopping.is_set() and not told:
                told = True
                self._ask("stop", machines=[number for number in range(len(self.hosts)) if number not in self.statuses])
            self._pass_on_answers()
            came = self._wait([])
            if self.statuses and (came or deadline == float("inf")):
                deadline = time.monotonic() + LAST_SECONDS
        if self.failures:
            self.events.emit(min(self.failures, key=lambda event: event.time))
            return 1
        ends = set(self.statuses.values())
        if told and STOPPED in ends and ends <= {0, STOPPED}:  # another one may still wait for it at the meeting place
            return STOPPED
        if ends in ({0}, {STOPPED}) and len(self.statuses) == len(self.hosts):
            return ends.pop()
        told_ends = (f"{self._name(number)}: {_end(status)}" for number, status in sorted(self.statuses.items()))
        reason = f"a trainer ended early ({', '.join(told_ends)})"
        if any(status < 0 and status != -signal.SIGKILL for status in ends):  # as a device that breaks makes it
            self.events.emit(DeviceFailed(reason))
            return 1
        raise MachineLost(reason)

    def _pass_on_answers(self) -> None:
        with suppress(queue.Empty):
            while True:
                line = self.answers.get_nowait()
                path = Path("cache") / json.loads(line)["key"]
                if (self.folder / path).exists():
                    self._send(self.folder / path, path.as_posix(), [0])
                self._ask("answer", line, machines=[0])

    def _take(self, number: int, output: Output) -> None:
        """Take an output of the machine `number`."""
        match output.kind:
            case "log":
                sys.stderr.buffer.write(output.data)
                sys.stderr.flush()
            case "file":
                write_piece(self.folder / output.path, output.offset, output.data)
            case "ended":
                self.statuses[number] = output.status
            case "event":
                event = read(output.data)
                if isinstance(event, Failed | Broken | DeviceFailed):
                    self.failures.append(event)
                else:
                    self.events.emit(event)

    # -- requests ----------------------------------------------------------------------------------------------

    def _ask(self, method: str, *arguments: Any, machines: Sequence[int] | None = None) -> list[Any]:
        """The results of a method of the hosts, those of `machines` or all.

        Outputs are taken meanwhile. Raises `MachineLost` or `OSError`, and `Stopped` before the trainers run.
        """
        numbers = range(len(self.hosts)) if machines is None else machines
        references = [getattr(self.hosts[number], method).remote(*arguments) for number in numbers]
        left = list(references)
        while left:
            if self._is_placing:
                self._check_stop()
                self.events.working("placing")
            self._wait(left)
            left = self._not_ready(left)
        return [self._result(reference, number) for reference, number in zip(references, numbers, strict=True)]

    def _request_outputs(self, number: int, seconds: float = SILENT_SECONDS) -> None:
        """Ask a machine for its outputs. It counts as silent if it does not answer within `seconds`."""
        self._requests[self.hosts[number].outputs.remote()] = (number, time.monotonic() + seconds)

    def _wait(self, references: Sequence[Any]) -> bool:
        """Wait a moment for one of `references` or for outputs. Takes all outputs that are there.

        Returns whether there were any. Raises `MachineLost`.
        """
        import ray

        ray.wait([*references, *self._requests], num_returns=1, timeout=POLL_SECONDS)
        waiting = self._not_ready(list(self._requests))
        came = False
        for reference in [reference for reference in self._requests if reference not in waiting]:
            number, _ = self._requests.pop(reference)
            for output in self._result(reference, number):
                self._take(number, output)
                came = True
            if number not in self.statuses:
                self._request_outputs(number)
        for reference in waiting:
            number, deadline = self._requests[reference]
            if time.monotonic() > deadline and self._not_ready([reference]):
                raise MachineLost(f"the machine {self._name(number)} of the cluster does not answer")
        return came

    @staticmethod
    def _not_ready(references: Sequence[Any]) -> list[Any]:
        """Those of `references` whose results are not there yet."""
        import ray

        left: list[Any] = ray.wait(list(references), num_returns=len(references), timeout=0)[1] if references else []
        return left

    def _result(self, reference: Any, number: int) -> Any:
        """The result of a request that is done. Raises `MachineLost`, `NotPlaced`, or the `OSError` of the machine."""
        import ray

        name = self._name(number)
        try:
            return ray.get(reference)
        except ray.exceptions.RayActorError as error:
            said = last_line(error)
            if getattr(error, "_actor_init_failed", False):
                raise NotPlaced(f"the machine {name} of the cluster cannot run its part: {said}") from error
            raise MachineLost(f"the machine {name} of the cluster was lost: {said}") from error
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, OSError):
                raise error.cause from error
            raise MachineLost(f"the machine {name} of the cluster cannot do its part: {last_line(error)}") from error
        except ray.exceptions.RayError as error:
            raise MachineLost(f"the machine {name} of the cluster was lost: {last_line(error)}") from error

    def _name(self, number: int) -> str:
        return self.names[number] if self.names else f"{number + 1} of {len(self.sizes)}"

    def _check_stop(self) -> None:
        if self.stopping.is_set():
            raise Stopped


def last_line(error: Exception) -> str:
    """The last line of Ray's message, which tells the cause."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip()[:300]


def _end(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit status {status}"


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1])))

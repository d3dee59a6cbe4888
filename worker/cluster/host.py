"""One machine of a training: a Ray actor that holds devices, with a folder and a trainer of its own.

The training's program sends files and asks for outputs, again and again. Each request is also a sign of life: a host
that nobody asks any more ends its trainer and itself, as it does when its network is cut.
"""

import fcntl
import hashlib
import json
import os
import queue
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from app.file_lock import locked
from app.programs import command
from app.settings import Settings
from app.spec.json_types import JsonObject
from app.storage import files_below
from worker import hub
from worker.base_models import BaseModels, fingerprint
from worker.hub import ModelUnavailable
from worker.machine import usable_cpus
from worker.model_files import point_to, weight_files
from worker.processes import kill_group, trainer_environment
from worker.trainer.errors import STOPPED
from worker.trainer.events import (
    CacheMade,
    CheckpointWritten,
    CompletionsWritten,
    EvaluationDone,
    Event,
    LabellingDone,
    TrainingDone,
    read,
)

PIECE_BYTES = 8 << 20
"""The most bytes of a file in an output."""
WAITING_OUTPUTS = 8
"""The most outputs that wait for the training's program. The trainer waits for it then."""
ANSWER_SECONDS = 0.5
"""How long a request for outputs waits for the first one."""
LOG_SECONDS = 5.0
"""How long the log of a trainer that has ended may stay open, by a process that it has left."""
ABANDONED_SECONDS = 60.0
"""A host that nobody has asked for so long ends."""
GET_ADDRESS = 0x8915
"""The request of Linux for the address of a network interface (SIOCGIFADDR)."""


@dataclass(frozen=True)
class Output:
    """Something that a host passes on: an event's line, a piece of the log, a piece of a file, or the trainer's end.

    `path` and `offset` are those of a piece of a file, relative to the work folder. `status` is the exit status.
    """

    kind: Literal["event", "log", "file", "ended"]
    data: bytes = b""
    path: str = ""
    offset: int = 0
    status: int = 0


@dataclass(frozen=True)
class MeetingPlace:
    """Where launchers can meet on a machine, and its network interface to the others, if that is known."""

    endpoint: str
    interface: str | None


class Host:
    """A machine of a training. Its methods are called by the training's program, each in a thread."""

    def __init__(self, device: Literal["cuda", "cpu"]) -> None:
        self.settings, self.device = Settings(), device
        self.folder = _new_folder(self.settings.home / "work")
        self._process: subprocess.Popen[bytes] | None = None
        self._outputs: queue.Queue[Output] = queue.Queue(WAITING_OUTPUTS)
        self._was_asked_to_stop = False
        self._heard, self._closed = time.monotonic(), threading.Event()
        threading.Thread(target=self._end_if_abandoned, daemon=True).start()

    def name(self) -> str:
        """The name of this machine."""
        return socket.gethostname()

    def find_base(self, place: str, name: str, path: str, known: str) -> bool:
        """Let `place` in the work folder stand for the base model `name`; False if this machine does not have it.

        A folder counts if it has the identity `known`: the one at `path`, the one of that name in this machine's
        models folder, or the one that the hub gives.
        """
        (self.folder / place).parent.mkdir(parents=True, exist_ok=True)
        for folder in self._candidates(name, Path(path)):
            with suppress(OSError, ValueError):  # it is not there, or damaged
                if identity(folder) == known:
                    point_to(self.folder / place, folder)
                    return True
        return False

    def _candidates(self, name: str, path: Path) -> Iterator[Path]:
        yield path
        with suppress(ModelUnavailable, OSError):
            yield BaseModels(self.settings).locate(name)[0]

    def write(self, path: str, offset: int, data: bytes) -> None:
        """Write a piece of a file of the work folder."""
        self._heard = time.monotonic()
        write_piece(self.folder / path, offset, data)

    def meeting_place(self) -> MeetingPlace:
        """Where the launchers of all machines could meet here: a port that is free now."""
        import ray

        address = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind(("", 0))
            return MeetingPlace(f"{address}:{probe.getsockname()[1]}", interface_of(address))

    def start(self, run: JsonObject) -> None:
        """Start the trainer. `run` is the content of `run.json`."""
        variables = trainer_environment()
        if self.device == "cuda":
            run = run | {"visible": os.environ["CUDA_VISIBLE_DEVICES"].split(",")}  # set by Ray
            variables["OMP_NUM_THREADS"] = str(max(1, usable_cpus() // run["ranks"]))  # Ray says 1
        (self.folder / "run.json").write_text(json.dumps(run))
        self._process = process = subprocess.Popen(
            command("worker.trainer", str(self.folder)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            cwd=self.folder,
            env=variables,
        )
        threading.Thread(target=self._pass_on, args=(process,), daemon=True).start()

    def answer(self, line: bytes) -> None:
        """Give the trainer a line of the runner's."""
        with suppress(OSError):  # it has ended
            assert self._process is not None
            assert self._process.stdin is not None
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def stop(self) -> None:
        """Ask the trainer to stop."""
        self._was_asked_to_stop = True
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)

    def outputs(self) -> list[Output]:
        """The outputs since the last call. Waits a moment for the first one."""
        self._heard = time.monotonic()
        batch, size = list[Output](), 0
        with suppress(queue.Empty):
            batch.append(self._outputs.get(timeout=ANSWER_SECONDS))
            while (size := size + len(batch[-1].data)) < PIECE_BYTES:
                batch.append(self._outputs.get_nowait())
        return batch

    def close(self) -> None:
        """End the trainer, and remove the folder."""
        self._closed.set()
        if self._process is not None:
            kill_group(self._process)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _pass_on(self, process: "subprocess.Popen[bytes]") -> None:
        """Queue all outputs of the trainer, with its end as the last one."""
        assert process.stdout is not None
        assert process.stderr is not None
        log = threading.Thread(target=self._pass_on_log, args=(process.stderr,), daemon=True)
        log.start()
        try:
            for line in process.stdout:
                for path in self._files(read(line)):
                    self._pass_on_file(path)
                self._outputs.put(Output("event", line))
            status = process.wait()
        except (OSError, ValueError) as error:  # a disk fails, or the trainer was killed in the middle of a line
            process.kill()
            status = process.wait()
            self._outputs.put(Output("log", f"its events cannot be passed on: {error}\n".encode()))
        log.join(LOG_SECONDS)
        if self._was_asked_to_stop and status == -signal.SIGTERM:  # it had hardly begun
            status = STOPPED
        self._outputs.put(Output("ended", status=status))

    def _pass_on_log(self, log: IO[bytes]) -> None:
        for line in log:
            self._outputs.put(Output("log", line))

    def _files(self, event: Event) -> list[Path]:
        """The files that an event reports, which the runner needs before it sees the event."""
        match event:
            case CheckpointWritten(path=path) | CompletionsWritten(path=path):
                places = [self.folder / path]
            case CacheMade(key=key):
                places = [self.folder / "cache" / key]
            case TrainingDone():
                places = [self.folder / "output", self.folder / "result.csv"]
            case EvaluationDone() | LabellingDone():
                places = [self.folder / "output"]
            case _:
                places = []
        return [path for place in places for path in (files_below(place) if place.is_dir() else [place])]

    def _pass_on_file(self, path: Path) -> None:
        name = path.relative_to(self.folder).as_posix()
        for offset, data in pieces(path, PIECE_BYTES):
            self._outputs.put(Output("file", data, name, offset))
        if name.startswith("checkpoints/"):  # nobody reads it here
            path.unlink()

    def _end_if_abandoned(self) -> None:
        while not self._closed.wait(1.0):
            if time.monotonic() - self._heard > ABANDONED_SECONDS:
                self.close()
                os._exit(1)


def identity(folder: Path) -> str:
    """A hash of a model's weights, as `fingerprint` sees them, and of its small files whole.

    Another chat template makes other tokens. Raises `OSError` or `ValueError` if files are missing.
    """
    digest = hashlib.sha256(fingerprint(folder).encode())
    weights = set(weight_files(folder))
    for path in model_files(folder):
        if path not in weights:
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def model_files(folder: Path) -> list[Path]:
    """The files of a model that a trainer may read: those that the hub would be asked for."""

    weights = set(weight_files(folder))

    def is_wanted(path: Path) -> bool:
        if path.suffix == ".safetensors":
            return path in weights
        name = path.relative_to(folder)
        return any(map(name.match, hub.FILES)) and not any(map(name.match, hub.IGNORED))

    return [path for path in files_below(folder) if is_wanted(path)]


def pieces(path: Path, size: int) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of the pieces of a file, each of `size` bytes at most. An empty file has one."""
    with path.open("rb") as file:
        offset = 0
        while data := file.read(size):
            yield offset, data
            offset += len(data)
        if offset == 0:
            yield 0, b""


def write_piece(path: Path, offset: int, data: bytes) -> None:
    """Write a piece of a file. The pieces come in order, and the first one replaces an older file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb" if offset == 0 else "r+b") as file:
        file.seek(offset)
        file.write(data)


def interface_of(address: str) -> str | None:
    """The network interface whose IPv4 address is `address`; None if none has it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with suppress(OSError):  # it has no address
                answer = fcntl.ioctl(probe.fileno(), GET_ADDRESS, request)
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def _new_folder(parent: Path) -> Path:
    """A new work folder. The folders of this machine's hosts that were killed are removed: nobody holds their locks."""
    parent.mkdir(parents=True, exist_ok=True)
    prefix = f"host-{socket.gethostname()}-"
    with locked(parent / ".hosts.lock"):
        for left in parent.glob(f"{prefix}{'?' * 8}"):  # as `mkdtemp` names them
            with suppress(OSError), (left / "lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        lock = (folder / "lock").open("a")
        fcntl.flock(lock, fcntl.LOCK_EX)
        _locks.append(lock)
    return folder


_locks: list[IO[str]] = []
"""The locks of this process's folders, held until it ends."""

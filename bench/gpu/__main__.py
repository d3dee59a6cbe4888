"""`python -m bench.gpu`: this engine on a CUDA card, beside TRL, in one call of at most eight minutes.

The parts run in the order of their value, in a process that lasts until a part fails. The next part then gets a new
process, so a part that fails or hangs loses nothing but itself. All figures are written as soon as they are measured.

`--dry` runs all parts with tiny shapes on any device, as a test of this program.
"""

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from app.spec.json_types import JsonObject
from bench.gpu.parts import PARTS, Part

RESULTS = Path(__file__).parents[1] / "results"


class Worker:
    """A process that runs parts, one after the other (`bench.gpu.worker`)."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)  # the process has ended

    def start(self, part: Part) -> None:
        """Let the process run `part`."""
        assert self._process.stdin is not None
        self._process.stdin.write(part.name + "\n")
        self._process.stdin.flush()

    def next(self, seconds: float) -> JsonObject:
        """The next message of the process. Raises `TimeoutError` after `seconds`, and `EOFError` if it has died."""
        try:
            line = self._lines.get(timeout=max(0.0, seconds))
        except queue.Empty:
            raise TimeoutError from None
        if line is None:
            raise EOFError
        message: JsonObject = json.loads(line)
        return message

    def kill(self) -> int:
        """End the process and those that it started, at once. Returns its exit status."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._reader.join()
        with self._process as process:  # closes its pipes
            return process.wait()


class Record:
    """The figures of all parts so far, in a file that is always whole."""

    def __init__(self, file: Path, dry: bool) -> None:
        self.file, self.parts = file, dict[str, JsonObject]()
        self._whole: JsonObject = {"dry": dry, "parts": self.parts}

    def add(self, part: str, figures: JsonObject) -> None:
        """Add `figures` to those of `part`."""
        self.parts.setdefault(part, {}).update(figures)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        whole = self.file.with_suffix(".new")
        whole.write_text(json.dumps(self._whole, indent=1) + "\n")
        whole.replace(self.file)


def run(worker: Worker, part: Part, seconds: float, record: Record) -> bool:
    """Run `part` for at most `seconds`. Returns whether the process can run another one."""
    began = time.monotonic()
    worker.start(part)
    while True:
        try:
            message = worker.next(began + seconds - time.monotonic())
        except TimeoutError:
            record.add(part.name, {"error": f"stopped after {seconds:.0f} s"})
            return False
        except EOFError:
            record.add(part.name, {"error": f"the process ended with status {worker.kill()}"})
            return False
        record.add(part.name, message["figures"])
        if message["ended"]:
            record.add(part.name, {"seconds": round(time.monotonic() - began, 1)})
            return "error" not in message["figures"]


def main() -> None:
    """Run the parts, and print where their figures are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dry", action="store_true", help="tiny shapes on any device, as a test of this program")
    parser.add_argument("--minutes", type=float, default=8.0, help="everything ends after this time")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    default = Path(os.environ.get("OUT", RESULTS))
    parser.add_argument("--out", type=Path, default=default, help="the folder of gpu.json (default: bench/results)")
    arguments = parser.parse_args()
    if arguments.dry and arguments.out == RESULTS:
        parser.error("--dry needs --out: its figures are no results")
    deadline = time.monotonic() + 60 * arguments.minutes
    record, worker = Record(arguments.out / "gpu.json", arguments.dry), None
    for part in PARTS.values():
        if arguments.only and part.name not in arguments.only:
            continue
        left = deadline - time.monotonic()
        if left < 5:
            record.add(part.name, {"error": "no time was left"})
            continue
        worker = worker or Worker([sys.executable, "-m", "bench.gpu.worker", *(["--dry"] if arguments.dry else [])])
        if not run(worker, part, left if arguments.dry else min(left, part.seconds), record):
            worker.kill()
            worker = None
        print(f"{part.name}: {json.dumps(record.parts[part.name])}", flush=True)
    if worker is not None:
        worker.kill()
    print(f"written to {record.file}")
    if any("error" in figures for figures in record.parts.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

"""The fork server: its trainers equal those that are started alone, and a crash costs one of them at most."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.trainer import Event, dpo_method, make_pairs, make_work_folder
from worker.processes import Child, ForkServer, answer_cache

PAIRS = make_pairs(12)


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    """One server for all tests. It starts again by itself after a test that closes it."""
    server = ForkServer()
    yield server
    server.close()


def lay_out(folder: Path, model: Path, steps: int = 4) -> Path:
    spec = {"quantization": "none", "seed": 1, "method": dpo_method(max_steps=steps, batch_size=4)}
    return make_work_folder(folder, model, spec, train=PAIRS)


def follow(trainer: Child) -> Iterator[Event]:
    for line in trainer.stdout:
        event = json.loads(line)
        if event["kind"] == "wanted":
            answer_cache(trainer.stdin, event["key"])
        yield event


def run_to_the_end(trainer: Child) -> int:
    for _ in follow(trainer):
        pass
    status = trainer.wait()
    trainer.kill()
    return status


def wait_for_first_step(trainer: Child) -> None:
    """Wait for the metrics of its first step."""
    next(event for event in follow(trainer) if event["kind"] == "metrics")


def weights(folder: Path) -> bytes:
    return (folder / "output" / "adapter_model.safetensors").read_bytes()


def test_a_forked_trainer_makes_the_same_bytes_as_one_that_is_started_alone(
    server: ForkServer, llama: Path, tmp_path: Path
) -> None:
    alone = lay_out(tmp_path / "alone", llama)
    command = [sys.executable, "-m", "worker.trainer", str(alone)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert run_process_to_the_end(process) == 0
    for number in range(2):
        folder = lay_out(tmp_path / f"forked-{number}", llama)
        assert run_to_the_end(server.start(folder)) == 0
        assert weights(folder) == weights(alone)


def run_process_to_the_end(process: "subprocess.Popen[bytes]") -> int:
    assert process.stdin is not None
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event["kind"] == "wanted":
            answer_cache(process.stdin, event["key"])
    return process.wait()


def test_a_killed_trainer_reports_its_signal_and_the_next_one_starts(
    server: ForkServer, llama: Path, tmp_path: Path
) -> None:
    trainer = server.start(lay_out(tmp_path / "killed", llama, steps=10_000))
    wait_for_first_step(trainer)
    os.kill(trainer.pid, signal.SIGKILL)
    assert run_to_the_end(trainer) == -signal.SIGKILL
    stopped = server.start(lay_out(tmp_path / "stopped", llama, steps=10_000))
    wait_for_first_step(stopped)
    stopped.send_signal(signal.SIGTERM)
    assert run_to_the_end(stopped) == 75
    assert run_to_the_end(server.start(lay_out(tmp_path / "next", llama))) == 0


def test_a_trainer_ends_with_its_input_even_if_its_server_is_gone(
    server: ForkServer, llama: Path, tmp_path: Path
) -> None:
    trainer = server.start(lay_out(tmp_path / "orphan", llama, steps=10_000))
    wait_for_first_step(trainer)
    server.close()
    assert next(follow(trainer))["kind"], "it goes on without its server"
    trainer.stdin.close()
    for _ in trainer.stdout:
        pass
    assert trainer.wait() == -signal.SIGKILL, "without its server, its status is unknown"
    trainer.kill()
    assert run_to_the_end(server.start(lay_out(tmp_path / "next", llama))) == 0, "another server starts it"


def test_a_fork_starts_a_new_interpreter_where_a_gpu_driver_is_loaded(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any library can stand in for the driver, since only its file name counts."""
    loaded = Path("/proc/self/maps").read_text().splitlines()
    library = next(line.split()[-1] for line in loaded if "/libm.so" in line)
    shutil.copy(library, tmp_path / "libcuda.so.1")
    monkeypatch.setattr(
        "worker.processes.trainer_environment",
        lambda _: os.environ | {"LD_PRELOAD": str(tmp_path / "libcuda.so.1")},
    )
    server = ForkServer()
    try:
        trainer = server.start(lay_out(tmp_path / "work", llama, steps=10_000))
        wait_for_first_step(trainer)
        command = Path(f"/proc/{trainer.pid}/cmdline").read_bytes().split(b"\0")
        assert b"worker.trainer" in command
        trainer.kill()
    finally:
        server.close()

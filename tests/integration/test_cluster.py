"""Trainings over the machines of a real Ray cluster. All its machines are this one."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from app.programs import command
from app.settings import Settings
from tests.helpers.cluster import Machines, ray_cluster
from tests.helpers.servers import wait_until
from tests.helpers.tiny_model import make_tiny_model
from tests.helpers.trainer import Event, dpo_method, make_pairs, make_work_folder, run_process
from worker import manifest
from worker.cluster.health import ClusterHealth
from worker.cluster.host import Host, identity, interface_of
from worker.device import choose, on_machines
from worker.model_files import folder_at
from worker.trainer.errors import STOPPED

STEPS = 12
SPEC = {"seed": 1, "method": dpo_method(batch_size=60, max_steps=STEPS, checkpoint_every=2, eval_every=1000)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Machines]:
    """Two machines with two devices each."""
    with ray_cluster(tmp_path_factory.mktemp("cluster")) as machines:
        machines.add(2, model.parent)
        machines.add(2, model.parent, gpus=3)
        yield machines


def folder_for(path: Path, model: Path, address: str, sizes: list[int], patience: float = 60.0, **spec: Any) -> Path:
    """A work folder for `worker.cluster`, with so many devices on each machine, of whatever name."""
    folder = make_work_folder(path, model, SPEC | spec, train=make_pairs(200))
    machines = [[None, size] for size in sizes]
    cluster = {"address": address, "resource": "CPU", "machines": machines, "patience": patience}
    tell(folder, cluster=cluster, bases={"base": "tiny"}, placed=["base", "train.jsonl"])
    return folder


def tell(folder: Path, **fields: Any) -> None:
    """Set fields of `run.json`."""
    about = json.loads((folder / "run.json").read_text()) | fields
    (folder / "run.json").write_text(json.dumps(about))


@contextmanager
def program(folder: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """`worker.cluster` over a work folder."""
    started = command("worker.cluster", str(folder))
    with (
        (folder / "trainer.log").open("wb") as log,
        subprocess.Popen(started, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log) as process,
    ):
        yield process
        process.kill()


def events_of(process: "subprocess.Popen[bytes]") -> Iterator[Event]:
    """Its events as they come. Each request for a file of the cache gets the answer that the folder has it, or not."""
    assert process.stdin is not None and process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event["kind"] == "wanted":
            process.stdin.write((json.dumps({"key": event["key"]}) + "\n").encode())
            process.stdin.flush()
        yield event


def outcome(folder: Path) -> tuple[int, list[Event]]:
    """(exit status, events) of `worker.cluster`."""
    with program(folder) as process:
        events = list(events_of(process))
        return process.wait(), events


def adapter(folder: Path) -> bytes:
    return (folder / "output" / "adapter_model.safetensors").read_bytes()


def trainers(machines: Machines) -> list[str]:
    """The command lines of the trainers that the machines run."""
    listed = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if "worker.trainer" in line and f"{machines.folder}/machine-" in line]


def test_a_training_stops_on_two_machines_and_ends_on_others_with_the_bytes_of_one_rank(
    machines: Machines, model: Path, tmp_path: Path
) -> None:
    alone = make_work_folder(tmp_path / "alone", model, SPEC, train=make_pairs(200))
    assert run_process(alone)[0] == 0
    # 1. Two and one devices, until it is asked to stop after a checkpoint.
    first = folder_for(tmp_path / "first", model, machines.address, [2, 1])
    with program(first) as process:
        kinds, checkpoints = [], []
        for event in events_of(process):
            kinds.append(event["kind"])
            if event["kind"] == "checkpoint":
                checkpoints.append(event["path"])
                assert manifest.damage(first / event["path"]) is None  # it is complete when the event comes
                process.send_signal(signal.SIGTERM)
            if event["kind"] == "made":
                assert (first / "cache" / event["key"]).stat().st_size > 0
        assert process.wait() == STOPPED and "done" not in kinds
    assert "trainer began" in (first / "trainer.log").read_text()
    assert (first / "trainer.log").read_text().count('"rank": ') >= 3  # the log of every rank
    # 2. From there on one device of each machine, through Ray's client server. The cache's files travel to the first.
    with machines.client_server() as address:
        second = folder_for(tmp_path / "second", model, address, [1, 1])
        (first / checkpoints[-1]).rename(second / "resume")
        (first / "cache").rename(second / "cache")
        tell(second, placed=["base", "train.jsonl", "resume"])
        status, events = outcome(second)
    assert (status, events[-1]["kind"]) == (0, "done"), events[-1]
    tokens = {event["key"] for event in events if event["kind"] == "made" and event["key"].startswith("tokens")}
    assert not tokens  # they were found
    assert adapter(second) == adapter(alone)
    assert (second / "result.csv").exists()
    # 3. Nothing is left on the machines.
    assert not trainers(machines) and not list(machines.folder.glob("machine-*/work/host-*"))


def test_an_error_of_a_rank_on_any_machine_ends_the_training_with_that_error(
    machines: Machines, model: Path, tmp_path: Path
) -> None:
    """Without a seed, each rank draws its own first weights."""
    status, events = outcome(folder_for(tmp_path / "run", model, machines.address, [1, 1], seed=None))
    assert status == 1 and events[-1]["kind"] == "failed" and events[-1]["code"] == "ranks_differ"
    assert sum(event["kind"] == "failed" for event in events) == 1


def test_a_machine_whose_gpus_fail_is_named(machines: Machines, model: Path, tmp_path: Path) -> None:
    """Ray believes that a machine has three GPUs. The ranks are placed there, and torch finds none."""
    folder = folder_for(tmp_path / "run", model, machines.address, [2])
    cluster = json.loads((folder / "run.json").read_text())["cluster"]
    tell(folder, device="cuda", cluster=cluster | {"resource": "GPU"})
    status, events = outcome(folder)
    assert status == 1 and events[-1]["kind"] == "device_failed"
    assert "torch finds no usable GPU" in events[-1]["reason"]


def test_a_machine_that_is_lost_ends_the_attempt_and_its_trainers(
    machines: Machines, model: Path, tmp_path: Path
) -> None:
    # 1. Its daemon is killed.
    with program(folder_for(tmp_path / "run", model, machines.address, [1, 1])) as process:
        events = events_of(process)
        next(event for event in events if event["kind"] == "checkpoint")
        machines.kill(1)
        last = list(events)[-1]
        assert last["kind"] == "broken" and last["is_lost"] and "was lost: " in last["reason"]
        assert process.wait() == 1
    wait_until(lambda: not trainers(machines), "the end of the trainers")
    # 2. The worker that started the training is killed.
    with program(folder_for(tmp_path / "next", model, machines.address, [1])) as process:
        next(event for event in events_of(process) if event["kind"] == "checkpoint")
        assert trainers(machines)
        process.kill()
        wait_until(lambda: not trainers(machines), "the end of the trainers")
    # 3. The machine that is left has no room for two.
    status, found = outcome(folder_for(tmp_path / "wide", model, machines.address, [1, 1], patience=1.0))
    assert status == 1 and (found[-1]["kind"], found[-1]["is_lost"]) == ("broken", False)
    assert "no room for 1 × CPU and 1 × CPU on 2 machines" in found[-1]["reason"]
    assert found[0]["activity"] == "placing"
    # 4. A worker knows what the cluster has, and what it may grow to.
    settings = Settings(ray_address=machines.address, device="cpu", ray_grows_to="3x4x8", home=tmp_path / "home")
    health = ClusterHealth(settings)
    try:
        known = (4, 8, 10)  # two on the machine that is left, and four on each of two that may start
        wait_until(lambda: health.usable() and on_machines(health.devices) == known, "the machines of the cluster")
        placed = health.placement(choose(health.devices, 10, 3))["cluster"]["machines"]
        there = [device for device in health.devices if not device.is_planned]
        assert placed == [[None, 4], [None, 4], [None, 2]] and not there[-1].is_planned
        assert health.at_fault("a test", there) is False and health.at_fault("a test") is False
    finally:
        health.close()


def test_a_cluster_that_does_not_answer_is_named(model: Path, tmp_path: Path) -> None:
    status, events = outcome(folder_for(tmp_path / "run", model, "127.0.0.1:1", [1]))
    assert status == 1 and (events[-1]["kind"], events[-1]["is_lost"]) == ("broken", False)
    assert "the Ray cluster at 127.0.0.1:1 cannot be used" in events[-1]["reason"]
    health = ClusterHealth(Settings(ray_address="127.0.0.1:1", home=tmp_path / "home"))
    try:
        assert not health.usable() and not health.devices
        wait_until(lambda: not health.usable() and "refused" in str(health.problem), "the reason")
    finally:
        health.close()


def test_a_base_model_is_found_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the same path, else by its name in the machine's own folder, else not at all."""
    here, there = make_tiny_model(tmp_path / "here" / "tiny"), make_tiny_model(tmp_path / "there" / "tiny")
    monkeypatch.setenv("DPO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DPO_MODELS_DIR", str(there.parent))
    known = identity(here)
    with closing(Host("cpu")) as host:
        assert host.find_base("base", "tiny", str(here), known) and folder_at(host.folder / "base") == here
        (here / "chat_template.jinja").write_text("another template")
        assert host.find_base("sides/judge/base", "tiny", str(here), known)
        assert folder_at(host.folder / "sides" / "judge" / "base") == there
        (there / "config.json").write_text("{}")
        assert not host.find_base("base", "tiny", str(here), known)
    assert not host.folder.exists()


def test_a_host_that_is_closed_leaves_its_process_alone(tmp_path: Path) -> None:
    """One that nobody asks ends its process, after a second here."""
    make = "import time; from worker.cluster import host; host.ABANDONED_SECONDS = 1; h = host.Host('cpu')"
    environment = os.environ | {"DPO_HOME": str(tmp_path)}
    for then, status in (("time.sleep(60)", 1), ("h.close(); time.sleep(4)", 0)):
        assert subprocess.run([sys.executable, "-c", f"{make}; {then}"], env=environment).returncode == status


def test_the_folder_of_a_host_that_was_killed_is_removed_by_the_next_one(tmp_path: Path) -> None:
    make = "from worker.cluster.host import Host; import os; print(Host('cpu').folder, flush=True)"
    environment = os.environ | {"DPO_HOME": str(tmp_path)}
    killed = subprocess.run(
        [sys.executable, "-c", f"{make}; os._exit(9)"], env=environment, capture_output=True, text=True, check=False
    )
    left = Path(killed.stdout.strip())
    assert left.exists()
    with subprocess.Popen(
        [sys.executable, "-c", f"{make}; input()"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as living:
        assert living.stdout is not None
        kept = Path(living.stdout.readline().strip())
        assert kept.exists() and not left.exists()
        subprocess.run([sys.executable, "-c", make], env=environment, capture_output=True, check=True)
        assert kept.exists()
        living.kill()


def test_the_interface_of_an_address_is_found() -> None:
    assert interface_of("127.0.0.1") == "lo" and interface_of("203.0.113.1") is None

"""Real Ray clusters in this machine: each machine of a cluster has its own daemon, devices, home and base models."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from tests.helpers.servers import free_port, wait_until

QUICK_HEALTH_CHECKS = {
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}
"""The cluster gives up a machine that does not answer for about 9 s, not a minute."""
RAY = Path(sys.executable).with_name("ray")
"""Ray's program, which need not be on the PATH."""
RAY_FOLDER = Path("/tmp/ray")
"""Ray's own place for its sockets and logs."""


@dataclass
class Machines:
    """A cluster whose first machine has no devices. `address` is the one of the cluster."""

    folder: Path
    cluster: Cluster
    nodes: list[Any] = field(default_factory=list)

    @property
    def address(self) -> str:
        address: str = self.cluster.address
        return address

    def add(self, devices: int, models: Path, gpus: int = 0) -> None:
        """Add a machine with CPU devices and the base models of `models`. Its `gpus` are none: Ray only counts them."""
        home = self.folder / f"machine-{len(self.nodes)}"
        self.nodes.append(self.cluster.add_node(num_cpus=devices, num_gpus=gpus, env_vars=variables(home, models)))

    @contextmanager
    def client_server(self) -> Iterator[str]:
        """The address of a server through which others, who are not on a machine of the cluster, use it."""
        port = free_port()
        arguments = [f"--address={self.address}", "--host=127.0.0.1", f"--port={port}", "--mode=proxy"]
        program = [sys.executable, "-m", "ray.util.client.server", *arguments]
        patient = os.environ | {"RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": "120"}
        with (
            (self.folder / "client-server.log").open("wb") as log,
            subprocess.Popen(program, stderr=log, env=patient) as server,
        ):
            wait_until(lambda: _listens(port), "Ray's client server")
            yield f"ray://127.0.0.1:{port}"
            server.kill()

    def kill(self, number: int) -> None:
        """Kill the daemon of a machine, as if it had lost its power."""
        self.cluster.remove_node(self.nodes[number], allow_graceful=False)


def _listens(port: int) -> bool:
    socket.create_connection(("127.0.0.1", port)).close()
    return True


def variables(home: Path, models: Path) -> dict[str, str]:
    """The environment of a machine."""
    return {"DPO_HOME": str(home), "DPO_MODELS_DIR": str(models), "OMP_NUM_THREADS": "1"}


@contextmanager
def ray_cluster(folder: Path, address: str | None = None) -> Iterator[Machines]:
    """Start a cluster, and end it with all its processes. `address` is the one of its first machine."""
    head = {
        "num_cpus": 0,
        "include_dashboard": False,
        "object_store_memory": 200 << 20,
        **({} if address is None else {"node_ip_address": address}),
        "_system_config": QUICK_HEALTH_CHECKS,
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield Machines(folder, cluster)
    finally:
        cluster.shutdown()


class Network:
    """Network namespaces as hosts, each with a cable to a bridge. It needs root."""

    def __init__(self) -> None:
        self.name = f"dpo{secrets.token_hex(2)}"
        self.subnet = f"198.18.{secrets.randbelow(256)}"  # of the range for tests of networks
        self.hosts: list[str] = []
        _ip("link", "add", self.name, "type", "bridge")
        _ip("address", "add", f"{self.address(0)}/24", "dev", self.name)
        _ip("link", "set", self.name, "up")

    @staticmethod
    def why_not() -> str | None:
        """Why this machine has no namespaces; None if it has."""
        if os.geteuid() != 0 or shutil.which("ip") is None:
            return "no network namespaces: this user is not root, or the program 'ip' is missing"
        name = f"dpo{secrets.token_hex(2)}"
        if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode != 0:
            return "no network namespaces: the system does not let this user make them"
        _ip("netns", "delete", name)
        return None

    def address(self, number: int) -> str:
        """The address of a host; 0 is this machine's."""
        return f"{self.subnet}.{number + 1}"

    def add(self) -> int:
        """Add a host. Returns its number, from 1 on."""
        number = len(self.hosts) + 1
        host, cable = f"{self.name}-{number}", f"{self.name}c{number}"
        _ip("netns", "add", host)
        self.hosts.append(host)
        _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", host)
        _ip("link", "set", cable, "master", self.name, "up")
        _ip("-n", host, "address", "add", f"{self.address(number)}/24", "dev", "eth0")
        for interface in ("lo", "eth0"):
            _ip("-n", host, "link", "set", interface, "up")
        return number

    def on(self, number: int, command: Sequence[str], hidden: Sequence[Path]) -> list[str]:
        """The command that runs `command` on a host, which sees the folders `hidden` as empty ones of its own."""
        hide = "".join(f"mount -t tmpfs none {path} && " for path in hidden)
        return ["ip", "netns", "exec", self.hosts[number - 1], "sh", "-c", f'{hide} exec "$@"', "sh", *command]

    def cut(self, number: int) -> None:
        """Pull the cable of a host."""
        _ip("link", "set", f"{self.name}c{number}", "down")

    def close(self) -> None:
        for number, host in enumerate(self.hosts, start=1):
            _ip("link", "delete", f"{self.name}c{number}")
            _ip("netns", "delete", host)
        _ip("link", "delete", self.name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@dataclass
class Hosts:
    """A cluster over the hosts of a network, and this machine, which has no devices."""

    machines: Machines
    network: Network
    daemons: dict[int, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    connected: list[int] = field(default_factory=list)
    """The numbers of the hosts whose cables are in place."""

    @property
    def address(self) -> str:
        return self.machines.address

    def cut(self, number: int) -> None:
        """Pull the cable of a host."""
        self.network.cut(number)
        self.connected.remove(number)

    def add(self, devices: int, models: Path, hidden: Sequence[Path] = ()) -> int:
        """Add a host with CPU devices and the base models of `models`. Returns its number.

        It does not see what is in the folders `hidden`.
        """
        number = self.network.add()
        self.connected.append(number)
        home = self.machines.folder / f"host-{number}"
        arguments = [f"--address={self.address}", f"--node-ip-address={self.network.address(number)}"]
        arguments += [f"--num-cpus={devices}", f"--object-store-memory={200 << 20}", "--block"]
        home.mkdir()
        with (home / "ray.log").open("wb") as log:
            self.daemons[number] = subprocess.Popen(
                self.network.on(number, [str(RAY), "start", *arguments], [RAY_FOLDER, *hidden]),
                env=os.environ | variables(home, models),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return number

    def close(self) -> None:
        """End what runs on the hosts."""
        for number in self.daemons:
            pids = subprocess.run(
                ["ip", "netns", "pids", self.network.hosts[number - 1]], capture_output=True, text=True, check=True
            )
            for pid in pids.stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
        for daemon in self.daemons.values():
            daemon.wait()


@contextmanager
def ray_hosts(folder: Path) -> Iterator[Hosts]:
    """A cluster over hosts that have only a network in common."""
    network = Network()
    try:
        with ray_cluster(folder, network.address(0)) as machines:
            hosts = Hosts(machines, network)
            try:
                yield hosts
            finally:
                hosts.close()
    finally:
        network.close()

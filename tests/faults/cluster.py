"""The cluster that faults are injected into: a whole service of throwaway processes, with a proxy before every server.

It has PostgreSQL behind a PgBouncer, Redis and an S3 server, two APIs, two GPU-lane workers with two devices each, and
one CPU-lane worker. A fault may add a Ray cluster with a worker of its own. If there is a C compiler, the clocks of its hosts differ by ten minutes.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import select

from app.migrate import migrate
from app.models.tables import Model
from app.services import Services
from app.settings import Settings
from tests.faults.proxy import Proxy
from tests.helpers.broken_devices import breakable
from tests.helpers.cluster import Hosts, ray_hosts
from tests.helpers.preload import COMPILER, wrong_clock
from tests.helpers.servers import (
    Server,
    free_port,
    pgbouncer,
    postgres_server,
    postgres_url,
    redis_process,
    s3,
    wait_until,
)
from tests.helpers.service import Running, running
from tests.helpers.tiny_model import make_tiny_model

REPOSITORY = Path(__file__).parents[2]
ADMIN_KEY = "dpo-fault-harness-admin-key"
Line = dict[str, Any]


@dataclass
class Program:
    """A process of the service. The harness starts it again when it has ended."""

    name: str
    arguments: list[str]
    environment: dict[str, str]
    log: Path
    folder: Path = REPOSITORY
    process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self.arguments], env=self.environment, cwd=self.folder, stdout=log, stderr=log
            )

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal(self, how: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(how)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()

    def wait(self, seconds: float | None = None) -> None:
        if self.process is not None:
            self.process.wait(seconds)


class Logs:
    """The log lines of all programs, each with the time of its arrival here. The programs' own clocks are wrong."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[Line] = []
        self._offsets: dict[Path, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._stop.wait(0.05):
            for path in self.folder.glob("*.log"):
                with path.open("rb") as file:
                    file.seek(self._offsets.get(path, 0))
                    for raw in file:
                        if not raw.endswith(b"\n"):
                            break
                        self._offsets[path] = self._offsets.get(path, 0) + len(raw)
                        self.lines.append({"seen_at": time.monotonic(), "program": path.stem} | _parsed(raw))

    def find(self, matches: Callable[[Line], bool], since: float = 0.0) -> Line | None:
        """The first matching line since a time."""
        lines = self.lines
        first = bisect_left(lines, since, hi=len(lines), key=itemgetter("seen_at"))
        return next((line for line in islice(lines, first, len(lines)) if matches(line)), None)

    def wait(self, matches: Callable[[Line], bool], since: float = 0.0, seconds: float = 60.0) -> Line | None:
        """Wait for the first matching line since a time. None if it does not come within `seconds`."""
        deadline = time.monotonic() + seconds
        while (line := self.find(matches, since)) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return line


def _parsed(raw: bytes) -> Line:
    try:
        parsed = json.loads(raw)
    except ValueError:
        parsed = raw.decode(errors="replace").strip()
    return parsed if isinstance(parsed, dict) else {"event": str(parsed)}


@dataclass
class Cluster:
    """The running parts. They write everything into the folder `home`."""

    home: Path
    postgres: Server
    pooler: Server
    redis: Server
    database: Proxy
    """Between the workers and PgBouncer."""
    api_database: Proxy
    broker: Proxy
    objects: Proxy
    front: Proxy
    """Between the clients and the first API."""
    logs: Logs
    services: Services
    """Connected to the servers directly, past the proxies: the ground truth."""
    programs: dict[str, Program]
    fakes_time: bool
    small_disks: bool
    """Whether each GPU-lane worker works on a small file system of its own."""
    stack: ExitStack
    """The parts that are closed at the end."""
    ray: Hosts | None = field(default=None, init=False)

    @property
    def proxies(self) -> tuple[Proxy, ...]:
        return self.database, self.api_database, self.broker, self.objects, self.front

    def workers(self) -> list[Program]:
        return [program for program in self.programs.values() if program.name.startswith(("gpu", "cpu"))]

    @property
    def wide_models(self) -> Path:
        """The folder of the base model that only the worker of the Ray cluster serves."""
        return self.home / "wide-models"

    def hosts(self) -> Hosts:
        """A Ray cluster of two machines with two devices each, and a worker for it. They start with the first call."""
        if self.ray is None:
            shutil.copytree(self.home / "models" / "tiny", self.wide_models / "wide")
            (self.home / "ray").mkdir()
            self.ray = self.stack.enter_context(ray_hosts(self.home / "ray"))
            for _ in range(2):
                self.ray.add(2, self.wide_models)
            like = self.programs["cpu-1"].environment
            variables = {"DPO_HOME": str(self.home / "gpu-ray"), "DPO_MODELS_DIR": str(self.wide_models)}
            variables |= {"DPO_RAY_ADDRESS": self.ray.address, "DPO_DEVICE": "cpu"}
            log = self.home / "logs" / "gpu-ray.log"
            self.programs["gpu-ray"] = Program("gpu-ray", ["-m", "worker", "gpu"], like | variables, log)
            self.revive()
            wait_until(lambda: "wide" in self.served(), "the worker of the Ray cluster")
        return self.ray

    def served(self) -> list[str]:
        """The names of the base models that workers have registered."""
        with self.services.database.read() as session:
            return list(session.scalars(select(Model.name)))

    def revive(self) -> None:
        """Start what has ended, as a supervisor would, and wait until the APIs answer."""
        for program in self.programs.values():
            if not program.alive:
                program.start()
        for name, program in self.programs.items():
            if name.startswith("api"):
                port = int(program.environment["DPO_PORT"])
                wait_until(partial(_answers, port), name)

    def set_clock(self, seconds: float) -> None:
        """Make the database's clock wrong by `seconds`."""
        with self.sql() as connection:
            connection.execute("UPDATE clock_error SET seconds = %s", [seconds])

    @contextmanager
    def embedded(self) -> Iterator[Running]:
        """Another service, on the embedded stack, with all its data on one small disk."""
        with _small_disk(self.home / "embedded"):
            shutil.copytree(self.home / "models", self.home / "embedded" / "models")
            with running(self.home / "embedded", {"DPO_RATE_LIMIT": "0"}) as service:
                yield service

    def sql(self) -> "psycopg.Connection[Any]":
        """A connection to PostgreSQL itself."""
        return psycopg.connect(f"host=127.0.0.1 port={self.postgres.port} user=dpo dbname=postgres", autocommit=True)


def _answers(port: int) -> bool:
    import httpx2

    answer = httpx2.get(f"http://127.0.0.1:{port}/readyz", timeout=5)
    assert answer.status_code == 200, answer.text
    return True


@contextmanager
def cluster(home: Path, gpus: int = 2) -> Iterator[Cluster]:
    """Start all parts, and end them after the block."""
    models, logs = make_tiny_model(home / "models" / "tiny").parent, home / "logs"
    logs.mkdir()
    with ExitStack() as stack:
        postgres = stack.enter_context(postgres_server())
        pooler = stack.enter_context(pgbouncer(postgres, sessions=8))
        redis = stack.enter_context(redis_process())
        storage = stack.enter_context(s3())
        api_port, other_port = free_port(), free_port()
        s3_port = int(storage["AWS_ENDPOINT_URL"].rpartition(":")[2])
        targets = {"database": pooler.port, "api_database": pooler.port, "broker": redis.port, "objects": s3_port}
        proxies = {name: stack.enter_context(Proxy(name, target)) for name, target in targets.items()}
        front = stack.enter_context(Proxy("front", api_port))
        # obstore reads these in this process, which connects past the proxies.
        os.environ.update({name: value for name, value in storage.items() if name.startswith("AWS_")})
        shared = os.environ | {
            "DPO_ADMIN_KEY": ADMIN_KEY,
            "DPO_SECRET_KEY": "a-secret-of-the-fault-harness",
            "DPO_MODELS_DIR": str(models),
            "DPO_BROKER_URL": f"redis://127.0.0.1:{proxies['broker'].port}/0",
            "DPO_RATE_LIMIT": "0",
            "DPO_LOG_LEVEL": "debug",
            "OMP_NUM_THREADS": "1",
            **storage,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxies['objects'].port}",
        }
        services = Services.of(
            Settings(
                home=home / "harness",
                database_url=postgres_url(postgres.port),
                storage_url=storage["DPO_STORAGE_URL"],
                broker_url=f"redis://127.0.0.1:{redis.port}/0",
            )
        )
        migrate(services.database)
        stack.callback(services.database.close)
        programs = {}

        def add(name: str, arguments: list[str], skew: int = 0, **more: str) -> None:
            database = proxies["api_database" if name.startswith("api") else "database"]
            variables = {"DPO_HOME": str(home / name), "DPO_DATABASE_URL": postgres_url(database.port), **more}
            if skew and COMPILER is not None:
                variables |= wrong_clock(skew, home)
            programs[name] = Program(name, arguments, shared | variables, logs / f"{name}.log")

        add("api-1", ["-m", "app.cli.main", "api"], DPO_PORT=str(api_port))
        add("api-2", ["-m", "app.cli.main", "api"], 300, DPO_PORT=str(other_port))
        for number in range(1, gpus + 1):
            device = breakable(home / f"gpu-{number}", ["library", "backward"]) | {"DPO_CPU_DEVICES": "2"}
            add(f"gpu-{number}", ["-m", "worker", "gpu"], (-1) ** number * 300, **device)
        disks = [stack.enter_context(_small_disk(home / name / "work")) for name in programs if name.startswith("gpu")]
        add("cpu-1", ["-m", "worker", "cpu"])
        running_cluster = Cluster(
            home=home, postgres=postgres, pooler=pooler, redis=redis, front=front, logs=Logs(logs), services=services,
            programs=programs, stack=stack, fakes_time=COMPILER is not None, small_disks=all(disks), **proxies,
        )  # fmt: skip
        stack.callback(running_cluster.logs.close)
        _make_clock(running_cluster)
        try:
            running_cluster.revive()
            yield running_cluster
        finally:
            for proxy in running_cluster.proxies:
                proxy.heal()
            for program in programs.values():
                program.signal(signal.SIGCONT)
                program.signal(signal.SIGTERM)
            for program in programs.values():
                try:
                    program.wait(30)
                except subprocess.TimeoutExpired:
                    program.kill()


@contextmanager
def _small_disk(folder: Path) -> Iterator[bool]:
    """Mount a file system of 64 MB on `folder`; yields whether this process may mount."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "dpo-faults", str(folder)]
    mounted = subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)


def _make_clock(running_cluster: Cluster) -> None:
    """Put a clock that can be set before PostgreSQL's own: a function of the same name in an earlier schema."""
    with running_cluster.sql() as connection:
        connection.execute("CREATE TABLE clock_error (seconds double precision NOT NULL)")
        connection.execute("INSERT INTO clock_error VALUES (0)")
        connection.execute(
            "CREATE FUNCTION public.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE AS "
            "'SELECT pg_catalog.clock_timestamp() + make_interval(secs => seconds) FROM public.clock_error'"
        )
        connection.execute("ALTER ROLE dpo SET search_path = public, pg_catalog")


def processes(home: Path) -> list[int]:
    """Pids of the service's processes that belong to `home`, by their environment or working folder."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                environment = (entry / "environ").read_bytes()
                folder = str((entry / "cwd").readlink())
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            belongs_to_service = f"DPO_HOME={home}".encode() in environment or folder.startswith(str(home))
            if belongs_to_service and (b"worker" in command or b"app.cli" in command):
                pids.append(int(entry.name))
    return pids

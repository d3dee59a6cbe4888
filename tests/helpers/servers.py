"""Throwaway servers for tests: real PostgreSQL, Redis and S3 processes on free ports, gone at the end."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import psycopg
import redis

from tests.helpers.certificates import Certificate


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


CEILING = 600.0
"""Seconds after which a test gives up. A busy machine is slow, so only a hang comes this far."""


def wait_until(ready: Callable[[], object], what: str, process: "subprocess.Popen[Any] | None" = None) -> None:
    """Poll `ready` until it returns something true without raising.

    Raises `TimeoutError` once `process` has ended, or after `CEILING` seconds.
    """
    deadline, last = time.monotonic() + CEILING, "it answered no"
    while time.monotonic() < deadline:
        ended = process is not None and process.poll() is not None
        try:
            if ready():
                return
        except Exception as error:  # not up yet: the client decides what it raises
            last = str(error)
        if ended:
            assert process is not None
            raise TimeoutError(f"{what} will not come, {process.args!r} ended with {process.returncode}: {last}")
        time.sleep(0.1)
    raise TimeoutError(f"{what} did not come in {CEILING:.0f} s: {last}")


def postgres_program(name: str) -> str:
    # Debian's own program first: PATH holds a wrapper that depends on the name it is called by.
    path = next(map(str, sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))), None) or shutil.which(name)
    assert path is not None, f"{name} is missing: run 'make test', which installs it"
    return str(Path(path).resolve())


class Server:
    """A server process on its own port. It can be ended, and started again with the same command."""

    def __init__(self, command: list[str], port: int, ready: Callable[[], object], **options: Any) -> None:
        self.command, self.port, self.ready, self.options = command, port, ready, options
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self.process = subprocess.Popen(self.command, **self.options)
        try:
            wait_until(self.ready, self.command[0], self.process)
        except TimeoutError:
            self.end()
            raise

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End it with a signal, and wait for it."""
        self.process.send_signal(how)
        self.process.wait()


MEMORY = Path("/dev/shm")
"""A folder whose files are in memory."""


def _memory() -> Path | None:
    """`MEMORY` if it has 2 GB free, where a new database takes an eighth of the time; else the default folder."""
    return MEMORY if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 2_000_000_000 else None


@contextmanager
def postgres_server() -> Iterator[Server]:
    """A PostgreSQL cluster of its own: superuser `dpo`, database `postgres`."""
    # PostgreSQL refuses to run as root. Then the package's own user runs it.
    user = "postgres" if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="dpo-postgres-", dir=_memory()))
    try:
        if user is not None:
            shutil.chown(folder, user)
        port, data = free_port(), folder / "data"
        subprocess.run(
            [postgres_program("initdb"), "-D", data, "-U", "dpo", "-A", "trust", "--no-sync"],
            check=True, user=user, cwd=folder, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        options = ["-p", str(port), "-k", str(folder), "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        connect = f"host=127.0.0.1 port={port} user=dpo dbname=postgres"

        def connects() -> bool:
            with psycopg.connect(connect) as connection:
                return not connection.closed

        command = [postgres_program("postgres"), "-D", str(data), *options]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        server = Server(command, port, connects, user=user, cwd=folder, **quiet)
        try:
            yield server
        finally:
            server.end(signal.SIGINT)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL cluster of its own; yields its SQLAlchemy URL."""
    with postgres_server() as server:
        yield postgres_url(server.port)


@contextmanager
def pgbouncer(server: Server, sessions: int = 2) -> Iterator[Server]:
    """A PgBouncer before a PostgreSQL server, with so many sessions for all clients, each for one transaction."""
    program = shutil.which("pgbouncer", path="/usr/sbin:/usr/bin:/usr/local/bin")
    assert program is not None, "pgbouncer is missing: run 'make test', which installs it"
    port, folder = free_port(), Path(tempfile.mkdtemp(prefix="dpo-pgbouncer-"))
    user = "postgres" if os.geteuid() == 0 else None  # it refuses to run as root
    try:
        (folder / "pgbouncer.ini").write_text(
            f"[databases]\n* = host=127.0.0.1 port={server.port} user=dpo\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nauth_type = any\nunix_socket_dir =\n"
            f"pool_mode = transaction\ndefault_pool_size = {sessions}\nmax_client_conn = 500\n"
        )
        if user is not None:
            shutil.chown(folder, user)
            folder.chmod(0o755)
        connect = f"host=127.0.0.1 port={port} user=dpo dbname=postgres"

        def connects() -> bool:
            with psycopg.connect(connect) as connection:
                return not connection.closed

        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        pooler = Server([program, str(folder / "pgbouncer.ini")], port, connects, user=user, **quiet)
        try:
            yield pooler
        finally:
            pooler.end()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def postgres_url(port: int) -> str:
    return f"postgresql+psycopg://dpo@127.0.0.1:{port}/postgres"


def admin(url: str, statement: str) -> None:
    """Run a statement outside of any transaction."""
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(statement.encode())


@contextmanager
def redis_process() -> Iterator[Server]:
    """A Redis server that keeps nothing: empty again after a restart."""
    port = free_port()

    def ping() -> bool:
        with redis.Redis(port=port) as client:
            return bool(client.ping())

    options = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    server = Server(["redis-server", "--port", str(port), *options], port, ping, stdout=subprocess.DEVNULL)
    try:
        yield server
    finally:
        server.end()


@contextmanager
def redis_server() -> Iterator[str]:
    """A Redis server that keeps nothing; yields its URL."""
    with redis_process() as server:
        yield f"redis://127.0.0.1:{server.port}/0"


S3_ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


@contextmanager
def s3(certificate: Certificate | None = None, *, open_actions: int | None = None) -> Iterator[dict[str, str]]:
    """An S3 server (moto, as a process) with the bucket `dpo`, over TLS if there is a certificate.

    With `open_actions`, it looks at policies after so many actions of which the first creates the bucket. Yields the
    environment that reaches it.
    """
    port = free_port()
    tls: list[str | Path] = []
    if certificate is not None:
        tls = ["--ssl-cert", certificate.certificate, "--ssl-key", certificate.key]
    server = subprocess.Popen(
        [Path(sys.executable).with_name("moto_server"), "-H", "127.0.0.1", "-p", str(port), *tls],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | ({} if open_actions is None else {"INITIAL_NO_AUTH_ACTION_COUNT": str(open_actions)}),
    )
    try:
        url = f"https://localhost:{port}" if certificate else f"http://127.0.0.1:{port}"
        client = boto3.client(
            "s3", endpoint_url=url, aws_access_key_id="test", aws_secret_access_key="test", region_name="us-east-1",
            verify=certificate and str(certificate.authority),
        )  # fmt: skip
        wait_until(lambda: client.create_bucket(Bucket="dpo"), "the S3 server", server)
        client.close()
        yield S3_ENVIRONMENT | {"AWS_ENDPOINT_URL": url, "DPO_STORAGE_URL": "s3://dpo/service"}
    finally:
        server.terminate()
        server.wait()

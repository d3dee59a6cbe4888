"""Throwaway servers for tests: real PostgreSQL, Redis and S3 processes on free ports, gone at the end."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import psycopg
import redis


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(ready: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Poll `ready` until it returns something true without raising; fail after `seconds`."""
    deadline, last = time.monotonic() + seconds, "it answered no"
    while time.monotonic() < deadline:
        try:
            if ready():
                return
        except Exception as error:  # not up yet: whatever the client raises
            last = str(error)
        time.sleep(0.05)
    raise TimeoutError(f"{what} not ready after {seconds} s: {last}")


def _postgres_program(name: str) -> str:
    found = shutil.which(name) or next(map(str, sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))), None)
    assert found is not None, f"{name} is missing: run 'make test', which installs it"
    return str(Path(found).resolve())


@contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL cluster of its own; yields its SQLAlchemy URL."""
    # PostgreSQL refuses to run as root: there the package's own user runs it.
    user = "postgres" if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="dpo-postgres-"))
    try:
        if user is not None:
            shutil.chown(folder, user)
        port, data = free_port(), folder / "data"
        subprocess.run(
            [_postgres_program("initdb"), "-D", data, "-U", "dpo", "-A", "trust", "--no-sync"],
            check=True, user=user, cwd=folder, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        options = ["-p", str(port), "-k", str(folder), "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        with (folder.parent / f"{folder.name}.log").open("wb") as log:
            server = subprocess.Popen(
                [_postgres_program("postgres"), "-D", data, *options], user=user, cwd=folder, stderr=log, stdout=log
            )
        try:
            connect = f"host=127.0.0.1 port={port} user=dpo dbname=postgres"

            def connects() -> bool:
                with psycopg.connect(connect) as connection:
                    return not connection.closed

            wait_until(connects, "PostgreSQL")
            yield f"postgresql+psycopg://dpo@127.0.0.1:{port}/postgres"
        finally:
            server.terminate()
            server.wait()
            (folder.parent / f"{folder.name}.log").unlink()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def redis_server() -> Iterator[str]:
    """A Redis server that keeps nothing; yields its URL."""
    port = free_port()
    server = subprocess.Popen(
        ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"],
        stdout=subprocess.DEVNULL,
    )
    try:

        def ping() -> bool:
            with redis.Redis(port=port) as client:
                return bool(client.ping())

        wait_until(ping, "Redis")
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        server.terminate()
        server.wait()


S3_ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


@contextmanager
def s3() -> Iterator[dict[str, str]]:
    """An S3 server (moto, as a process) with the bucket `dpo`; yields the environment that reaches it."""
    port = free_port()
    server = subprocess.Popen(
        [Path(sys.executable).with_name("moto_server"), "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        client = boto3.client(
            "s3", endpoint_url=url, aws_access_key_id="test", aws_secret_access_key="test", region_name="us-east-1"
        )
        wait_until(lambda: client.create_bucket(Bucket="dpo"), "the S3 server")
        client.close()
        yield S3_ENVIRONMENT | {"AWS_ENDPOINT_URL": url, "DPO_STORAGE_URL": "s3://dpo/service"}
    finally:
        server.terminate()
        server.wait()

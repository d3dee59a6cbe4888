"""A TCP proxy between a service and one of its servers. It can cut, hold, slow down or spoil connections."""

import asyncio
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

REQUEST = re.compile(rb"(GET|PUT|POST|DELETE|HEAD) (\S+) HTTP/1.1\r\n")
BUSY = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@dataclass(eq=False)
class Connection:
    """A client's connection, and its last HTTP request if it speaks HTTP."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    request: str = ""
    passed: int = 0
    """Bytes from the client since that request began."""
    broken: bool = False

    def cut(self) -> None:
        """End both sides with a reset."""
        self.broken = True
        for side in (self.client, self.server):
            side.transport.abort()


Spoil = Callable[[Connection, bool, bytes], bool]
"""(connection, whether from the client, bytes) → whether to cut the connection instead of passing the bytes on."""


@dataclass
class Proxy:
    """Listens on `port` of 127.0.0.1 for a server on `target`. Its settings may be changed from any thread."""

    name: str
    target: int
    port: int = 0
    refuse: bool = False
    """Reset every new connection."""
    busy: bool = False
    """Answer every HTTP request with 503, as an overloaded object store does."""
    rate: float | None = None
    """Bytes a second for each connection and direction."""
    spoil: Spoil | None = None
    struck: list[tuple[float, str]] = field(default_factory=list)
    """The proxy's log: (monotonic time, request or name) of each disturbance."""
    _connections: set[Connection] = field(default_factory=set)
    _held: bool = False

    def __post_init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), name=f"proxy {self.name}", daemon=True)
        self._thread.start()
        started.wait(10)

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._stop)
        self._thread.join(10)

    def cut(self) -> int:
        """Reset all open connections; returns how many there were."""
        connections = list(self._connections)
        for connection in connections:
            self._record(connection)
            self._call(connection.cut)
        return len(connections)

    def hold(self, held: bool) -> None:
        """Pass nothing on until released, as if all packets were lost."""
        self._held = held
        self._call(self._gate.clear if held else self._gate.set)

    def heal(self) -> None:
        """End all disturbances."""
        self.refuse = self.busy = False
        self.rate = self.spoil = None
        self.hold(False)

    def _record(self, connection: Connection) -> None:
        self.struck.append((time.monotonic(), connection.request or self.name))

    def _call(self, work: Callable[[], object]) -> None:
        self._loop.call_soon_threadsafe(work)

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._gate = asyncio.Event()
        self._gate.set()

        async def listen() -> None:
            self._server = server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
            self.port = server.sockets[0].getsockname()[1]
            started.set()

        self._loop.run_until_complete(listen())
        self._loop.run_forever()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    def _stop(self) -> None:
        self._server.close()
        for connection in list(self._connections):
            connection.cut()
        self._loop.stop()

    async def _accept(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        if self.refuse:
            to_client.transport.abort()
            return
        try:
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            to_client.transport.abort()
            return
        connection = Connection(to_client, to_server)
        self._connections.add(connection)
        try:
            await asyncio.gather(
                self._pump(connection, True, from_client, to_server),
                self._pump(connection, False, from_server, to_client),
            )
        except OSError:
            pass
        finally:
            connection.cut()
            self._connections.discard(connection)

    async def _pump(
        self, connection: Connection, upstream: bool, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while chunk := await reader.read(65536):
            if upstream:
                if match := REQUEST.match(chunk):
                    connection.request, connection.passed = b" ".join(match.groups()).decode(), 0
                connection.passed += len(chunk)
            if self._held:
                self._record(connection)
                await self._gate.wait()
            if self.busy and upstream:
                self._record(connection)
                connection.client.write(BUSY)
                await connection.client.drain()
                break
            if self.spoil is not None and self.spoil(connection, upstream, chunk):
                self._record(connection)
                connection.cut()
            if connection.broken:
                break
            if self.rate is not None:
                self._record(connection)
                await asyncio.sleep(len(chunk) / self.rate)
            writer.write(chunk)
            await writer.drain()
        if self.busy:
            connection.cut()
        elif not connection.broken:
            writer.write_eof()

"""The HTTP client of the commands. URL and key come from the environment; an error is one sentence."""

import io
import os
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, TypedDict, TypeVar, Unpack
from urllib.parse import quote

import httpx2
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from app.cli.output import plain
from app.settings import Settings
from app.spec.json_types import JsonObject


class ClientError(Exception):
    """The server refused a request, or cannot be reached. `status` and `code` are those of its answer, if any."""

    def __init__(self, message: str, status: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


Result = TypeVar("Result")


class Unavailable(ClientError):
    """The service does not answer now: it restarts, or a proxy before it has lost it."""


UNAVAILABLE = {502, 503, 504}
PATIENCE_SECONDS, RETRY_SECONDS = 300.0, 2.0
"""How long a command that waits tries to reach the service again, and how often."""


class RequestOptions(TypedDict, total=False):
    """The options of a request that the commands use, as httpx takes them."""

    json: object
    params: Mapping[str, str | int | bool] | None
    data: dict[str, str]
    files: dict[str, tuple[str, BinaryIO]]
    headers: dict[str, str]
    timeout: float | None


def idempotency(key: str) -> dict[str, str]:
    """The header of an idempotency key; none for an empty key."""
    return {"Idempotency-Key": key} if key else {}


class Client:
    """Calls the service that `DPO_BASE_URL` and `DPO_API_KEY` name, else this machine's with its admin key."""

    waits = False
    """Whether the command waits for something. Its reads then outlast a restart of the service."""

    def __init__(self) -> None:
        url = os.environ.get("DPO_BASE_URL", "").strip() or "http://127.0.0.1:8000/v1"
        self._http = httpx2.Client(base_url=url, headers={"Authorization": f"Bearer {self._key()}"}, timeout=60)

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    @staticmethod
    def _key() -> str:
        if key := os.environ.get("DPO_API_KEY", "").strip() or os.environ.get("DPO_ADMIN_KEY", "").strip():
            return key
        key_file = Settings().home / "admin.key"
        if key_file.exists():
            return key_file.read_text().strip()
        raise ClientError("No API key: set DPO_API_KEY, or run this where the service keeps its DPO_HOME.")

    def request(self, method: str, path: str, **options: Unpack[RequestOptions]) -> JsonObject:
        """The JSON answer. Raises `ClientError` with the server's message."""

        def read() -> JsonObject:
            with self.stream(method, path, **options) as response:
                return _json(response)

        return self._patiently(read) if method == "GET" else read()

    def _patiently(self, read: Callable[[], Result]) -> Result:
        """The result of `read`. In a command that waits, it is tried again while the service is unavailable."""
        deadline, told = time.monotonic() + PATIENCE_SECONDS, False
        while True:
            try:
                return read()
            except Unavailable as error:
                if not self.waits or time.monotonic() > deadline:
                    raise
                if not told:
                    text = f"{str(error).rstrip('.')}. Trying again for {PATIENCE_SECONDS / 60:.0f} minutes."
                    Console(stderr=True).print(plain(text), highlight=False, markup=False)
                    told = True
            time.sleep(RETRY_SECONDS)

    @contextmanager
    def stream(self, method: str, path: str, **options: Unpack[RequestOptions]) -> Iterator[httpx2.Response]:
        """An answer whose body is read piece by piece."""
        try:
            with self._http.stream(method, path, **options) as response:
                if response.status_code >= 400:
                    response.read()
                    error_class = Unavailable if response.status_code in UNAVAILABLE else ClientError
                    message, code = _refusal(response)
                    raise error_class(message, response.status_code, code)
                yield response
        except httpx2.HTTPError as error:
            raise Unavailable(f"{self._http.base_url} cannot be reached: {error}") from error

    @contextmanager
    def _stream_when_ready(
        self, method: str, path: str, **options: Unpack[RequestOptions]
    ) -> Iterator[httpx2.Response]:
        """The final answer of a route that answers 202 until a worker has made the result."""
        self.waits = True
        while True:
            with ExitStack() as stack:
                response = self._patiently(lambda: stack.enter_context(self.stream(method, path, **options)))
                if response.status_code != 202:
                    yield response
                    return
                seconds = float(response.headers.get("retry-after", 1))
            time.sleep(seconds)

    def pages(self, path: str, limit: int) -> Iterator[JsonObject]:
        """Up to `limit` objects of a list, newest first, page by page."""
        after: str | None = None
        while limit > 0:
            params: dict[str, str | int] = {"limit": min(limit, 100)}
            if after is not None:
                params["after"] = after
            answer = self.request("GET", path, params=params)
            yield from answer["data"]
            limit -= len(answer["data"])
            if not answer["has_more"] or not answer["data"]:
                return
            after = answer["data"][-1]["id"]

    def when_ready(self, method: str, path: str, **options: Unpack[RequestOptions]) -> JsonObject:
        """The final JSON answer of a route that answers 202 until a worker has made the result."""
        with self._stream_when_ready(method, path, **options) as response:
            return _json(response)

    def upload(self, path: Path, form: dict[str, str] | None = None, idempotency_key: str = "") -> JsonObject:
        """Upload a dataset, with a progress bar on a terminal."""
        with _progress() as progress, progress.open(path, "rb", description=path.name) as file:
            return self.request(
                "POST",
                "/files",
                data={"purpose": "fine-tune", **(form or {})},
                files={"file": (path.name, file)},
                headers=idempotency(idempotency_key),
                timeout=None,
            )

    def download_model(self, model: str, folder: Path, params: dict[str, str] | None = None) -> None:
        """Unpack a trained model or a checkpoint into `folder`. Waits until a merged model is ready."""
        self.download(f"/models/{quote(model, safe=':')}/download", folder, params)

    def download(self, path: str, folder: Path, params: dict[str, str] | None = None) -> None:
        """Unpack the tar file that the route `path` answers into `folder`. Waits until it is ready."""
        with self._stream_when_ready("GET", path, params=params, timeout=None) as response, _progress() as progress:
            folder.mkdir(parents=True, exist_ok=True)
            task = progress.add_task(folder.name, total=None)

            def chunks() -> Iterator[bytes]:
                for chunk in response.iter_bytes():
                    progress.advance(task, len(chunk))
                    yield chunk

            with tarfile.open(fileobj=_Reader(chunks()), mode="r|") as archive:
                archive.extractall(folder, filter="data")


def _progress() -> Progress:
    """A bar on standard error, if that is a terminal. Standard output is for results."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


class _Reader(io.RawIOBase):
    """A readable file over a stream of chunks, for tarfile."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        while size < 0 or len(self._rest) < size:
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            self._rest += chunk
        size = len(self._rest) if size < 0 else size
        data, self._rest = self._rest[:size], self._rest[size:]
        return data


def _json(response: httpx2.Response) -> JsonObject:
    """The JSON object in the body of an answer that has not been read yet."""
    response.read()
    answer: JsonObject = response.json()
    return answer


def _refusal(response: httpx2.Response) -> tuple[str, str | None]:
    """The message and the code of an answer that is not 2xx."""
    try:
        error = response.json()["error"]
        param = f" ({error['param']})" if error.get("param") else ""
        return f"{error['message']}{param}", error.get("code")
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"The server answered {response.status_code}: {response.text[:300]}", None

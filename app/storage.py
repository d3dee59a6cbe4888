"""Objects (uploaded files, checkpoints, adapters, logs) in a folder, S3, GCS or Azure: obstore behind one class.

This program makes the keys from ids, never from what a user typed.
"""

import asyncio
import heapq
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import NotFoundError, PreconditionError
from obstore.store import LocalStore, ObjectStore, from_url
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

if TYPE_CHECKING:  # types that exist for the type checker only
    from obstore import GetOptions, ObjectMeta
    from obstore.store import ClientConfig, RetryConfig

WRITE_CHUNK_BYTES = 8 * 1024 * 1024
REQUEST_TIMEOUT = "60s"
"""The longest time of one request. A large object takes several, so it does not bound the time of a copy."""
PROBE_KEY, PROBE_TIMEOUT = "readiness", "5s"
"""The object and the longest time of a request that only finds out whether the store answers."""
READ_BYTES = 4 * 1024 * 1024
"""Size of the pieces in which a large object is read."""


@contextmanager
def _trusting_own_certificates() -> Iterator[None]:
    """Let a new store trust the certificates of `AWS_CA_BUNDLE`. obstore itself reads only `SSL_CERT_FILE`."""
    bundle, before = os.environ.get("AWS_CA_BUNDLE"), os.environ.get("SSL_CERT_FILE")
    if bundle:
        os.environ["SSL_CERT_FILE"] = bundle
    try:
        yield
    finally:
        if before is not None:
            os.environ["SSL_CERT_FILE"] = before
        elif bundle:
            del os.environ["SSL_CERT_FILE"]


class WrongSize(Exception):
    """An object does not have the size that its reader knows."""


def files_below(folder: Path) -> list[Path]:
    """All files below `folder`, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


class Storage:
    """An object store. A put is atomic: an object is complete or absent."""

    def __init__(self, url: str) -> None:
        if url.startswith("file://"):
            folder = Path(url.removeprefix("file://"))
            folder.mkdir(parents=True, exist_ok=True)
            self.store: ObjectStore = LocalStore(folder, mkdir=True, automatic_cleanup=True)
            self._once: ObjectStore = self.store
        else:
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
            plain = url.startswith("s3://") and endpoint.startswith("http://")
            with _trusting_own_certificates():
                self.store = from_url(url, client_options={"timeout": REQUEST_TIMEOUT, "allow_http": plain})
                once: RetryConfig = {"max_retries": 0}
                options: ClientConfig = {"timeout": PROBE_TIMEOUT, "connect_timeout": PROBE_TIMEOUT}
                self._once = from_url(url, client_options=options | {"allow_http": plain}, retry_config=once)

    async def put_stream(self, key: str, chunks: AsyncIterator[bytes]) -> None:
        """Write an object from a stream. If the stream raises, no object is left, and the same error is raised here."""
        failure: list[BaseException] = []

        async def watched() -> AsyncIterator[bytes]:
            try:
                async for chunk in chunks:
                    yield chunk
            except BaseException as error:
                failure.append(error)
                raise

        try:
            await obstore.put_async(
                self.store, key, watched(), use_multipart=True, chunk_size=WRITE_CHUNK_BYTES, max_concurrency=2
            )
        except Exception as error:  # obstore wraps the source's error in its own
            raise failure[0] if failure else error from None

    @asynccontextmanager
    async def object_written(self, key: str, chunks: AsyncIterator[bytes]) -> AsyncIterator[None]:
        """Write an object from a stream, then run the block. If either fails, the object is deleted.

        After a database error the object stays, because its row may have been written.
        """
        try:
            await self.put_stream(key, chunks)
            yield
        except SQLAlchemyError:
            raise  # the row may exist; if it does not, `dpo storage prune` finds the object
        except BaseException:
            # Shielded, because a client that hangs up cancels this task. The object must still be deleted.
            await asyncio.shield(run_in_threadpool(self.delete, key))
            raise

    def put_bytes(self, key: str, content: bytes) -> None:
        obstore.put(self.store, key, content)

    def put_file(self, key: str, path: Path) -> None:
        obstore.put(self.store, key, path, chunk_size=WRITE_CHUNK_BYTES, max_concurrency=2)

    def put_folder(self, prefix: str, folder: Path) -> None:
        """Write every file below `folder` under `prefix/`. Raises `FileNotFoundError` if there is none."""
        files = files_below(folder)
        if not files:
            raise FileNotFoundError(folder)
        for path in files:
            self.put_file(f"{prefix}/{path.relative_to(folder).as_posix()}", path)

    def chunks(self, key: str, start: int = 0, end: int | None = None, size: int | None = None) -> Iterator[bytes]:
        """The object's bytes from `start` to before `end`, piece by piece; None means its end.

        Raises `FileNotFoundError` at once if it does not exist, and `WrongSize` if it does not have the `size` in
        bytes that its reader knows.

        Each piece is a request of its own, made when the reader wants it. So a reader may take any time, and a request
        that stalls still ends. Raises `OSError` if the object is replaced meanwhile.
        """
        try:
            result = obstore.get(self.store, key)
            if size is not None and result.meta["size"] != size:
                raise WrongSize(f"its content has {result.meta['size']} bytes and should have {size}")
            if result.meta["size"] <= READ_BYTES:
                content = bytes(result.bytes())[start:end]
                return iter([content] if content else [])
        except NotFoundError as error:
            raise FileNotFoundError(key) from error
        return (self._piece(key, options) for options in _pieces(result.meta, start, end))

    def _piece(self, key: str, options: "GetOptions") -> bytes:
        with _error_if_replaced(key):
            return bytes(obstore.get(self.store, key, options=options).bytes())

    async def stream(self, key: str) -> AsyncIterator[bytes]:
        """The object's bytes, piece by piece, as a source for `put_stream`.

        The source of a write can read the same store only in this way.
        """
        try:
            result = await obstore.get_async(self.store, key)
            if result.meta["size"] <= READ_BYTES:
                yield bytes(await result.bytes_async())
                return
        except NotFoundError as error:
            raise FileNotFoundError(key) from error
        for options in _pieces(result.meta):
            with _error_if_replaced(key):
                piece = bytes(await (await obstore.get_async(self.store, key, options=options)).bytes_async())
            yield piece

    def read(self, key: str) -> bytes:
        """All bytes of a small object."""
        return b"".join(self.chunks(key))

    def get_file(self, key: str, path: Path) -> None:
        """Copy an object to the file `path`. Raises `FileNotFoundError` if either vanishes meanwhile.

        A work folder is removed when nobody waits for its files any more, and then nothing is read for it.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        chunks = self.chunks(key)
        with path.open("wb") as file:
            for chunk in chunks:
                if not path.exists():
                    raise FileNotFoundError(path)
                file.write(chunk)

    def get_folder(self, prefix: str, folder: Path) -> None:
        """Copy every object under `prefix/` below `folder`."""
        for key, _size in self.list(prefix):
            self.get_file(key, folder / key.removeprefix(f"{prefix}/"))

    def size(self, key: str) -> int | None:
        """The size of an object in bytes; None if it does not exist."""
        try:
            return obstore.head(self.store, key)["size"]
        except (NotFoundError, FileNotFoundError):
            return None

    def list(self, prefix: str) -> list[tuple[str, int]]:
        """(key, size in bytes) of every object under `prefix/`, sorted."""
        batches = obstore.list(self.store, prefix)
        return sorted((meta["path"], meta["size"]) for batch in batches for meta in batch)

    def slice(self, prefix: str, after: str, limit: int) -> Sequence[tuple[str, float]]:
        """(key, unix seconds of its last write) of the next `limit` objects under `prefix/` after the key `after`."""
        batches = obstore.list(self.store, prefix, offset=after, chunk_size=min(limit, 1000))
        objects = ((meta["path"], meta["last_modified"].timestamp()) for batch in batches for meta in batch)
        if isinstance(self.store, LocalStore):  # a folder is not listed in order
            return heapq.nsmallest(limit, objects)
        return list(islice(objects, limit))

    def delete(self, key: str) -> None:
        """Delete an object. A missing object is no error."""
        with suppress(NotFoundError, FileNotFoundError):
            obstore.delete(self.store, key)

    def delete_folder(self, prefix: str) -> None:
        """Delete every object under `prefix/`."""
        for key, _size in self.list(prefix):
            self.delete(key)

    def require_reads(self) -> None:
        """Ask the store once, and for a few seconds at most. Raises an error of obstore if that fails."""
        for _batch in obstore.list(self._once, PROBE_KEY):
            break

    def require_writes(self) -> None:
        """Write a small object, tried once as in `require_reads`. Raises an error of obstore if that fails."""
        obstore.put(self._once, PROBE_KEY, b"")


def _pieces(meta: "ObjectMeta", begin: int = 0, end: int | None = None) -> "Iterator[GetOptions]":
    """The requests for the pieces of an object from `begin` to `end`, and for no other object under its key."""
    last = meta["size"] if end is None else end
    for start in range(begin, last, READ_BYTES):
        options: GetOptions = {"range": (start, min(start + READ_BYTES, last))}
        yield options | {"if_match": meta["e_tag"]} if meta["e_tag"] else options


@contextmanager
def _error_if_replaced(key: str) -> Iterator[None]:
    """Raise `OSError` if a piece is asked for that is of another object than the pieces before it."""
    try:
        yield
    except PreconditionError as error:
        raise OSError(f"{key} was replaced while it was read") from error

"""A folder of the object store as a tar stream, object by object: nothing is held whole."""

import tarfile
from collections.abc import Iterator

from app.storage import Storage


def tar(storage: Storage, prefix: str) -> Iterator[bytes]:
    """The tar file of the objects under `prefix/`, with paths relative to it."""
    for key, size in storage.list(prefix):
        entry = tarfile.TarInfo(key.removeprefix(f"{prefix}/"))
        entry.size = size
        yield entry.tobuf(tarfile.PAX_FORMAT)
        yield from storage.chunks(key)
        yield b"\0" * (-size % tarfile.BLOCKSIZE)
    yield b"\0" * (2 * tarfile.BLOCKSIZE)

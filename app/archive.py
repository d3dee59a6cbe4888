"""Tar streams, written entry by entry. No file is held in memory as a whole."""

import tarfile
from collections.abc import Iterable, Iterator
from urllib.parse import quote

from fastapi.responses import StreamingResponse

from app.storage import Storage
from app.stored_content import FolderContent

Entry = tuple[str, int, Iterable[bytes]]
"""A file's path in the archive, its size in bytes, and its content."""


def tar(entries: Iterable[Entry]) -> Iterator[bytes]:
    """The tar file of `entries`."""
    for name, size, content in entries:
        entry = tarfile.TarInfo(name)
        entry.size = size
        yield entry.tobuf(tarfile.PAX_FORMAT)
        yield from content
        yield b"\0" * (-size % tarfile.BLOCKSIZE)
    yield b"\0" * (2 * tarfile.BLOCKSIZE)


def folder(storage: Storage, prefix: str, content: FolderContent) -> Iterator[Entry]:
    """The objects under `prefix/`, with paths relative to it. Each object is opened when its turn comes.

    Raises `ContentDamaged` at once if they are not all there.
    """
    listed = storage.list(prefix)
    content.require_complete(listed)
    return ((key.removeprefix(f"{prefix}/"), size, storage.chunks(key)) for key, size in listed)


def tar_response(chunks: Iterable[bytes], name: str) -> StreamingResponse:
    """A tar stream as a download called `name`.tar."""
    disposition = f'attachment; filename="{quote(name, safe="")}.tar"'
    return StreamingResponse(chunks, media_type="application/x-tar", headers={"Content-Disposition": disposition})

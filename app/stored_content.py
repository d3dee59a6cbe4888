"""The content that the object store must hold for a row: each row that names objects knows their number, size and hash.

An empty listing does not say why it is empty. So whoever reads objects compares them with their row.
"""

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from app.errors import Gone
from app.files.tables import File
from app.storage import Storage, WrongSize, files_below

GONE = "content_gone"
"""The code of errors about content that the object store has lost."""


class ContentDamaged(Exception):
    """The object store does not hold what a row says. The message says what is wrong, as the end of a sentence."""


@dataclass(frozen=True)
class FolderContent:
    """The number of objects of a folder, their size together, and the hash of their names and contents.

    `objects` and `sha256` are None in rows that a version before schema 0009 wrote. Such a folder must hold something.
    """

    objects: int | None = None
    bytes: int | None = None
    sha256: str | None = None

    @classmethod
    def of(cls, folder: Path, hashes: Mapping[str, str] | None = None) -> Self:
        """The content of a local folder. `hashes` are the SHA-256 of its files by path, if they are known."""
        files = files_below(folder)
        digest = hashlib.sha256()
        for path in files:
            name = path.relative_to(folder).as_posix()
            digest.update(f"{name}\n{hashes[name] if hashes else sha256_of(path)}\n".encode())
        return cls(len(files), sum(path.stat().st_size for path in files), digest.hexdigest())

    def as_columns(self) -> dict[str, int | str | None]:
        """The values of the columns `objects`, `bytes` and `sha256`."""
        return asdict(self)

    def require_complete(self, listed: Iterable[tuple[str, int]]) -> None:
        """Raise `ContentDamaged` unless the `listed` objects, each (key, size), have the right number and size."""
        sizes = [size for _, size in listed]
        if self.objects is None and not sizes:
            raise ContentDamaged("none of its files is there")
        if self.objects is not None and len(sizes) != self.objects:
            raise ContentDamaged(f"{len(sizes)} of its {self.objects} files are there")
        if self.objects is not None and sum(sizes) != self.bytes:
            raise ContentDamaged(f"its files have {sum(sizes)} bytes and should have {self.bytes}")


UNKNOWN = FolderContent()


def store_folder(storage: Storage, prefix: str, folder: Path) -> FolderContent:
    """Write a local folder under `prefix/`. Returns what a reader must find there."""
    content = FolderContent.of(folder)
    storage.put_folder(prefix, folder)
    return content


def fetch_folder(storage: Storage, prefix: str, content: FolderContent, folder: Path) -> None:
    """Copy the objects under `prefix/` into a new `folder`. Raises `ContentDamaged` if they differ from `content`."""
    content.require_complete(storage.list(prefix))
    for _ in range(2):  # a second try, in case the copy was damaged on its way
        storage.get_folder(prefix, folder)
        if content.sha256 is None or FolderContent.of(folder) == content:
            return
        shutil.rmtree(folder)
    raise ContentDamaged("its files are not those that were stored")


def fetch_file(storage: Storage, file: File, path: Path) -> None:
    """Copy the content of `file` to `path`. Raises `ContentDamaged` if it is missing, or not the one of the row.

    Result files of versions before schema 0009 have no hash. Their size is compared.
    """
    for _ in range(2):  # a second try, in case the copy was damaged on its way
        try:
            storage.get_file(file.key, path)
        except FileNotFoundError:
            if not path.parent.exists():
                raise  # nobody waits for it any more
            raise ContentDamaged("its content is missing") from None
        size = path.stat().st_size
        if size == file.bytes and (not file.sha256 or sha256_of(path) == file.sha256):
            return
    if size != file.bytes:
        raise ContentDamaged(f"its content has {size} bytes and should have {file.bytes}")
    raise ContentDamaged("its content is not the one that was stored")


def chunks_of(storage: Storage, file: File, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    """The bytes of `file` from `start` to before `end`, piece by piece.

    Raises `ContentDamaged` at once if its content is missing or has another size.
    """
    try:
        return storage.chunks(file.key, start, end, file.bytes)
    except FileNotFoundError:
        raise ContentDamaged("its content is missing") from None
    except WrongSize as error:
        raise ContentDamaged(str(error)) from error


def gone(noun: str, name: str, damage: ContentDamaged, param: str) -> Gone:
    """The answer to a request for content that the object store has lost."""
    message = f"The files of the {noun} '{name}' cannot be read: {damage}. The service has lost them."
    return Gone(message, param=param, code=GONE)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

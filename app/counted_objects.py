"""Objects that no other row counts: those of the cache, merged models, and the logs of trainers.

A row says how many bytes each takes, and whose they are. Only the count of what a project stores reads the rows. An
object without a row is found and used all the same.
"""

from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import BigInteger, delete
from sqlalchemy.orm import Mapped, Session, mapped_column

from app.database import Database, Table, database_now
from app.storage import Storage

SHARED = "_shared"
"""Stands for the project where all projects share the cache. No project can have this name."""


def key_of(project: str, name: str, *, shared: bool) -> str:
    """The key of the cached object `name`, such as `tokens/HASH`, that a job of `project` reads or writes.

    The project is part of it, so that nobody learns from a hit what another project has trained on. `shared` is the
    setting `DPO_SHARE_CACHE`.
    """
    kind, _, rest = name.partition("/")
    return f"cache/{kind}/{SHARED if shared else project}/{rest}"


class CountedObject(Table):
    """An object of the store, or a folder of it."""

    # The table keeps its old name, because workers of an older version may run during an upgrade.
    __tablename__ = "cached_objects"

    key: Mapped[str] = mapped_column(primary_key=True)
    project: Mapped[str] = mapped_column(index=True)
    """The project whose job stored it last."""
    bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[float]


def put(storage: Storage, database: Database, project: str, key: str, path: Path) -> None:
    """Store the file `path` as the cached object `key` of a project."""
    storage.put_file(key, path)
    with database.write() as session:
        note(session, project, key, path.stat().st_size)


def note(session: Session, project: str, key: str, size: int) -> None:
    """Count an object or folder of `size` bytes as stored by a project."""
    session.merge(CountedObject(key=key, project=project, bytes=size, created_at=database_now()))


def forget(session: Session, keys: Sequence[str]) -> None:
    """Delete the rows of objects that are not stored any more."""
    session.execute(delete(CountedObject).where(CountedObject.key.in_(keys)))

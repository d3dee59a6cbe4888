"""The name of an installation: in its database and in its object store, so that one is not taken for another's."""

from sqlalchemy import select
from sqlalchemy.orm import Mapped, mapped_column

from app.database import Base, Database
from app.storage import Storage

KEY = "installation"


class Installation(Base):
    """The one row that names this installation; the first migration that knew of it made it."""

    __tablename__ = "installations"

    id: Mapped[str] = mapped_column(primary_key=True)


def is_store_of(database: Database, storage: Storage) -> bool:
    """Whether the object store is this database's. One that belongs to nobody yet is given its name."""
    with database.read() as session:
        name = session.scalars(select(Installation.id)).one()
    try:
        return storage.read(KEY).decode() == name
    except FileNotFoundError:
        storage.put_bytes(KEY, name.encode())
        return True

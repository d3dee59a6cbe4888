"""The name of an installation: in its database and in its object store, so that one is not taken for another's."""

from sqlalchemy import select
from sqlalchemy.orm import Mapped, mapped_column

from app.database import Database, Table
from app.storage import Storage

KEY = "installation"


class Installation(Table):
    """The one row that names this installation; the first migration that knew of it made it."""

    __tablename__ = "installations"

    id: Mapped[str] = mapped_column(primary_key=True)


def owner_of(storage: Storage) -> str | None:
    """The name of the installation that an object store belongs to; None for one that belongs to nobody yet."""
    try:
        return storage.read(KEY).decode()
    except FileNotFoundError:
        return None


def name_of(database: Database) -> str:
    """The name of the installation that a database is of."""
    with database.read() as session:
        return session.scalars(select(Installation.id)).one()

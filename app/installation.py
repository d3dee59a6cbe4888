"""The name of an installation.

The database and the object store both hold it, so that a store is never taken for another installation's.
"""

from sqlalchemy import false, select, update
from sqlalchemy.orm import Mapped, mapped_column

from app.database import Database, Table
from app.storage import Storage

INSTALLATION_KEY = "installation"


class Installation(Table):
    """The only row holds the name of this installation. Migration 0003 wrote it."""

    __tablename__ = "installations"

    id: Mapped[str] = mapped_column(primary_key=True)
    secret_fingerprint: Mapped[str | None]
    """The fingerprint of the key of `DPO_SECRET_KEY`. None until the first process of this version starts."""
    claims_paused: Mapped[bool] = mapped_column(default=False, server_default=false())
    """Whether no worker may start a job."""
    read_only: Mapped[str | None]
    """Why nothing may be changed; None if it may."""


def store_installation(storage: Storage) -> str | None:
    """The name of the installation that owns an object store; None if none owns it yet."""
    try:
        return storage.read(INSTALLATION_KEY).decode()
    except FileNotFoundError:
        return None


def require_writes(database: Database) -> None:
    """Write to the database. Raises an error of SQLAlchemy if that fails, as on a standby or a full disk."""
    with database.write() as session:
        session.execute(update(Installation).values(id=Installation.id))


def database_installation(database: Database) -> str:
    """The name of the installation that a database belongs to."""
    with database.read() as session:
        return session.scalars(select(Installation.id)).one()

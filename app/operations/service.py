"""The stops that an operator has made, in the installation's row. Processes look there before they begin something."""

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app.database import Database
from app.errors import Unavailable
from app.installation import Installation
from app.operations.schemas import Operations, OperationsChange
from app.workers import repository as workers

READ_ONLY = "read_only"
"""The code of the error of a write that is refused."""


def current(session: Session) -> Operations:
    """The present stops."""
    claims_paused, read_only = session.execute(select(Installation.claims_paused, Installation.read_only)).one()
    return Operations(claims_paused=claims_paused, read_only=read_only)


def may_claim(session: Session, worker: str) -> bool:
    """Whether this worker may start jobs."""
    is_cordoned = workers.cordoned(worker).scalar_subquery()
    claims_paused, read_only, cordoned = session.execute(
        select(Installation.claims_paused, Installation.read_only, is_cordoned)
    ).one()
    return not claims_paused and read_only is None and not cordoned


def is_read_only(database: Database) -> bool:
    """Whether nothing may be changed, apart from what running jobs write."""
    with database.read() as session:
        return current(session).read_only is not None


def require_writable(database: Database) -> None:
    """Raise `Unavailable` while nothing may be changed."""
    with database.read() as session:
        reason = current(session).read_only
    if reason is not None:
        raise Unavailable(f"Nothing can be changed at present: {reason}", code=READ_ONLY)


class OperationsControl:
    """Show and change what is stopped."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def get(self) -> Operations:
        with self.database.read() as session:
            return current(session)

    def change(self, change: OperationsChange) -> Operations:
        """Stop what `change` names, or end that. The rest stays."""
        with self.database.write() as session:
            values = change.model_dump(include=change.model_fields_set)
            if values:
                session.execute(update(Installation).values(values))
            return current(session)

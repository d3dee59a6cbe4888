"""Chores: work that one process of the installation does now and then, whichever finds it due first.

A process that dies over a chore leaves it to the next one that finds it due. So a chore can be done again from where
its cursor stands.
"""

from sqlalchemy import or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Mapped, mapped_column

from app.database import Database, Table, database_now


class Chore(Table):
    """A chore, when it is due next, and how far it has come."""

    __tablename__ = "chores"

    name: Mapped[str] = mapped_column(primary_key=True)
    due_at: Mapped[float]
    cursor: Mapped[str]


def take(database: Database, name: str, seconds: float) -> str | None:
    """Take a chore if it is due, and make it due again after `seconds`. Returns its cursor; None if it is not due.

    A due time that is further away was written before the clock was set back.
    """
    due = or_(Chore.due_at <= database_now(), Chore.due_at > database_now() + seconds)
    with database.read() as session:  # most of those who ask find it not due, and write nothing
        is_due = session.scalar(select(due).where(Chore.name == name))
    if is_due is not None and not is_due:
        return None
    try:
        with database.write() as session:
            if is_due is None:  # nobody has done it yet
                session.add(Chore(name=name, due_at=0.0, cursor=""))
                session.flush()
            taken = update(Chore).where(Chore.name == name, due).values(due_at=database_now() + seconds)
            return session.scalar(taken.returning(Chore.cursor))
    except IntegrityError:  # another process made the row in the same moment, and has taken it
        return None


def note(database: Database, name: str, cursor: str, seconds: float) -> None:
    """Write how far a chore has come, and make it due again after `seconds`."""
    with database.write() as session:
        changed = update(Chore).where(Chore.name == name)
        session.execute(changed.values(cursor=cursor, due_at=database_now() + seconds))

"""A work queue in the rows of a table. A row says who does the work, until when, and as which attempt.

    claim → heartbeat, heartbeat, … → write the result, guarded by the attempt

A claim starts a new attempt and takes a lease. The worker renews the lease while it works, and `id` and `attempt`
guard each of its writes. A lease that is not renewed lapses. The reaper then releases its row for another attempt
after a pause. Jobs, derived artifacts and webhook deliveries are queues of this kind.
"""

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from sqlalchemy import ColumnElement, Row, Select, SQLColumnExpression, and_, bindparam, case, or_, select, update
from sqlalchemy.orm import Mapped, Session, mapped_column
from sqlalchemy.sql.dml import ReturningUpdate

from app.database import database_now

LEASE_SECONDS = 15.0
HEARTBEAT_SECONDS = 3.0
OUTAGE_SECONDS = 60.0
"""Grace period: how long a worker keeps working after its lease ends while the database is unreachable."""
MAX_LOST_ATTEMPTS = 3
"""Work is given up after this many lost attempts without progress."""
RETRY_SECONDS = 20.0
"""The longest pause before another attempt at work whose worker was lost."""


LONGEST_SETBACK_SECONDS = 300.0
"""The longest pause before another attempt at work that the object store, a disk or the database has set back."""


def retry_pause(lost_attempts: int) -> float:
    """Seconds before the next attempt after a lost one: 1, then 20."""
    return RETRY_SECONDS ** (lost_attempts - 1)


def setback_pause(setbacks: int) -> float:
    """Seconds before the next attempt after so many setbacks in a row: 2, 4, 8, up to five minutes."""
    return min(2.0**setbacks, LONGEST_SETBACK_SECONDS)


class Queued:
    """The columns of a row that workers claim."""

    id: Mapped[str] = mapped_column(primary_key=True)
    attempt: Mapped[int]
    """The fencing token: `id` and `attempt` guard every write of a worker."""
    lease_owner: Mapped[str | None]
    lease_expires_at: Mapped[float | None]
    eligible_at: Mapped[float]
    """No worker may claim the row before this time (unix seconds)."""
    lost_attempts: Mapped[int]
    """Attempts whose worker was lost since the last progress."""
    setbacks: Mapped[int] = mapped_column(default=0, server_default="0")
    """Attempts since the last progress that a fault of the object store, a disk or the database has ended.

    They do not count as lost. However long the fault lasts, the work goes on after it.
    """


PROGRESS: dict[str, Any] = {"lost_attempts": 0, "setbacks": 0}
"""The columns that an attempt writes when it has made progress that no later attempt has to repeat."""
Work = TypeVar("Work", bound=Queued)


class WorkQueue(Generic[Work]):
    """The rows of one table as a queue."""

    def __init__(
        self,
        table: type[Work],
        *,
        noun: str,
        active: ColumnElement[bool],
        order: Sequence[SQLColumnExpression[object]],
        lease_seconds: float = LEASE_SECONDS,
        longest_pause: float = RETRY_SECONDS,
    ) -> None:
        """`active` holds for every row that may have a lease. The first row in `order` is claimed next.

        `noun` is what the log calls a row.
        """
        self.table, self.noun, self.active, self.order = table, noun, active, order
        self.lease_seconds, self.longest_pause = lease_seconds, longest_pause

    # -- a worker's steps ----------------------------------------------------------------------------------------

    def claim(self, session: Session, owner: str, *conditions: ColumnElement[bool]) -> Work | None:
        """Take the lease of the first free row that meets `conditions`, in one statement; None if there is none."""
        return session.scalar(self.claiming(*conditions), {"claimed_by": owner})

    def first(self, *conditions: ColumnElement[bool]) -> Select[str]:
        """Selects the id of the first free row that meets `conditions`, and locks it."""
        statement = select(self.table.id).where(self.free(), *conditions).order_by(*self.order).limit(1)
        return statement.with_for_update(skip_locked=True)

    def claiming(
        self, *conditions: ColumnElement[bool], fits: ColumnElement[bool] | None = None, **values: object
    ) -> "ReturningUpdate[Work]":
        """The statement of a claim by the owner `claimed_by`, a parameter. It begins a new attempt.

        If the first row that meets `conditions` does not meet `fits`, nothing is claimed. `values` are columns that it
        writes as well.
        """
        table = self.table
        is_free = and_(self.free(), *conditions, *(() if fits is None else (fits,)))
        return (
            update(table)
            .where(table.id == self.first(*conditions).scalar_subquery(), is_free)
            .values(
                attempt=table.attempt + 1,
                lease_owner=bindparam("claimed_by"),
                lease_expires_at=database_now() + self.lease_seconds,
                **values,
            )
            .returning(table)
            .execution_options(populate_existing=True)
        )

    def heartbeat(
        self, session: Session, row_id: str, attempt: int, *returning: SQLColumnExpression[object], **values: object
    ) -> Row[*tuple[Any, ...]] | None:
        """Extend the lease and return the columns `returning`; None if this attempt no longer holds the lease."""
        statement = update(self.table).where(self.holds(row_id, attempt))
        statement = statement.values(lease_expires_at=database_now() + self.lease_seconds, **values)
        return session.execute(statement.returning(*(returning or (self.table.id,)))).one_or_none()

    def write(self, session: Session, row_id: str, attempt: int, **values: object) -> bool:
        """Write columns of a row; False if this attempt does not hold its lease."""
        statement = update(self.table).where(self.holds(row_id, attempt)).values(**values).returning(self.table.id)
        return session.scalar(statement) is not None

    def release(self, session: Session, row_id: str, attempt: int, *, pause: float | None, **values: object) -> bool:
        """Give the lease back. Another attempt may begin after `pause` seconds; None means there is none."""
        eligible_at = None if pause is None else database_now() + pause
        values |= {"lease_owner": None, "lease_expires_at": None, "eligible_at": eligible_at}
        return self.write(session, row_id, attempt, **values)

    # -- what a reaper sees --------------------------------------------------------------------------------------

    def leases(self) -> "Select[str, int, float | None]":
        """Selects every lease that someone holds: (id, attempt, end)."""
        table = self.table
        statement = select(table.id, table.attempt, table.lease_expires_at)
        return statement.where(self.active, table.lease_owner.is_not(None))

    def lapsed(self, session: Session) -> Sequence[Work]:
        """The rows whose worker stopped renewing its lease, locked and in the queue's order.

        A lease that ends later than a new one would was taken before the clock was set back.
        """
        table, ends = self.table, self.table.lease_expires_at
        farthest = database_now() + self.lease_seconds + HEARTBEAT_SECONDS
        has_lapsed = or_(ends.is_(None), ends < database_now(), ends > farthest)
        statement = select(table).where(self.active, table.lease_owner.is_not(None), has_lapsed).order_by(*self.order)
        return session.scalars(statement.with_for_update(skip_locked=True)).all()

    # -- conditions ----------------------------------------------------------------------------------------------

    def free(self) -> ColumnElement[bool]:
        """The condition that nobody has the row, and that its time has come.

        A time further away than any pause was set before the clock was set back.
        """
        table, after_setback = self.table, max(self.longest_pause, LONGEST_SETBACK_SECONDS)
        longest_pause = case((table.setbacks > 0, after_setback), else_=self.longest_pause)
        farthest = database_now() + longest_pause + HEARTBEAT_SECONDS
        due = or_(table.eligible_at <= database_now(), table.eligible_at > farthest)
        return and_(table.lease_owner.is_(None), due)

    def holds(self, row_id: str, attempt: int) -> ColumnElement[bool]:
        """The condition that this attempt still holds the lease of the row."""
        table = self.table
        return and_(table.id == row_id, table.attempt == attempt, table.lease_owner.is_not(None))

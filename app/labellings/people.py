"""People label: each gets one item at a time, and each verdict is a row at once.

An item is kept for the person to whom it was given. It goes to as many people as the labelling wants, in an order of
answers that is drawn for each. When all items have their verdicts, a worker makes the file.
"""

from collections.abc import Iterator
from hashlib import sha256

import orjson
from sqlalchemy import ColumnElement, case, func, or_, select, update
from sqlalchemy.orm import Session, aliased

from app.broker import Broker, Lane
from app.database import Database, database_now, new_id, now
from app.errors import Conflict, NotFound, no_such
from app.jobs import events as job_events
from app.jobs import queries
from app.jobs.kinds import LABELLING_JOB
from app.jobs.states import Status
from app.jobs.tables import Job
from app.keys.service import Caller
from app.labellings import queue as label_queue
from app.labellings.export import FORMS, ExportFormat
from app.labellings.queue import PEOPLE, STANDS, names_of
from app.labellings.schemas import Annotator, Given, LabelTask, PeopleState, VerdictObject, VerdictSpec
from app.labellings.tables import LabelItem, LabelVerdict
from app.spec.json_types import JsonObject
from app.spec.labelling import LabellingSpec, People


def shown_order(labelling_id: str, number: int, annotator: str, count: int) -> list[int]:
    """The places of an item's answers in the order in which `annotator` sees them. It is the same each time."""

    def drawn(place: int) -> bytes:
        return sha256(f"{labelling_id} {number} {annotator} {place}".encode()).digest()

    return sorted(range(count), key=drawn)


class PeopleWhoLabel:
    """Gives items to people, and takes their verdicts."""

    def __init__(self, database: Database, broker: Broker) -> None:
        self.database, self.broker = database, broker

    # -- for annotators --------------------------------------------------------------------------------------------

    def open(self, project: str) -> list[tuple[str, str | None]]:
        """(id, name) of each labelling of a project that waits for people."""
        statement = queries.readable(project, LABELLING_JOB).where(Job.status == Status.QUEUED, Job.awaits == PEOPLE)
        with self.database.read() as session:
            jobs = session.scalars(statement.order_by(Job.created_at)).all()
            return [(job.id, job.spec.get("name")) for job in jobs]

    def next(self, caller: Caller, labelling_id: str) -> Given:
        """The item that the caller is to label: the one that was given before, or a new one."""
        with self.database.write() as session:
            job = _labelling(session, caller.project, labelling_id)
            return self._next(session, job, caller)

    def answer(self, caller: Caller, labelling_id: str, verdict: VerdictSpec) -> Given:
        """Store a verdict; returns the next item. The same verdict sent twice counts once. Raises `Conflict`."""
        finished = False
        with self.database.write() as session:
            job = _labelling(session, caller.project, labelling_id, lock=True)
            item = _item(session, job, verdict.item)
            count = len(item.content["answers"])
            ranking = verdict.placed(shown_order(job.id, item.number, caller.key_id, count))
            earlier = _own(session, job, caller, item.number)
            if earlier is not None:
                if (earlier.ranking, earlier.flag) != (ranking, verdict.flag):
                    raise Conflict("You have labelled this item already. Undo that first.", code="already_labelled")
                return self._next(session, job, caller)
            _require_open(job)
            _require_given(session, job, item, caller)
            session.add(
                LabelVerdict(
                    id=new_id("verdict"),
                    labelling_id=job.id,
                    number=item.number,
                    annotator=caller.key_id,
                    created_at=database_now(),
                    ranking=ranking,
                    flag=verdict.flag,
                    withdrawn_at=None,
                )
            )
            item.verdicts += ranking is not None
            item.flagged = verdict.flag is not None
            item.reserved_by = item.reserved_until = None
            session.flush()
            if session.scalar(select(LabelItem.number).where(*_unfinished(job)).limit(1)) is None:
                finished = _go_on(session, job, "All prompts have their verdicts.")
            given = self._next(session, job, caller)
        if finished:
            self.broker.wake(Lane.GPU)
        return given

    def undo(self, caller: Caller, labelling_id: str) -> Given:
        """Take back the caller's last verdict; returns its item, unless somebody else has that by now.

        Raises `NotFound` if there is none.
        """
        with self.database.write() as session:
            job = _labelling(session, caller.project, labelling_id, lock=True)
            _require_open(job)
            statement = select(LabelVerdict).where(*_of(job, caller), STANDS)
            verdict = session.scalars(statement.order_by(LabelVerdict.created_at.desc()).limit(1)).first()
            if verdict is None:
                raise NotFound("You have no verdict to take back.", code="verdict_not_found")
            item = _item(session, job, verdict.number)
            verdict.withdrawn_at = now(session)
            item.verdicts -= verdict.ranking is not None
            item.flagged = item.flagged and verdict.flag is None
            session.execute(  # whatever else the caller holds goes to others
                update(LabelItem)
                .where(LabelItem.labelling_id == job.id, LabelItem.reserved_by == caller.key_id)
                .values(reserved_by=None, reserved_until=None)
            )
            session.flush()
            if item.reserved_by is not None and (item.reserved_until or 0.0) >= now(session):
                return self._next(session, job, caller)  # somebody else has it
            return self._given(session, job, caller, _reserve(session, job, item, caller))

    # -- for those who own the labelling -----------------------------------------------------------------------------

    def state(self, project: str, labelling_id: str) -> PeopleState:
        """How far people are, and what each has done."""
        with self.database.read() as session:
            job = _labelling(session, project, labelling_id)
            flagged, items = session.execute(
                select(func.count().filter(LabelItem.flagged), func.count()).where(LabelItem.labelling_id == job.id)
            ).one()
            own = select(
                LabelVerdict.annotator, func.count(LabelVerdict.ranking), func.count(LabelVerdict.flag), func.count()
            ).where(LabelVerdict.labelling_id == job.id, STANDS)
            rows = session.execute(own.group_by(LabelVerdict.annotator)).all()
            names = names_of(session, [annotator for annotator, *_ in rows])
            annotators = [
                Annotator(name=names[annotator], verdicts=ranked, flags=flags, skips=all_of_them - ranked - flags)
                for annotator, ranked, flags, all_of_them in rows
            ]
            return PeopleState(
                open=_is_open(job),
                items=items,
                flagged=flagged,
                wanted=items * people_of(job).verdicts,
                verdicts=sum(annotator.verdicts for annotator in annotators),
                annotators=sorted(annotators, key=lambda annotator: annotator.name),
            )

    def verdicts(self, project: str, labelling_id: str) -> list[VerdictObject]:
        """All verdicts, oldest first, with those that were taken back."""
        with self.database.read() as session:
            job = _labelling(session, project, labelling_id)
            statement = select(LabelVerdict).where(LabelVerdict.labelling_id == job.id)
            found = session.scalars(statement.order_by(LabelVerdict.created_at, LabelVerdict.id)).all()
            names = names_of(session, {verdict.annotator for verdict in found})
            return [VerdictObject.of(verdict, names[verdict.annotator]) for verdict in found]

    def export(self, project: str, labelling_id: str, form: ExportFormat) -> Iterator[bytes]:
        """All items with their verdicts as a JSON list, in the form of another tool."""
        with self.database.read() as session:
            job = _labelling(session, project, labelling_id)
            verdicts = label_queue.verdicts(session, job.id)
            statement = select(LabelItem.number, LabelItem.content).where(LabelItem.labelling_id == job.id)
            rows = session.execute(statement.order_by(LabelItem.number)).all()
        records = FORMS[form]((number, content, verdicts.get(number, [])) for number, content in rows)
        return _json_list(records)

    def close(self, project: str, labelling_id: str) -> None:
        """Let a worker make the file from the verdicts so far. Raises `Conflict` if people do not label."""
        with self.database.write() as session:
            job = _labelling(session, project, labelling_id)
            if not _go_on(session, job, "The labelling was closed to people."):
                raise Conflict(f"Labelling {labelling_id} does not wait for people.", code="not_waiting_for_people")
        self.broker.wake(Lane.GPU)

    # -- steps -------------------------------------------------------------------------------------------------------

    def _next(self, session: Session, job: Job, caller: Caller) -> Given:
        if not _is_open(job):
            return self._given(session, job, caller, None)
        mine = LabelItem.reserved_by == caller.key_id
        free = or_(LabelItem.reserved_until.is_(None), LabelItem.reserved_until < database_now(), mine)
        seen = aliased(LabelVerdict)
        own = select(seen.number).where(
            seen.labelling_id == job.id, seen.annotator == caller.key_id, seen.number == LabelItem.number,
            seen.withdrawn_at.is_(None),
        )  # fmt: skip
        statement = (
            select(LabelItem)
            .where(*_unfinished(job), free, ~own.correlate(LabelItem).exists())
            .order_by(case((mine, 0), else_=1), LabelItem.number)
            .limit(1)
            .with_for_update(skip_locked=True)
        )
        item = session.scalars(statement).first()
        return self._given(session, job, caller, None if item is None else _reserve(session, job, item, caller))

    @staticmethod
    def _given(session: Session, job: Job, caller: Caller, item: LabelItem | None) -> Given:
        items = session.scalars(select(func.count()).where(LabelItem.labelling_id == job.id)).one()
        done = session.scalars(select(func.count()).where(*_of(job, caller), STANDS)).one()
        task = None
        if item is not None:
            answers = item.content["answers"]
            order = shown_order(job.id, item.number, caller.key_id, len(answers))
            task = LabelTask(
                item=item.number,
                prompt=item.content["prompt"],
                answers=[answers[place] for place in order],
                reserved_until=int(item.reserved_until or 0),
            )
        return Given(
            name=job.spec.get("name"), guideline=people_of(job).guideline, open=_is_open(job), task=task, done=done,
            items=items,
        )  # fmt: skip


def people_of(job: Job) -> People:
    """The people that a labelling wants. Raises `NotFound` if it wants none."""
    people = LabellingSpec.stored(job.spec).people
    if people is None:
        raise NotFound(f"Labelling {job.id} has no people among its labellers.", code="people_not_found")
    return people


def _json_list(records: Iterator[JsonObject]) -> Iterator[bytes]:
    start = b"["
    for record in records:
        yield start + orjson.dumps(record)
        start = b",\n"
    yield b"]\n" if start != b"[" else b"[]\n"


def _labelling(session: Session, project: str, labelling_id: str, *, lock: bool = False) -> Job:
    """The labelling. With `lock`, verdicts come one after another, so that somebody sees that one was the last."""
    statement = queries.readable(project, LABELLING_JOB).where(Job.id == labelling_id)
    job = session.scalar(statement.with_for_update() if lock else statement)
    if job is None:
        raise no_such(LABELLING_JOB.title, labelling_id, code=LABELLING_JOB.code, param="labelling_id")
    people_of(job)
    return job


def _is_open(job: Job) -> bool:
    """Whether people may label."""
    return job.status == Status.QUEUED and job.awaits == PEOPLE and not job.paused


def _require_open(job: Job) -> None:
    if not _is_open(job):
        state = "paused" if job.paused else "not open to people"
        raise Conflict(f"Labelling {job.id} is {state}.", code="not_waiting_for_people")


def _item(session: Session, job: Job, number: int) -> LabelItem:
    """An item, locked. Raises `NotFound`."""
    statement = select(LabelItem).where(LabelItem.labelling_id == job.id, LabelItem.number == number)
    item = session.scalars(statement.with_for_update().execution_options(populate_existing=True)).first()
    if item is None:
        raise no_such("item of this labelling", str(number), code="item", param="item")
    return item


def _require_given(session: Session, job: Job, item: LabelItem, caller: Caller) -> None:
    """Refuse a verdict on an item that the caller does not have. A time that has run out costs nothing by itself."""
    if item.flagged or item.verdicts >= people_of(job).verdicts:
        raise Conflict("This item needs no more verdicts.", code="not_given")
    if item.reserved_by != caller.key_id and (item.reserved_until or 0.0) >= now(session):
        raise Conflict("Meanwhile this item was given to somebody else.", code="not_given")


def _reserve(session: Session, job: Job, item: LabelItem, caller: Caller) -> LabelItem:
    item.reserved_by = caller.key_id
    item.reserved_until = now(session) + 60 * people_of(job).minutes
    session.flush()
    return item


def _of(job: Job, caller: Caller) -> tuple[ColumnElement[bool], ...]:
    return LabelVerdict.labelling_id == job.id, LabelVerdict.annotator == caller.key_id


def _own(session: Session, job: Job, caller: Caller, number: int) -> LabelVerdict | None:
    """The caller's verdict on an item that stands."""
    statement = select(LabelVerdict).where(*_of(job, caller), LabelVerdict.number == number, STANDS)
    return session.scalars(statement).first()


def _unfinished(job: Job) -> tuple[ColumnElement[bool], ...]:
    """The conditions of an item that needs more verdicts."""
    wanted = people_of(job).verdicts
    return LabelItem.labelling_id == job.id, LabelItem.flagged.is_(False), LabelItem.verdicts < wanted


def _go_on(session: Session, job: Job, message: str) -> bool:
    """Let a worker go on with the labelling; False if it waits for nobody any more."""
    waits = (Job.id == job.id, Job.status == Status.QUEUED, Job.awaits == PEOPLE)
    if session.scalar(update(Job).where(*waits).values(awaits=None).returning(Job.id)) is None:
        return False
    job_events.add(session, job.id, message)
    session.refresh(job)
    return True

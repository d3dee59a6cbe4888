"""All SQL about uploads. Every statement starts from what the caller's project may read."""

from collections.abc import Sequence

from sqlalchemy import Select, delete, func, select, update
from sqlalchemy.orm import Session

from app.database import database_now
from app.uploads.tables import Upload, UploadPart


def readable(project: str) -> Select[Upload]:
    return select(Upload).where(Upload.project == project)


def get(session: Session, project: str, upload_id: str, *, lock: bool = False) -> Upload | None:
    """One upload. A pending one whose time is over has the status `expired`, even if its row does not say so yet."""
    statement = readable(project).where(Upload.id == upload_id)
    upload = session.scalar(statement.with_for_update() if lock else statement)
    if upload is not None and upload.status == "pending":
        now = session.scalars(select(database_now())).one()
        if upload.expires_at < now:
            session.expunge(upload)  # housekeeping writes the status
            upload.status = "expired"
    return upload


def get_part(session: Session, part_id: str) -> UploadPart | None:
    return session.get(UploadPart, part_id)


def forget_part(session: Session, part_id: str) -> None:
    session.execute(delete(UploadPart).where(UploadPart.id == part_id))


def parts(session: Session, upload_id: str, part_ids: Sequence[str]) -> list[UploadPart | None]:
    """The parts of an upload in the order of `part_ids`; None for an id that is not one of its parts."""
    statement = select(UploadPart).where(UploadPart.upload_id == upload_id, UploadPart.stored.is_(True))
    part_by_id = {part.id: part for part in session.scalars(statement)}
    return [part_by_id.get(part_id) for part_id in part_ids]


def received(session: Session, upload_id: str, *, coming: bool = False) -> int:
    """Total bytes of the parts that are stored; with `coming`, also of those that are on their way."""
    statement = select(func.coalesce(func.sum(UploadPart.bytes), 0)).where(UploadPart.upload_id == upload_id)
    return int(session.scalars(statement if coming else statement.where(UploadPart.stored.is_(True))).one())


def end(session: Session, upload_id: str, status: str, file_id: str | None = None) -> bool:
    """Give a pending upload its final `status`; False if it is no longer pending."""
    statement = (
        update(Upload)
        .where(Upload.id == upload_id, Upload.status == "pending")
        .values(status=status, file_id=file_id)
        .returning(Upload.id)
    )
    return session.scalar(statement) is not None


def expire(session: Session) -> None:
    """Write the status `expired` to the uploads whose time is over."""
    statement = update(Upload).where(Upload.status == "pending", Upload.expires_at < database_now())
    session.execute(statement.values(status="expired"))


def ended_with_parts(session: Session) -> list[Upload]:
    """Uploads that have ended and still have parts."""
    ended = select(Upload).where(Upload.status != "pending", Upload.id.in_(select(UploadPart.upload_id)))
    return list(session.scalars(ended))


def forget_parts(session: Session, upload_id: str) -> None:
    session.execute(delete(UploadPart).where(UploadPart.upload_id == upload_id))

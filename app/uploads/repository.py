"""All SQL about uploads. Every statement starts from what the caller's project may read."""

from collections.abc import Sequence

from sqlalchemy import Select, delete, func, select, update
from sqlalchemy.orm import Session

from app.database import database_now
from app.uploads.tables import Upload, UploadPart


def readable(project: str) -> Select[Upload]:
    return select(Upload).where(Upload.project == project)


def get(session: Session, project: str, upload_id: str, *, lock: bool = False) -> Upload | None:
    """One upload, expired by now where its time is over."""
    statement = readable(project).where(Upload.id == upload_id)
    upload = session.scalar(statement.with_for_update() if lock else statement)
    if upload is not None and upload.status == "pending":
        now = session.scalars(select(database_now())).one()
        if upload.expires_at < now:
            session.expunge(upload)  # housekeeping writes it
            upload.status = "expired"
    return upload


def get_part(session: Session, part_id: str) -> UploadPart | None:
    return session.get(UploadPart, part_id)


def parts(session: Session, upload_id: str, part_ids: Sequence[str]) -> list[UploadPart | None]:
    """The parts of an upload in the order of `part_ids`; None for those that are not its."""
    statement = select(UploadPart).where(UploadPart.upload_id == upload_id)
    found = {part.id: part for part in session.scalars(statement)}
    return [found.get(part_id) for part_id in part_ids]


def received(session: Session, upload_id: str) -> int:
    """Bytes of the parts that came."""
    statement = select(func.coalesce(func.sum(UploadPart.bytes), 0)).where(UploadPart.upload_id == upload_id)
    return int(session.scalars(statement).one())


def end(session: Session, upload_id: str, status: str, file_id: str | None = None) -> bool:
    """Take an upload out of `pending`; False where it is not there any more."""
    statement = (
        update(Upload)
        .where(Upload.id == upload_id, Upload.status == "pending")
        .values(status=status, file_id=file_id)
        .returning(Upload.id)
    )
    return session.scalar(statement) is not None


def expire(session: Session) -> None:
    """End the uploads whose time is over."""
    statement = update(Upload).where(Upload.status == "pending", Upload.expires_at < database_now())
    session.execute(statement.values(status="expired"))


def left_over(session: Session) -> list[Upload]:
    """Uploads that have ended and still have parts."""
    ended = select(Upload).where(Upload.status != "pending", Upload.id.in_(select(UploadPart.upload_id)))
    return list(session.scalars(ended))


def forget_parts(session: Session, upload_id: str) -> None:
    session.execute(delete(UploadPart).where(UploadPart.upload_id == upload_id))

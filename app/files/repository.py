"""All SQL about files. Every statement starts from what the caller's project may read."""

from collections.abc import Sequence

from sqlalchemy import Select, or_, select, update
from sqlalchemy.orm import Session

from app.database import database_now
from app.errors import ServiceError
from app.files.tables import File
from app.pagination import keyset


def readable(project: str) -> Select[File]:
    """The files that `project` may see."""
    return select(File).where(
        File.project == project,
        File.deleted_at.is_(None),
        or_(File.expires_at.is_(None), File.expires_at > database_now()),
    )


def get(session: Session, project: str, file_id: str, *, lock: bool = False) -> File | None:
    """One file. `lock` prevents its deletion until this transaction ends (SQLite has one writer anyway)."""
    statement = readable(project).where(File.id == file_id)
    return session.scalar(statement.with_for_update(read=True) if lock else statement)


def require(session: Session, project: str, file_id: str, param: str, purposes: Sequence[str]) -> File:
    """The file that a request body names in `param`. It cannot be deleted until this transaction ends.

    Raises `ServiceError` if there is none, or if its purpose is not one of `purposes`.
    """
    file = get(session, project, file_id, lock=True)
    if file is None:
        raise ServiceError(f"No such File object: {file_id}", param=param, code="file_not_found")
    if file.purpose not in purposes:
        allowed = " or ".join(f"'{purpose}'" for purpose in purposes)
        message = f"{file_id} has the purpose '{file.purpose}'; upload it as {allowed}."
        raise ServiceError(message, param=param, code="invalid_file_purpose")
    return file


def page(
    session: Session, project: str, filters: dict[str, str], *, after: File | None, limit: int, ascending: bool
) -> list[File]:
    """Up to `limit` + 1 files after the file `after`, in order of creation. `filters`: values of columns, by name."""
    statement = readable(project).filter_by(**filters)
    return list(session.scalars(keyset(statement, (File.created_at, File.id), after, limit, ascending=ascending)))


def hashes(session: Session, project: str, file_ids: list[str]) -> dict[str, str | None]:
    """The SHA-256 of each file, by id; None if the file has no row any more."""
    sha256_by_id = dict(
        session.execute(select(File.id, File.sha256).where(File.project == project, File.id.in_(file_ids))).all()
    )
    return {file_id: sha256_by_id.get(file_id) for file_id in file_ids}


def mark_deleted(session: Session, project: str, file_id: str) -> bool:
    """Hide a file from now on; False if there is none."""
    statement = (
        update(File)
        .where(File.id == file_id, File.project == project, File.deleted_at.is_(None))
        .values(deleted_at=database_now())
        .returning(File.id)
    )
    return session.scalar(statement) is not None


def expire(session: Session) -> None:
    """Mark expired files as deleted, as their owner would."""
    statement = update(File).where(
        File.deleted_at.is_(None), File.expires_at.is_not(None), File.expires_at < database_now()
    )
    session.execute(statement.values(deleted_at=database_now()))

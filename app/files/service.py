"""Operations on files."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import get_args

from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from app.database import Database, database_now, new_id
from app.errors import ServiceError, describe_validation_error, no_such
from app.files import repository
from app.files.multipart import UploadForm
from app.files.ranges import Part
from app.files.schemas import ExpiresAfter, UploadPurpose
from app.files.tables import File
from app.idempotency.service import RequestIdentity
from app.projects.reservations import Reservations, Room
from app.projects.service import require_room
from app.spec.datasets.mapping import Mapping
from app.spec.json_types import JsonObject
from app.storage import Storage
from app.stored_content import ContentDamaged, chunks_of, gone

MAX_FILE_BYTES = 8 * 1024**3


@dataclass(frozen=True)
class _Fields:
    """The checked fields of an upload form."""

    expires_after: int | None
    mapping: JsonObject | None


class Files:
    """Create, find, read and delete files."""

    def __init__(self, database: Database, storage: Storage) -> None:
        self.database, self.storage = database, storage
        self.reservations = Reservations(database)

    async def upload(self, project: str, form: UploadForm, identity: RequestIdentity) -> File:
        """Stream an upload to the object store, then write its row. If anything fails, neither stays."""
        digest = hashlib.sha256()
        file = File(id=new_id("file"), project=project)
        async with (
            self.reservations.room(project, form.announced) as room,
            self.storage.object_written(file.key, room.covered(form.file_chunks(digest.update))),
        ):
            fields = _checked(form)
            file.filename, file.purpose = (form.filename or "upload")[:512], form.fields["purpose"]
            file.bytes, file.sha256 = form.size, digest.hexdigest()
            stored = await run_in_threadpool(self._insert, file, fields, identity, room)
            if stored is not file:  # an earlier sending made the file
                await run_in_threadpool(self.storage.delete, file.key)
        return stored

    def _insert(self, file: File, fields: _Fields, identity: RequestIdentity, room: Room) -> File:
        content = {
            "sha256": file.sha256,
            "filename": file.filename,
            "purpose": file.purpose,
            "expires_after": fields.expires_after,
            "mapping": fields.mapping,
        }
        with self.database.write() as session:
            earlier = identity.earlier(session, "files.create", content)
            existing = None if earlier is None else repository.get(session, file.project, earlier)
            if existing is not None:
                return existing
            room.release(session)
            require_room(session, file.project, file.bytes)
            file.created_at, file.mapping = database_now(), fields.mapping
            if fields.expires_after is not None:
                file.expires_at = database_now() + fields.expires_after
            session.add(file)
            session.flush()
            session.refresh(file)
            identity.record(session, "files.create", content, file.id)
        return file

    def get(self, project: str, file_id: str) -> File:
        with self.database.read() as session:
            file = repository.get(session, project, file_id)
        if file is None:
            raise no_such("File object", file_id, code="file")
        return file

    def page(
        self,
        project: str,
        *,
        purpose: str | None = None,
        sha256: str | None = None,
        after: str | None,
        limit: int,
        ascending: bool,
    ) -> list[File]:
        """Up to `limit` + 1 files after the file with the id `after`."""
        with self.database.read() as session:
            last_file = None
            if after is not None and (last_file := repository.get(session, project, after)) is None:
                raise no_such("File object", after, code="file", param="after")
            filters = {name: value for name, value in (("purpose", purpose), ("sha256", sha256)) if value is not None}
            return repository.page(session, project, filters, after=last_file, limit=limit, ascending=ascending)

    def content(self, file: File, part: Part | None) -> Iterator[bytes]:
        """The bytes of a file, or of a part of it, piece by piece. Raises `NotFound`, or `Gone` if they are lost."""
        part = part or Part(0, file.bytes)
        try:
            return chunks_of(self.storage, file, part.start, part.end)
        except ContentDamaged as damage:
            self.get(file.project, file.id)  # it may have been deleted a moment ago
            raise gone("file", file.id, damage, "file_id") from damage

    def delete(self, project: str, file_id: str) -> None:
        """Hide the file now. Housekeeping deletes its bytes once no active job needs them."""
        with self.database.write() as session:
            if not repository.mark_deleted(session, project, file_id):
                raise no_such("File object", file_id, code="file")


def _checked(form: UploadForm) -> _Fields:
    """The checked fields of `form`. Raises `ServiceError` if the form is not valid."""
    fields = form.fields
    expiry = {
        name.removeprefix("expires_after[").removesuffix("]"): fields.pop(name)
        for name in list(fields)
        if name.startswith("expires_after[") and name.endswith("]")
    }
    form.require("file", "purpose", optional=("mapping",))
    if fields["purpose"] not in get_args(UploadPurpose):
        raise ServiceError(
            f"Invalid value for 'purpose': '{fields['purpose'][:64]}'. It is one of "
            f"{', '.join(get_args(UploadPurpose))}; training takes 'fine-tune'.",
            param="purpose",
            code="invalid_value",
        )
    if form.size == 0:
        raise ServiceError("The file is empty.", param="file", code="empty_file")
    seconds = mapping = None
    if expiry:
        with _refusing("expires_after"):
            seconds = ExpiresAfter.model_validate(expiry, strict=False).seconds
    if "mapping" in fields:
        with _refusing("mapping"):
            mapping = Mapping.model_validate_json(fields["mapping"]).model_dump(mode="json")
    return _Fields(seconds, mapping)


@contextmanager
def _refusing(field: str) -> Iterator[None]:
    """Turn pydantic's first error in `field` into a `ServiceError`."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            raise ServiceError(f"'{field}' is not valid JSON.", param=field, code="invalid_json") from error
        message, param, code = describe_validation_error({**first, "loc": ("body", field, *first["loc"])})
        raise ServiceError(message, param=param or field, code=code) from error

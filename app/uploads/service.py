"""Operations on uploads."""

import asyncio
import hashlib
from collections.abc import AsyncIterator

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app.database import Database, database_now, new_id
from app.errors import Conflict, ServiceError, no_such
from app.files import repository as files
from app.files.multipart import UploadForm
from app.files.schemas import FileObject
from app.files.tables import File
from app.idempotency.service import RequestIdentity
from app.projects.service import require_room
from app.storage import Storage
from app.uploads import repository
from app.uploads.schemas import PartObject, UploadCompletion, UploadObject, UploadSpec
from app.uploads.tables import Upload, UploadPart

UPLOAD_SECONDS = 3600
"""Time to send all parts and complete an upload."""
MAX_PART_BYTES = 64 * 1024**2


class Uploads:
    """Create uploads, receive their parts, and join the parts into files."""

    def __init__(self, database: Database, storage: Storage) -> None:
        self.database, self.storage = database, storage

    def create(self, project: str, spec: UploadSpec, identity: RequestIdentity) -> UploadObject:
        content = spec.model_dump(mode="json")
        with self.database.write() as session:
            earlier = identity.earlier(session, "uploads.create", content)
            upload = None if earlier is None else repository.get(session, project, earlier)
            if upload is None:
                require_room(session, project, spec.bytes)
                upload = Upload(
                    id=new_id("upload"),
                    project=project,
                    created_at=database_now(),
                    expires_at=database_now() + UPLOAD_SECONDS,
                    filename=spec.filename,
                    purpose=spec.purpose,
                    bytes=spec.bytes,
                    status="pending",
                    mapping=None if spec.mapping is None else spec.mapping.model_dump(mode="json"),
                    expires_after=None if spec.expires_after is None else spec.expires_after.seconds,
                )
                session.add(upload)
                session.flush()
                session.refresh(upload)
                identity.record(session, "uploads.create", content, upload.id)
        return UploadObject.of(upload)

    async def add_part(self, project: str, upload_id: str, form: UploadForm, identity: RequestIdentity) -> PartObject:
        """Stream a part to the object store, then write its row. If anything fails, neither stays."""
        part_id, digest = new_id("part"), hashlib.sha256()
        size = form.max_bytes if form.announced is None else form.announced
        key = await run_in_threadpool(self._begin_part, project, upload_id, part_id, size)
        try:
            async with self.storage.object_written(key, form.file_chunks(digest.update)):
                form.require("data")
                if form.size == 0:
                    raise ServiceError("The part is empty.", param="data", code="empty_part")
                part = await run_in_threadpool(
                    self._end_part, project, upload_id, part_id, form.size, digest.hexdigest(), identity
                )
                if part.id != part_id:  # an earlier sending made the part
                    await run_in_threadpool(self.storage.delete, key)
        except SQLAlchemyError:
            raise  # the part may be there
        except BaseException:
            await asyncio.shield(run_in_threadpool(self._forget_part, part_id))
            raise
        return PartObject.of(part)

    def _begin_part(self, project: str, upload_id: str, part_id: str, size: int) -> str:
        """Write the row of a part of about `size` bytes, before they come. Returns the key of its object.

        The parts that are on their way together have room in what the upload has reserved.
        """
        with self.database.write() as session:
            upload = self._taking_parts(session, project, upload_id)
            size = min(size, upload.bytes)
            if repository.received(session, upload_id, coming=True) + size > 2 * upload.bytes + MAX_PART_BYTES:
                raise _too_large(upload)
            part = UploadPart(id=part_id, upload_id=upload_id, created_at=database_now(), bytes=size, stored=False)
            session.add(part)
            return f"{upload.prefix}/{part_id}"

    def _taking_parts(self, session: Session, project: str, upload_id: str) -> Upload:
        """An upload that is pending, locked."""
        upload = repository.get(session, project, upload_id, lock=True)
        if upload is None or upload.status != "pending":
            raise _ended(upload_id, upload)
        return upload

    def _forget_part(self, part_id: str) -> None:
        with self.database.write() as session:
            repository.forget_part(session, part_id)

    def _end_part(
        self, project: str, upload_id: str, part_id: str, size: int, digest: str, identity: RequestIdentity
    ) -> UploadPart:
        with self.database.write() as session:
            content = {"upload": upload_id, "sha256": digest}
            # Only an idempotency key tells that a part came before, because two parts may have the same bytes. A spare
            # part does no harm.
            earlier = identity.earlier(session, "uploads.parts.create", content) if identity.idempotency_key else None
            existing = None if earlier is None else repository.get_part(session, earlier)
            if existing is not None:
                repository.forget_part(session, part_id)
                return existing
            upload = self._taking_parts(session, project, upload_id)
            part = repository.get_part(session, part_id)
            if part is None:
                raise _ended(upload_id, upload)
            part.bytes, part.stored = size, True
            session.flush()
            # A part may have come twice. The request that completes the upload names the parts of the file.
            if size > upload.bytes or repository.received(session, upload_id) > 2 * upload.bytes:
                raise _too_large(upload)
            identity.record(session, "uploads.parts.create", content, part_id)
        return part

    async def complete(self, project: str, upload_id: str, completion: UploadCompletion) -> UploadObject:
        """Join the parts into a file. A completed upload is returned as it is."""
        upload = await run_in_threadpool(self._completable, project, upload_id, completion)
        if upload.status == "pending":
            # Each completion has its own file id. If two run at once, one wins and the other deletes what it wrote.
            file = File(id=new_id("file"), project=project)
            try:
                await self._join(upload, completion, file)
                upload = await run_in_threadpool(self._complete, upload, file)
            except FileNotFoundError:  # cancelled, expired or completed meanwhile
                upload = await run_in_threadpool(self._completable, project, upload_id, completion)
                await asyncio.shield(run_in_threadpool(self.storage.delete, file.key))
            except BaseException:
                await asyncio.shield(run_in_threadpool(self._discard, upload, file))
                raise
        return await run_in_threadpool(self._completed, project, upload)

    def _completable(self, project: str, upload_id: str, completion: UploadCompletion) -> Upload:
        """The upload: either completed, or pending with the parts that `completion` names."""
        with self.database.read() as session:
            upload = repository.get(session, project, upload_id)
            if upload is not None and upload.status == "completed":
                return upload
            if upload is None or upload.status != "pending":
                raise _ended(upload_id, upload)
            parts = repository.parts(session, upload_id, completion.part_ids)
        for part_id, part in zip(completion.part_ids, parts, strict=True):
            if part is None:
                message = f"{part_id[:64]!r} is not a part of {upload_id}."
                raise ServiceError(message, param="part_ids", code="part_not_found")
        if len(set(completion.part_ids)) < len(completion.part_ids):
            raise ServiceError("A part is named twice.", param="part_ids", code="invalid_value")
        size = sum(part.bytes for part in parts if part is not None)
        if size != upload.bytes:
            message = f"The parts have {size} bytes; the upload was created for {upload.bytes}."
            raise ServiceError(message, param="part_ids", code="upload_size_mismatch")
        return upload

    async def _join(self, upload: Upload, completion: UploadCompletion, file: File) -> None:
        """Write the parts as the object of `file`, and check their MD5."""
        sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)

        async def chunks() -> AsyncIterator[bytes]:
            for part_id in completion.part_ids:
                async for chunk in self.storage.stream(f"{upload.prefix}/{part_id}"):
                    sha256.update(chunk)
                    md5.update(chunk)
                    yield chunk

        await self.storage.put_stream(file.key, chunks())
        if completion.md5 is not None and md5.hexdigest() != completion.md5.lower():
            message = f"The md5 of the parts in this order is {md5.hexdigest()}, not {completion.md5}."
            raise ServiceError(message, param="md5", code="checksum_mismatch")
        file.filename, file.purpose = upload.filename, upload.purpose
        file.bytes, file.sha256, file.mapping = upload.bytes, sha256.hexdigest(), upload.mapping

    def _complete(self, upload: Upload, file: File) -> Upload:
        """Make `file` visible, unless the upload ended meanwhile. Returns the upload as it is now."""
        with self.database.write() as session:
            won = repository.end(session, upload.id, "completed", file.id)
            if won:
                file.created_at = database_now()
                if upload.expires_after is not None:
                    file.expires_at = database_now() + upload.expires_after
                session.add(file)
        if won:
            self.tidy(upload)
        else:
            self.storage.delete(file.key)
        with self.database.read() as session:
            current = repository.get(session, upload.project, upload.id)
        if current is None or current.status != "completed":
            raise _ended(upload.id, current)
        return current

    def _discard(self, upload: Upload, file: File) -> None:
        """Delete the object of `file`, unless the row of `file` exists."""
        with self.database.read() as session:
            row = files.get(session, upload.project, file.id)
        if row is None:
            self.storage.delete(file.key)

    def tidy(self, upload: Upload) -> None:
        """Delete the parts of an ended upload: first their objects, then their rows."""
        self.storage.delete_folder(upload.prefix)
        with self.database.write() as session:
            repository.forget_parts(session, upload.id)

    def _completed(self, project: str, upload: Upload) -> UploadObject:
        with self.database.read() as session:
            file = files.get(session, project, upload.file_id or "")
        return UploadObject.of(upload, None if file is None else FileObject.of(file))

    def cancel(self, project: str, upload_id: str) -> UploadObject:
        """Cancel an upload: it takes no more parts. A cancelled upload is returned as it is."""
        with self.database.write() as session:
            upload = repository.get(session, project, upload_id, lock=True)
            if upload is None or upload.status in ("completed", "expired"):
                raise _ended(upload_id, upload)
            upload.status = "cancelled"
        self.tidy(upload)
        return UploadObject.of(upload)


def _too_large(upload: Upload) -> ServiceError:
    message = f"The parts have more than the {upload.bytes} bytes that the upload was created with."
    return ServiceError(message, param="data", code="upload_too_large")


def _ended(upload_id: str, upload: Upload | None) -> ServiceError:
    """The error for an upload that does not exist or is not pending."""
    if upload is None:
        return no_such("Upload object", upload_id, code="upload", param="upload_id")
    return Conflict(f"{upload_id} is {upload.status}; create a new upload.", param="upload_id", code="upload_ended")

"""What can be done with files."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator

from starlette.concurrency import run_in_threadpool

from app.database import Database, database_now, new_id
from app.errors import NotFound, ServiceError
from app.files import repository
from app.files.multipart import UploadForm
from app.files.tables import File
from app.storage import Storage

MAX_BYTES = 8 * 1024**3


def not_found(file_id: str, param: str = "id") -> NotFound:
    return NotFound(f"No such File object: {file_id}", param=param, code="file_not_found")


class Files:
    """Create, find, read and delete files."""

    def __init__(self, database: Database, storage: Storage) -> None:
        self.database, self.storage = database, storage

    async def upload(self, project: str, form: UploadForm) -> File:
        """Stream an upload to the object store, then make its row; where anything fails, neither stays."""
        file_id = new_id("file")
        digest = hashlib.sha256()

        async def hashed() -> AsyncIterator[bytes]:
            async for chunk in form.file_chunks():
                digest.update(chunk)
                yield chunk

        file = File(id=file_id, project=project)
        failure: list[BaseException] = []

        async def kept() -> AsyncIterator[bytes]:
            # The store wraps what its source raises in an error of its own; the cause is what the user must see.
            try:
                async for chunk in hashed():
                    yield chunk
            except BaseException as error:
                failure.append(error)
                raise

        try:
            try:
                await self.storage.put_stream(file.key, kept())
            except Exception as error:
                raise failure[0] if failure else error from None
            self._check_form(form)
            file.filename, file.purpose = (form.filename or "upload")[:512], form.fields["purpose"]
            file.bytes, file.sha256, file.created_at = form.size, digest.hexdigest(), database_now()
            return await run_in_threadpool(self._insert, file)
        except BaseException:
            # Shielded, because a client that hangs up cancels this task: the object must go all the same.
            await asyncio.shield(run_in_threadpool(self.storage.delete, file.key))
            raise

    def _insert(self, file: File) -> File:
        with self.database.write() as session:
            session.add(file)
            session.flush()
            session.refresh(file)
        return file

    @staticmethod
    def _check_form(form: UploadForm) -> None:
        for required in ("file", "purpose"):
            if required not in form.fields and not (required == "file" and form.filename is not None):
                raise ServiceError(
                    f"Missing required parameter: '{required}'.",
                    param=required,
                    code="missing_required_parameter",
                )
        for name in form.fields:
            if name.startswith("expires_after"):
                raise ServiceError(
                    "'expires_after' is part of the contract but not available yet.",
                    param="expires_after",
                    code="unsupported_parameter",
                )
            if name != "purpose":
                raise ServiceError(f"Unknown parameter: '{name}'.", param=name, code="unknown_parameter")
        if form.fields["purpose"] != "fine-tune":
            raise ServiceError(
                f"Invalid value for 'purpose': '{form.fields['purpose'][:64]}'. "
                "This service takes files with the purpose 'fine-tune'.",
                param="purpose",
                code="invalid_value",
            )
        if form.size == 0:
            raise ServiceError("The file is empty.", param="file", code="empty_file")

    def get(self, project: str, file_id: str) -> File:
        with self.database.read() as session:
            file = repository.get(session, project, file_id)
        if file is None:
            raise not_found(file_id)
        return file

    def page(self, project: str, *, purpose: str | None, after: str | None, limit: int, ascending: bool) -> list[File]:
        """Up to `limit` + 1 files."""
        with self.database.read() as session:
            mark = None
            if after is not None and (mark := repository.get(session, project, after)) is None:
                raise not_found(after, "after")
            return repository.page(session, project, purpose=purpose, after=mark, limit=limit, ascending=ascending)

    def content(self, project: str, file_id: str) -> tuple[File, Iterator[bytes]]:
        file = self.get(project, file_id)
        try:
            return file, self.storage.chunks(file.key)
        except FileNotFoundError:  # deleted this moment
            raise not_found(file_id) from None

    def delete(self, project: str, file_id: str) -> None:
        """Hide the file now. Housekeeping removes its bytes once no active job needs them."""
        with self.database.write() as session:
            if not repository.mark_deleted(session, project, file_id):
                raise not_found(file_id)

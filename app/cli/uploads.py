"""The files that a command uploads for a request: each once, and none for a request that is refused."""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Annotated, Self

import typer

from app.cli.client import Client, ClientError, idempotency
from app.spec.json_types import JsonObject

PURPOSES = {
    "training_file": "fine-tune",
    "more_training_files": "fine-tune",
    "validation_file": "fine-tune",
    "data": "evals",
    "file": "evals",
}
"""The fields of jobs and evaluations that name a file, and the purpose with which it is uploaded."""
Upload = Callable[[Path, str], str]
"""Uploads the file at a path for a purpose. Returns the file's id."""
IdempotencyKey = Annotated[
    str,
    typer.Option(
        "--idempotency-key",
        help="Commands with the same key, files and body start one job, however often they run within a day.",
    ),
]


class Uploads:
    """The files of one request. Use it as a context: if the request in it is refused, the new files are deleted.

    A file that the service has already, by its content, is not uploaded again.
    """

    def __init__(self, client: Client, idempotency_key: str = "") -> None:
        self._client, self._key = client, idempotency_key
        self._new: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        # After a failure of the service, the request may have been accepted. The same idempotency key with another body
        # means that another command uses the files.
        if not isinstance(error, ClientError) or error.status is None or error.status >= 500:
            return
        if error.code != "idempotency_key_reused":
            self.discard()

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the request that uses the files."""
        return idempotency(self._key)

    def add(self, path: Path, purpose: str) -> str:
        """The id of the file at `path`, which is uploaded for `purpose` unless the service has it."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        known = self._find(digest, purpose)
        if known is not None:
            return known
        key = ""
        if self._key:  # one key for each file, so that two commands at the same time make one file
            key = hashlib.sha256(f"{self._key} {purpose} {digest} {path.name}".encode()).hexdigest()
        file_id = str(self._client.upload(path, {"purpose": purpose}, key)["id"])
        self._new.append(file_id)
        return file_id

    def _find(self, digest: str, purpose: str) -> str | None:
        """The oldest file with this content that stays and that is read without a mapping."""
        params: dict[str, str | int] = {"sha256": digest, "purpose": purpose, "order": "asc", "limit": 100}
        try:
            files = self._client.request("GET", "/files", params=params)["data"]
        except ClientError as error:
            if error.code == "unknown_parameter":  # a service of an earlier version cannot look
                return None
            raise
        return next((file["id"] for file in files if file["mapping"] is None and file["expires_at"] is None), None)

    def discard(self) -> None:
        """Delete the files that this command has uploaded."""
        for file_id in self._new:
            with suppress(ClientError):
                self._client.request("DELETE", f"/files/{file_id}")
        self._new = []


def upload_files(upload: Upload, body: JsonObject) -> None:
    """Upload the files that a job or an evaluation names by path, and replace each path by the id of the upload."""
    for field, value in body.items():
        if field == "metadata":
            continue
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                upload_files(upload, part)
        if field in PURPOSES:
            body[field] = _uploaded(upload, value, PURPOSES[field])


def _uploaded(upload: Upload, name: object, purpose: str) -> object:
    """The id of the file `name`, an id or a path; for a list, those of its files."""
    if isinstance(name, list):
        return [_uploaded(upload, each, purpose) for each in name]
    return upload(Path(name), purpose) if isinstance(name, str) and Path(name).is_file() else name

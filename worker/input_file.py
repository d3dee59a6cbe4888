"""Put an input file of a job into a work folder."""

from pathlib import Path

from app.files.tables import File
from app.storage import Storage
from app.stored_content import ContentDamaged, fetch_file


class InputLost(Exception):
    """An input file of a job was deleted, or the object store has lost its content. The message says which."""


def fetch_input(storage: Storage, file: File | None, file_id: str, path: Path) -> None:
    """Copy the content of an input file to `path`. `file` is the row of `file_id`, or None. Raises `InputLost`."""
    if file is None:
        raise InputLost(f"The file {file_id} no longer exists.")
    try:
        fetch_file(storage, file, path)
    except ContentDamaged as damage:
        raise InputLost(f"The file {file_id} cannot be read: {damage}.") from damage

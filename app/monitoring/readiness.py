"""Whether the service can read and write its database and its object store at present."""

import threading
import time
from collections.abc import Callable

from app.database import Database
from app.encryption import SecretBox
from app.installation import database_installation, require_writes, store_installation
from app.migrate import is_current
from app.secret_rotation import WrongSecretKey, check_key
from app.storage import Storage

TRUST_SECONDS = 5.0
"""How long a write that has succeeded is taken as proof. Anyone may ask, so that asking must not cost much."""


class Readiness:
    """Finds out whether the database and the object store can be read and written."""

    def __init__(self, database: Database, storage: Storage, secret_box: SecretBox) -> None:
        self.database, self.storage, self.secret_box = database, storage, secret_box
        self._lock = threading.Lock()
        self._written_at: dict[str, float] = {}
        """When each part was last written to."""

    def problems(self) -> dict[str, str]:
        """The problems by part. `database` and `storage` cannot be used; `…_writes` can be read only."""
        problems = {}
        for part, find, write in (
            ("database", self._database_problem, lambda: require_writes(self.database)),
            ("storage", lambda: self._storage_problem("database" in problems), self.storage.require_writes),
        ):
            try:
                problem = find()
            except Exception as error:  # every error of a driver means: not ready
                problem = type(error).__name__
            if problem is not None:
                problems[part] = problem
            elif (failure := self._write_failure(part, write)) is not None:
                problems[f"{part}_writes"] = f"it can be read, and writing fails: {failure}"
        return problems

    def _write_failure(self, part: str, write: Callable[[], None]) -> str | None:
        """The error of a write; None if it succeeds or one has succeeded a moment ago."""
        with self._lock:  # many that ask at once share one write
            if time.monotonic() < self._written_at.get(part, -TRUST_SECONDS) + TRUST_SECONDS:
                return None
            try:
                write()
            except Exception as error:  # as above
                return type(error).__name__
            self._written_at[part] = time.monotonic()
            return None

    def _database_problem(self) -> str | None:
        if not is_current(self.database):
            return "the schema is not this version's; run 'dpo migrate'"
        try:
            check_key(self.database, self.secret_box)
        except WrongSecretKey as error:
            return error.message
        return None

    def _storage_problem(self, database_fails: bool) -> str | None:
        self.storage.require_reads()
        owner = store_installation(self.storage)
        if owner is None or database_fails or owner == database_installation(self.database):
            return None
        return (
            "the object store belongs to another installation than the database; "
            "if they do belong together, delete the object 'installation'"
        )

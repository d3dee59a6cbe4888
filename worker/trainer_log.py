"""Keep a copy of a trainer's log in the object store while the trainer runs."""

import threading
import time
from contextlib import suppress
from pathlib import Path

from app.storage import Storage


class LogCopy:
    """The copy of the log `path` under `key`. Nothing waits for it: an object store may hang for minutes."""

    def __init__(self, storage: Storage, key: str, path: Path) -> None:
        self.storage, self.key, self.path = storage, key, path
        self._upload: threading.Thread | None = None

    def renew(self) -> None:
        """Begin to upload the log, unless an upload is on its way."""
        if self._upload is None or not self._upload.is_alive():
            self._upload = threading.Thread(target=self._put, name="trainer log", daemon=True)
            self._upload.start()

    def finish(self, seconds: float) -> None:
        """Upload the log to its end, in at most `seconds`."""
        deadline = time.monotonic() + seconds
        if self._upload is not None:
            self._upload.join(seconds)
        self.renew()
        assert self._upload is not None
        self._upload.join(max(0.0, deadline - time.monotonic()))

    def _put(self) -> None:
        with suppress(Exception):  # a failed upload of the log must not stop a training
            self.storage.put_file(self.key, self.path)

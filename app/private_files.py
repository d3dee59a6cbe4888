"""Keep the files of the service to its own user: database, objects, models and messages, as well as the keys."""

import os
from contextlib import suppress
from pathlib import Path


def keep_private(home: Path) -> None:
    """From now on, this process and those that it starts make files that only their user can read.

    Existing files below `home` are out of reach too, because nobody else can enter it.
    """
    os.umask(0o077)
    home.mkdir(parents=True, exist_ok=True)
    with suppress(PermissionError):  # it belongs to somebody else, who decides
        home.chmod(0o700)

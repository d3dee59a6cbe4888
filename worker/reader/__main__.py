"""`python -m worker.reader FOLDER`: do the task in FOLDER's `task.json`, and print the result as a line of JSON.

Exit status: 0 if the task is done, 3 if the memory was not enough.
"""

import json
import os
import sys
from pathlib import Path

from worker.reader import NO_MEMORY

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
"""Environment variables that the libraries read when they are imported."""
NICENESS = 10
"""Requests and trainings go first: a report may take a little longer."""


def load() -> None:
    """Import all that a task needs."""
    os.environ.update(ENVIRONMENT)
    # Keeps transformers from loading torch. Tokenizers do not need it, and it takes most of the time.
    sys.modules["torch"] = None  # type: ignore[assignment]
    import worker.reader.tasks  # noqa: F401


def run(folder: Path) -> int:
    """Do the task in `folder`. Returns the exit status."""
    load()
    os.nice(NICENESS)
    from worker.reader.tasks import do

    try:
        result = do(folder, json.loads((folder / "task.json").read_text()))
    except MemoryError:
        return NO_MEMORY
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1])))

"""`python -m worker gpu|cpu`: run one worker process of the given lane."""

import sys

from app.broker import Lane
from app.cli.processes import end_with_parent
from worker.celery_app import run

if __name__ == "__main__":
    end_with_parent()
    run(Lane(sys.argv[1]))

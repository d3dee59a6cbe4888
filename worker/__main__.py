"""`python -m worker gpu|cpu`: one worker of one lane."""

import sys

from app.broker import Lane
from worker.celery_app import run

if __name__ == "__main__":
    run(Lane(sys.argv[1]))

"""`python -m worker.trainer WORKDIR`: a folder in, events on standard output, a folder left.

Exit status: 0 done; 1 failed, and an event says why: `failed`, or `broken` where it was the machine and not the job;
75 stopped after SIGTERM, to be resumed from the last checkpoint. Answers to what it asks its runner for come on its
standard input, a line of JSON each; the process ends by itself, at once, when that input does: a trainer whose runner
was killed must not keep the GPU.
"""

import json
import logging
import os
import queue
import signal
import sys
import threading
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

STOPPED = 75
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""What the libraries below need to know before they are imported."""


def run(folder: Path) -> int:
    """Train or evaluate in `folder`; returns the exit status."""
    # Libraries print to standard output; what they say goes to the log, and the events get the real one.
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answers: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(answers,), daemon=True).start()
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the runner decides
    os.environ.update(ENVIRONMENT)

    # Imported here, so that the watch stands before seconds are spent on torch.
    from safetensors import SafetensorError

    from app.spec.datasets.errors import DatasetError
    from worker.trainer.cache import Cache
    from worker.trainer.errors import Stopped, UserError
    from worker.trainer.evaluation import evaluate
    from worker.trainer.evaluation.run import EvaluationRun
    from worker.trainer.events import Broken, Events, Failed
    from worker.trainer.loop import train
    from worker.trainer.run import TrainingRun

    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")
    began = {"event": "trainer began", "level": "info", "timestamp": datetime.now(UTC).isoformat(), **_named(folder)}
    print(json.dumps(began), file=sys.stderr, flush=True)
    events = Events(stream)
    evaluates = (folder / "evaluation.json").exists()
    cache = Cache(folder / "cache", events, answers)
    try:
        if evaluates:
            evaluate(EvaluationRun.of(folder, events, stopping, cache))
        else:
            train(TrainingRun.of(folder, events, stopping, cache))
    except Stopped:
        return STOPPED
    except UserError as error:
        events.emit(Failed(error.code, error.message, error.param))
        return 1
    except DatasetError as error:
        events.emit(Failed("invalid_file", str(error), "data" if evaluates else "training_file"))
        return 1
    except (OSError, SafetensorError) as error:  # the disk, not the job: another attempt may do better
        traceback.print_exc()
        events.emit(Broken(f"{type(error).__name__}: {error}"[:500]))
        return 1
    except Exception as error:
        traceback.print_exc()
        message = f"The trainer failed: {type(error).__name__}: {error}. The job's log has the details."
        events.emit(Failed("trainer_error", message[:2000], None))
        return 1
    return 0


def _named(folder: Path) -> dict[str, Any]:
    """What the log calls this work: the job, the attempt and the request that made the job."""
    named: dict[str, Any] = json.loads((folder / "run.json").read_text()).get("log", {})
    return named


def _listen(answers: "queue.Queue[str]") -> None:
    with os.fdopen(0) as stream:
        for line in stream:
            answers.put(line)
        os._exit(STOPPED)


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1])))

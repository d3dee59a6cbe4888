"""`python -m worker.trainer [WORKDIR]`: a folder in, events on standard output, a folder left.

Without WORKDIR it gets ready and waits for the folder as the first line of its standard input: the seconds that torch
takes to load are over when a job comes. It touches no GPU before that. Its log is then `trainer.log` in the folder.

Exit status: 0 done; 1 failed, and a `failed` event says why; 75 stopped after SIGTERM, to be resumed from the
last checkpoint. Answers to what it asks its runner for come on its standard input, a line of JSON each; the
process ends by itself, at once, when that input does: a trainer whose runner was killed must not keep the GPU.
"""

import os
import queue
import signal
import sys
import threading
import traceback
from pathlib import Path

STOPPED = 75


def main() -> int:
    # Libraries print to standard output; what they say goes to the log, and the events get the real one.
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answers: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(answers,), daemon=True).start()
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the runner decides
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_PROGRESS_BARS="1")

    # Imported here, so that the watch stands before seconds are spent on torch.
    from app.datasets.reader import DatasetError
    from worker.trainer.cache import Cache
    from worker.trainer.events import Events, UserError
    from worker.trainer.loop import Stopped, Trainer

    if len(sys.argv) > 1:
        folder = Path(sys.argv[1])
    else:
        folder = Path(answers.get().rstrip("\n"))
        log = os.open(folder / "trainer.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 2)
        os.dup2(2, 1)
        os.chdir(folder)
    events = Events(stream)
    try:
        Trainer(folder, events, stopping, Cache(folder / "cache", events, answers)).run()
    except Stopped:
        return STOPPED
    except UserError as error:
        events.emit("failed", code=error.code, message=error.message, param=error.param)
        return 1
    except DatasetError as error:
        events.emit("failed", code="invalid_file", message=str(error), param="training_file")
        return 1
    except Exception as error:
        traceback.print_exc()
        message = f"The trainer failed: {type(error).__name__}: {error}. The job's log has the details."
        events.emit("failed", code="trainer_error", message=message[:2000], param=None)
        return 1
    return 0


def _listen(answers: "queue.Queue[str]") -> None:
    with os.fdopen(0) as stream:
        for line in stream:
            answers.put(line)
        os._exit(STOPPED)


if __name__ == "__main__":
    sys.exit(main())

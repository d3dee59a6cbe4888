"""`python -m worker.trainer WORKDIR`: train or evaluate in a work folder, with events on standard output.

Exit status:

- 0: done.
- 1: failed. An event says why: `failed`, or `broken` or `device_failed` if the machine is at fault and not the job.
- 75: stopped after SIGTERM. The run can resume from its last checkpoint.

The runner answers the trainer's requests on standard input, one line of JSON each. The process ends at once when
standard input closes: a trainer whose runner was killed must not keep the GPU.
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
from typing import IO
from unittest.mock import patch

from app.spec.json_types import JsonObject

STOPPED = 75
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""Environment variables that the libraries read when they are imported."""


def load_bitsandbytes() -> None:
    """Import torch and bitsandbytes, without torch's compiler, and log the warnings of all libraries.

    To be called before other modules import them. While it is imported, bitsandbytes passes some functions to
    `torch.compile`. That loads the compiler, which takes a fifth of a trainer's start and 50 MB. If it fails,
    bitsandbytes takes the functions as they are. No training calls them, because bitsandbytes has kernels of its own
    for CPUs and GPUs.
    """
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on some CPUs it advises to install a kernel of a hub
    import torch

    with patch.object(torch, "compile", side_effect=RuntimeError):
        import bitsandbytes  # noqa: F401


def load() -> None:
    """Import all that a training or an evaluation needs. The fork server does it before the first job."""
    os.environ.update(ENVIRONMENT)
    load_bitsandbytes()
    import worker.trainer.evaluation
    import worker.trainer.loop  # noqa: F401


def run(folder: Path) -> int:
    """Train or evaluate in `folder`. Returns the exit status."""
    # Libraries print to standard output. Their output goes to the log; only events go to the real standard output.
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answers: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(answers,), daemon=True).start()
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the runner decides
    os.environ.update(ENVIRONMENT)
    about: JsonObject = json.loads((folder / "run.json").read_text())
    if about.get("device") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that the worker does not use stays unused
    return _train_or_evaluate(folder, about, stream, stopping, answers)


def _train_or_evaluate(
    folder: Path, about: JsonObject, stream: IO[str], stopping: threading.Event, answers: "queue.Queue[str]"
) -> int:
    """Do the work in `folder` and write its events to `stream`. Returns the exit status.

    `about` is the content of `run.json`.
    """
    # Imported here because torch takes seconds: the watch on standard input has to run before.
    load_bitsandbytes()
    from safetensors import SafetensorError

    from app.spec.datasets.errors import DatasetError
    from worker.disk import is_disk_fault
    from worker.trainer.cache import Cache
    from worker.trainer.device_check import is_device_fault, why_unusable
    from worker.trainer.errors import Stopped, UserError
    from worker.trainer.evaluation import evaluate
    from worker.trainer.evaluation.run import EvaluationRun
    from worker.trainer.events import Broken, DeviceFailed, Events, Failed
    from worker.trainer.loop import train
    from worker.trainer.room import NoRoom
    from worker.trainer.run import TrainingRun, require_placed

    entry = {
        "event": "trainer began",
        "level": "info",
        "timestamp": datetime.now(UTC).isoformat(),
        **about.get("log", {}),
    }
    print(json.dumps(entry), file=sys.stderr, flush=True)
    events = Events(stream)
    # Without this check, a machine that has lost its GPU would train on the CPU.
    if (reason := why_unusable(about.get("device", "cpu"))) is not None:
        events.emit(DeviceFailed(reason))
        return 1
    is_evaluation = (folder / "evaluation.json").exists()
    cache = Cache(folder / "cache", events, answers)
    try:
        require_placed(folder, about)
        if is_evaluation:
            evaluate(EvaluationRun.of(folder, events, stopping, cache))
        else:
            train(TrainingRun.of(folder, events, stopping, cache))
    except Stopped:
        return STOPPED
    except UserError as error:
        events.emit(Failed(error.code, error.message, error.param))
        return 1
    except DatasetError as error:
        events.emit(Failed("invalid_file", str(error), "data" if is_evaluation else "training_file"))
        return 1
    except NoRoom as error:
        events.emit(Broken(str(error)))
        return 1
    except (OSError, SafetensorError) as error:  # the disk failed, not the job: another attempt may succeed
        traceback.print_exc()
        events.emit(Broken(f"{type(error).__name__}: {error}"[:500], by_disk=is_disk_fault(error)))
        return 1
    except Exception as error:
        traceback.print_exc()
        if is_device_fault(error):
            events.emit(DeviceFailed(f"{type(error).__name__}: {error}".splitlines()[0][:500]))
            return 1
        message = f"The trainer failed: {type(error).__name__}: {error}. The job's log has the details."
        events.emit(Failed("trainer_error", message[:2000], None))
        return 1
    return 0


def _listen(answers: "queue.Queue[str]") -> None:
    """Queue the runner's answers. End the process when standard input closes."""
    with os.fdopen(0) as stream:
        for line in stream:
            answers.put(line)
        os._exit(STOPPED)


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1])))

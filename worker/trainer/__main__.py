"""`python -m worker.trainer WORKDIR`: train, evaluate or label in a work folder, with events on standard output.

Exit status:

- 0: done.
- 1: failed. An event says why: `failed`, or `broken` or `device_failed` if the machine is at fault and not the job.
- 75: stopped after SIGTERM. The run can resume from its last checkpoint.

The runner answers the trainer's requests on standard input, one line of JSON each. The process ends at once when
standard input closes: a trainer whose runner was killed must not keep the GPU.

`run.json` in the work folder says on which devices: `device` (cpu or cuda), the number of `ranks` on this machine, the
GPU of each in `visible`, and for CPUs the number of `threads` of a rank. Over several machines, `machine` has this
one's place among them.
"""

import json
import logging
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING
from unittest.mock import patch

from app.spec.json_types import JsonObject
from worker.trainer.errors import STOPPED, PeerLost, Stopped, UserError

if TYPE_CHECKING:
    from worker.trainer.cache import Cache
    from worker.trainer.events import Event, Events
    from worker.trainer.ranks import Ranks

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
    """Import all that a training, an evaluation or a labelling needs. The fork server does it before the first job."""
    os.environ.update(ENVIRONMENT)
    load_bitsandbytes()
    import worker.trainer.evaluation
    import worker.trainer.labelling
    import worker.trainer.loop  # noqa: F401


def run(folder: Path) -> int:
    """Do the work of a job in `folder`. Returns the exit status."""
    # Libraries print to standard output. Their output goes to the log; only events go to the real standard output.
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the runner decides
    os.environ.update(ENVIRONMENT)
    about: JsonObject = json.loads((folder / "run.json").read_text())
    if about.get("device") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that the worker does not use stays unused
    size = about.get("ranks", 1)
    if size == 1 and "machine" not in about:
        return _run_rank(folder, about, stream, stopping, 0, 0)
    if about.get("device") == "cpu":
        load()  # once, for all ranks. Where there is a GPU it would open the driver, which no fork can use
    from worker.trainer import rank_processes
    from worker.trainer.events import Events

    machine = rank_processes.Machine(**about["machine"]) if "machine" in about else None
    if machine is not None and machine.number > 0:  # no rank of this machine reads standard input
        threading.Thread(target=_listen, args=(queue.Queue(),), daemon=True).start()
    run_rank = partial(_run_rank, folder, about, stream, stopping)
    status = rank_processes.launch(folder, size, run_rank, stopping, machine)
    failure = rank_processes.failure(folder, size)
    if failure is not None:
        Events(stream).emit(failure)
    return status


def _run_rank(
    folder: Path, about: JsonObject, stream: IO[str], stopping: threading.Event, rank: int, local_rank: int
) -> int:
    """Do the work of a rank in `folder`. The first one writes events to `stream`. Returns the exit status.

    `about` is the content of `run.json`. `local_rank` counts the ranks of this machine.
    """
    answers: queue.Queue[str] | None = None
    if rank == 0:
        answers = queue.Queue()
        threading.Thread(target=_listen, args=(answers,), daemon=True).start()
    if visible := about.get("visible"):  # one GPU for each rank
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[local_rank]
    # Imported here because torch takes seconds: the watch on standard input has to run before.
    load_bitsandbytes()
    import torch

    from worker.trainer.cache import Cache
    from worker.trainer.device_check import why_unusable
    from worker.trainer.events import DeviceFailed, Events
    from worker.trainer.hardware import compute_deterministically
    from worker.trainer.ranks import Ranks

    if threads := about.get("threads"):
        torch.set_num_threads(threads)
    compute_deterministically()
    device, alone = about.get("device", "cpu"), about.get("ranks", 1) == 1 and "machine" not in about
    entry = {
        "event": "trainer began",
        "level": "info",
        "timestamp": datetime.now(UTC).isoformat(),
        **({} if alone else {"rank": rank}),
        **about.get("log", {}),
    }
    print(json.dumps(entry), file=sys.stderr, flush=True)
    events = Events(stream if rank == 0 else Path(os.devnull).open("w"))  # noqa: SIM115 - until the end
    fail: Callable[[Event], None] = events.emit
    if not alone:
        from worker.trainer.distributed import DistributedRanks
        from worker.trainer.rank_processes import RankFolder

        fail = RankFolder.of(folder, local_rank).fail
    # Without this check, a machine that has lost its GPU would train on the CPU.
    if (reason := why_unusable(device)) is not None:
        fail(DeviceFailed(reason))
        return 1
    ranks = Ranks() if alone else DistributedRanks(device)
    return _do_work(folder, about, events, stopping, Cache(folder / "cache", events, answers), ranks, fail)


def _do_work(
    folder: Path,
    about: JsonObject,
    events: "Events",
    stopping: threading.Event,
    cache: "Cache",
    ranks: "Ranks",
    fail: "Callable[[Event], None]",
) -> int:
    """Do the work in `folder`. `fail` reports the event that ends a run that fails. Returns the exit status."""
    from safetensors import SafetensorError

    from app.spec.datasets.errors import DatasetError
    from worker.disk import is_disk_fault
    from worker.trainer.device_check import is_device_fault
    from worker.trainer.distributed import lost_peers
    from worker.trainer.evaluation import evaluate
    from worker.trainer.evaluation.run import EvaluationRun
    from worker.trainer.events import Broken, DeviceFailed, Failed
    from worker.trainer.labelling import make_labels
    from worker.trainer.labelling.run import LabellingRun
    from worker.trainer.loop import train
    from worker.trainer.room import NoRoom
    from worker.trainer.run import TrainingRun, require_placed

    is_training = (folder / "spec.json").exists()
    try:
        require_placed(folder, about)
        with lost_peers():
            if is_training:
                train(TrainingRun.of(folder, events, stopping, cache, ranks))
            elif (folder / "labelling.json").exists():
                make_labels(LabellingRun.of(folder, events, stopping, cache, ranks))
            else:
                evaluate(EvaluationRun.of(folder, events, stopping, cache, ranks))
            ranks.close()
    except Stopped:
        return STOPPED
    except PeerLost as error:
        print(f"rank {ranks.rank} lost another rank: {error}", file=sys.stderr, flush=True)
        return 1
    except UserError as error:
        fail(Failed(error.code, error.message, error.param))
        return 1
    except DatasetError as error:
        fail(Failed("invalid_file", str(error), "training_file" if is_training else "data"))
        return 1
    except NoRoom as error:
        fail(Broken(str(error)))
        return 1
    except (OSError, SafetensorError) as error:  # the disk failed, not the job: another attempt may succeed
        traceback.print_exc()
        fail(Broken(f"{type(error).__name__}: {error}"[:500], is_lost=not is_disk_fault(error)))
        return 1
    except Exception as error:
        traceback.print_exc()
        if is_device_fault(error):
            fail(DeviceFailed(f"{type(error).__name__}: {error}".splitlines()[0][:500]))
            return 1
        message = f"The trainer failed: {type(error).__name__}: {error}. The job's log has the details."
        fail(Failed("trainer_error", message[:2000], None))
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

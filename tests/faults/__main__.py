"""`python -m tests.faults`: inject faults into running trainings, many times, and report the outcome.

    python -m tests.faults --times 20              every fault 20 times, each into a training of its own
    python -m tests.faults --only kill_runner      one of them
    python -m tests.faults --parallel 3            in that many clusters at once
    python -m tests.faults --keep FILE             keep the strikes in FILE; those of earlier runs count

Exit status: 0 if nothing was lost, nothing was done twice, and all bytes are those of an undisturbed run; else 1.
"""

import argparse
import json
import math
import multiprocessing
import random
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from tests.faults.faults import FAULTS
from tests.faults.report import table
from tests.faults.run import inject


def main() -> int:
    arguments = _arguments()
    runs = json.loads(arguments.keep.read_text()) if arguments.keep and arguments.keep.exists() else []
    strike_counts = Counter(
        strike["fault"] for run in runs for outcome in run["parts"] for strike in outcome["strikes"]
    )
    plan = [name for name in arguments.only or FAULTS for _ in range(arguments.times - strike_counts[name])]
    random.Random(arguments.seed).shuffle(plan)
    shares = [plan[number :: arguments.parallel] for number in range(arguments.parallel)]
    began = time.monotonic()
    # Spawned: a fork would share the proxies' event loops and the database's connections.
    with multiprocessing.get_context("spawn").Pool(arguments.parallel) as pool:
        outcomes = pool.starmap(
            inject, [(share, arguments.seed + index, arguments.minutes) for index, share in enumerate(shares)]
        )
    runs.append({"seconds": time.monotonic() - began, "parts": [asdict(outcome) for outcome in outcomes]})
    if arguments.keep is not None:
        arguments.keep.write_text(json.dumps(runs))
    print(table(runs))
    return 1 if any(outcome["problems"] for run in runs for outcome in run["parts"]) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--times", type=int, default=20, help="strikes of each fault")
    parser.add_argument("--only", nargs="+", choices=list(FAULTS), metavar="FAULT", help=", ".join(FAULTS))
    parser.add_argument("--parallel", type=int, default=2, help="number of clusters at once")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no training after this time")
    parser.add_argument("--seed", type=int, default=1, help="seed of the faults' order and moments")
    parser.add_argument("--keep", type=Path, help="file of the strikes of this run and of earlier ones")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

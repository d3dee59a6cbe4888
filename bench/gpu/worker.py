"""`python -m bench.gpu.worker [--dry]`: runs parts. Their names are the lines of standard input.

For each it prints lines of JSON to standard output: `{"figures": {…}, "ended": false}`, and one with `"ended": true`. A
part that raises ends with the figure `error`. Output of libraries goes to standard error.
"""

import json
import os
import sys
import traceback
import warnings

os.environ |= {
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}  # fmt: skip
warnings.filterwarnings("ignore")

from app.spec.json_types import JsonObject
from bench.gpu import shapes
from bench.gpu.parts import PARTS


def main() -> None:
    """Run the parts that standard input names."""
    shapes.dry = "--dry" in sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # also for libraries in C, and for processes that this one starts

    def send(figures: JsonObject, *, ended: bool = False) -> None:
        answers.write(json.dumps({"figures": figures, "ended": ended}) + "\n")
        answers.flush()

    for line in sys.stdin:
        try:
            for figures in PARTS[line.strip()].run():
                send(figures)
        except Exception as error:  # whatever it is, the other parts go on
            where = traceback.format_exc(limit=-3).strip().splitlines()
            send({"error": f"{type(error).__name__}: {error}"[:2000], "traceback": where}, ended=True)
        else:
            send({}, ended=True)


if __name__ == "__main__":
    main()

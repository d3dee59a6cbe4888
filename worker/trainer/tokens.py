"""`python -m worker.trainer.tokens FOLDER`: what a dataset is in tokens of a model. A folder in, a line of JSON out.

FOLDER holds `model/`, of which the tokenizer is read, and `tokens.json`, a list of what to count: `dataset`, a path;
`recipe` {need, max_length, loss_on, mapping, rendering, truncation}; `rows`, kept by the check; and maybe `sample`, how
many of them are looked at. The line holds a list of what was found.
"""

import json
import sys
from pathlib import Path


def main() -> int:
    # transformers would load torch, which takes most of the time of a small file, and no tokenizer needs it.
    sys.modules["torch"] = None  # type: ignore[assignment]
    from worker.trainer.counting import count_folder

    print(json.dumps(count_folder(Path(sys.argv[1]))))
    return 0


if __name__ == "__main__":
    sys.exit(main())

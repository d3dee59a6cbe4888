"""`python -m worker.trainer.tokens FOLDER`: count datasets in a model's tokens and print the counts as a line of JSON.

FOLDER holds `model` and `tokens.json`, a list of requests. `model` is a model's folder, or a file with its path. Only
the tokenizer is read. Fields of a request:

- `dataset`: the path of the file.
- `recipe`: {need, max_length, loss_on, mapping, rendering, truncation}.
- `rows`: the number of examples that the check kept.
- `sample` (optional): the most examples to count.

The line holds a list with one count, or one error, for each request.
"""

import json
import sys
from pathlib import Path


def main() -> int:
    """Count the datasets of the folder of the command line."""
    # Keeps transformers from loading torch. Tokenizers do not need it, and it takes most of the time of a small file.
    sys.modules["torch"] = None  # type: ignore[assignment]
    from worker.trainer.counting import count_folder

    print(json.dumps(count_folder(Path(sys.argv[1]))))
    return 0


if __name__ == "__main__":
    sys.exit(main())

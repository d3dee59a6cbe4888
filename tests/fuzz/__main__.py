"""`python -m tests.fuzz --minutes 60`: coverage-guided fuzzing of the dataset reader (atheris, libFuzzer).

Any bytes must give a report or a `DatasetError`. No other exception is allowed, no input may take two minutes, and the
memory stays below 1.5 GB. The fuzzer starts from its own rows of every format and from the files of DPO_SHARED. It
leaves its inputs in `--corpus`, and the next run continues from there. An input that breaks the reader is written beside
that folder, and becomes a test in `tests/unit/test_datasets.py`. Exit status: 0 if nothing was found.

atheris is in the extra `fuzz`: pip install --editable '.[worker,test,fuzz]'
"""

import argparse
import csv
import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_BYTES = 65536
ROWS: list[list[dict[str, object]]] = [
    [{"prompt": "q", "chosen": "a", "rejected": "b"}],
    [{"prompt": "q", "completion": "a", "label": True}],
    [{"prompt": "q", "responses": ["a", "b"], "scores": [1, 0.5]}],
    [{"prompt": "q", "responses": ["a", "b"], "ranks": [2, 1]}],
    [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1}]}],
    [{"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}],
    [{"instruction": "i", "input": "", "output": "o"}],
    [
        {
            "input": {"messages": [{"role": "user", "content": "q"}]},
            "preferred_output": [{"role": "assistant", "content": "a"}],
            "non_preferred_output": [{"role": "assistant", "content": "b"}],
        }
    ],
    [{"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": None}],
]


def main() -> int:
    arguments = _arguments()
    if arguments.child:
        return _fuzz(arguments.corpus)
    arguments.corpus.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(seeds()):
        (arguments.corpus / f"seed-{number}").write_bytes(content)
    command = [sys.executable, "-m", "tests.fuzz", "--child", "--corpus", str(arguments.corpus)]
    options = {
        "max_total_time": round(arguments.minutes * 60), "timeout": 120, "rss_limit_mb": 1500, "max_len": MAX_BYTES,
        "artifact_prefix": f"{arguments.corpus}-", "print_final_stats": 1,
    }  # fmt: skip
    flags = ["--", str(arguments.corpus), *(f"-{name}={value}" for name, value in options.items())]
    return subprocess.run(command + flags, check=False).returncode


def seeds() -> Iterator[bytes]:
    """Small files of every format and container."""
    import pyarrow
    from pyarrow import parquet

    for rows in ROWS:
        lines = "\n".join(json.dumps(row) for row in rows * 2).encode()
        yield lines
        yield gzip.compress(lines)
        yield json.dumps(rows).encode()
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        yield text.getvalue().encode()
        buffer = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
        yield buffer.getvalue()
    shared = Path(os.environ.get("DPO_SHARED", "../shared")) / "data"
    for path in sorted(path for path in shared.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            head = file.read(MAX_BYTES // 4)
        yield head
        if path.suffix == ".gz":
            yield gzip.GzipFile(fileobj=io.BytesIO(head)).read(4096)


def _fuzz(corpus: Path) -> int:
    import atheris

    with atheris.instrument_imports(include=["app.spec.datasets"]):
        from app.spec.datasets.check import check, survey
        from app.spec.datasets.errors import DatasetError
        from app.spec.datasets.example import Kind
        from app.spec.datasets.mapping import Mapping
    mapping = Mapping(prompt="Q: {prompt}", chosen="chosen", rejected="rejected")

    def read(content: bytes) -> None:
        json.dumps(survey(io.BytesIO(content), None).as_json(), allow_nan=False).encode()
        json.dumps(survey(io.BytesIO(content), mapping).as_json(), allow_nan=False).encode()
        for kind in Kind:
            try:
                check(io.BytesIO(content), kind, None)
            except DatasetError as error:
                assert error.line >= 1
                str(error).encode()

    atheris.Setup([sys.argv[0], *sys.argv[sys.argv.index("--") + 1 :]], read)
    atheris.Fuzz()
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--corpus", type=Path, default=Path(".fuzz/reader"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("libfuzzer", nargs="*", help="after --: libFuzzer's options, for the child")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

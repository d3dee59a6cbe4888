"""schemathesis tests every operation of the OpenAPI document on a real service."""

import subprocess
import sys
from pathlib import Path

from tests.helpers.preferences import pairs, write
from tests.helpers.service import running

EXAMPLES = 5
"""Random requests for each operation, in addition to those that cover its schema."""


def test_every_answer_matches_the_openapi_document_and_none_is_a_5xx(home: Path, tmp_path: Path) -> None:
    with running(home, {"DPO_RATE_LIMIT": "0"}) as service:
        with service.openai() as client:
            client.files.create(file=write(tmp_path / "train.jsonl", pairs(12, seed=1)), purpose="fine-tune")
        report = tmp_path / "report"
        schemathesis = subprocess.run(
            [
                str(Path(sys.executable).with_name("schemathesis")), "run", service.url.removesuffix("/v1") + "/openapi.json",
                "-H", f"Authorization: Bearer {service.key}", "--max-examples", str(EXAMPLES), "--seed", "1",
                "--checks", "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
                # A read-only service answers 503 to every write, as an operator asks it to.
                "--exclude-path-regex", "/stream$|/v1/operations$", "--phases", "examples,coverage,fuzzing", "--report", "ndjson",
                "--report-dir", str(report), "--no-color", "--request-timeout", "30",
            ],
            capture_output=True, text=True, timeout=560, cwd=tmp_path,
        )  # fmt: skip
        assert schemathesis.returncode == 0, schemathesis.stdout[-6000:] + schemathesis.stderr[-2000:]

"""The commands and programs of the documents, run page by page as they stand, against a service.

A page's blocks run in their order, in one shell and one folder. Nothing is set for them that the page does not set:
`Example.stand_ins` replaces names and addresses that a page can only give as examples.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.documents import PAGES, ROOT, Block, blocks
from tests.helpers.judge_server import running_judge
from tests.helpers.servers import CEILING
from tests.helpers.service import DPO, Running

PAIRS = [
    {"prompt": f"What is in house {number}?", "chosen": "the cat and the dog", "rejected": "the weather"}
    for number in range(24)
]
CLASSIFIER = {"terms": {"cat": [1.0, 2.0], "weather": [1.0, -2.0]}, "intercept": 0.0}
SMALL: dict[str, Any] = {"n_epochs": 1, "batch_size": 8}
JOB: dict[str, Any] = {
    "model": "demo-base",
    "training_file": "pairs.jsonl",
    "method": {"type": "dpo", "dpo": {"hyperparameters": SMALL}},
    "quantization": "none",
    "seed": 1,
}
"""The job that a page calls `job.json` or `spec.json` and does not show."""
REWARD_KL = {
    "name": "frontier", "type": "reward_kl", "data": "prompts.jsonl", "max_rows": 4,
    "sampling": {"max_tokens": 8}, "judge": {"type": "classifier", "classifier": {"file": "classifier.json"}},
}  # fmt: skip
"""The evaluation of a sweep that has a frontier."""


def write_files(folder: Path) -> None:
    """The data files that pages name as the reader's own."""
    rows = "".join(json.dumps(row) + "\n" for row in PAIRS)
    for name in ("pairs.jsonl", "held_out.jsonl", "preferences/train.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(rows)
    (folder / "prompts.jsonl").write_text(rows)
    (folder / "classifier.json").write_text(json.dumps(CLASSIFIER))
    (folder / "answers.csv").write_text("prompt,chosen,rejected\nWhere?,Here.,There.\nWhen?,Now.,Then.\n")
    header = "title,body,best_reply,other_reply"
    (folder / "reviews.csv").write_text(
        f"{header}\nA toy,It broke.,I am sorry.,Too bad.\nA cup,Nice.,Thank you.,Well.\n"
    )
    mapping = {"prompt": "Review of {title}:\n{body}\n\nReply:", "chosen": "best_reply", "rejected": "other_reply"}
    (folder / "mapping.json").write_text(json.dumps(mapping))
    for name in ("job.json", "spec.json"):
        (folder / name).write_text(json.dumps(JOB))


class Example:
    """A service, and an object of each kind that the documents name."""

    def __init__(self, service: Running, judge: str, folder: Path) -> None:
        self.service, self.folder = service, folder
        folder.mkdir()
        write_files(folder)
        swept = JOB | {"evaluations": [REWARD_KL]}
        sweep = self._dpo("sweeps", "create", "--spec", "-", "--grid", "beta=0.1", "--watch", body=swept)
        trained: str = sweep["jobs"][0]["id"]
        reward = {"loss": "reward_model"} | SMALL
        judged = self._dpo(
            "jobs", "create", "--spec", "-", "--watch",
            body=JOB | {"suffix": "judge", "method": {"type": "dpo", "dpo": {"hyperparameters": reward}}},
        )  # fmt: skip
        with service.http() as client:
            files = client.get("/files", params={"purpose": "fine-tune"}).json()["data"]
            checkpoints = client.get(f"/fine_tuning/jobs/{trained}/checkpoints").json()["data"]
            evaluation = client.get("/evaluations").json()["data"][0]["id"]
        model = service.job(trained)["fine_tuned_model"]
        pairs = next(file["id"] for file in files if file["filename"] == "pairs.jsonl")
        host = service.url.removesuffix("/v1")
        self.stand_ins = {
            r"http://127\.0\.0\.1:8000|https://dpo\.example\.com": host,
            r"localhost:8000": host.removeprefix("http://"),
            r"https://api\.(openai|example)\.com/v1": judge,
            r"ft:meta-llama/Llama-3\.1-8B:default:judge:\w{8}": judged["fine_tuned_model"],
            r"ft:meta-llama/Llama-3\.1-8B:default:support:\w{8}|ft:demo-base:default:\w*:x{8}": model,
            r"ft:…:ckpt-step-N": checkpoints[0]["fine_tuned_model_checkpoint"],
            r"ft:…": model,
            r"ftjob-…": trained,
            r"eval-…": evaluation,
            r"sweep-…": sweep["id"],
            r"file-…|file-pairs123|file-heldout456|file-prompts789": pairs,
            r"sk-…": "sk-your-key",
        }
        """Patterns of what the documents can only give as an example, and what stands for it here."""

    def _dpo(self, *arguments: str, body: dict[str, Any]) -> Any:
        done = self.service.dpo(*arguments, "--json", stdin=json.dumps(body), folder=self.folder)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    def replaced(self, text: str, page: Path) -> str:
        """`text` with its stand-ins. `/tmp` is a folder of the page."""
        for pattern, stand_in in self.stand_ins.items():
            text = re.sub(pattern, stand_in, text)
        return text.replace("/tmp/", f"{page}/tmp/")


@pytest.fixture(scope="module")
def example(service: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    with running_judge() as judge:
        yield Example(service, judge.url, tmp_path_factory.mktemp("documents") / "example")


def script(page: list[Block], example: Example, folder: Path) -> str:
    """The blocks of a page as one shell script. It says which block comes, so that an error has its place."""
    lines = ["set -euo pipefail"]
    for block, following in pairwise([*page, None]):
        assert block is not None
        text = example.replaced(block.text, folder)
        if "file" in block.markers:
            lines += [f"cat > {shlex.quote(block.markers['file'])} <<'END OF BLOCK'", text.rstrip("\n"), "END OF BLOCK"]
        if block.markers.get("yaml") == "workflow":
            (job,) = yaml.safe_load(text)["jobs"].values()
            text = "\n".join(step["run"] for step in job["steps"] if "pipx" not in step.get("run", "pipx"))
            lines += [f"export {name}={shlex.quote(value)}" for name, value in (
                ("DPO_BASE_URL", example.service.url), ("DPO_API_KEY", example.service.key), ("GITHUB_RUN_ID", "1"),
            )]  # fmt: skip
        elif "prints" in block.markers:
            lines += ["diff .printed - <<'END OF BLOCK'", text.rstrip("\n"), "END OF BLOCK"]
            continue
        elif block.outcome != "run":
            continue
        lines += [f"echo '@@ {block.place}'", f"export GATE={shlex.quote(block.markers.get('gate', ''))}"]
        if block.language == "python":
            lines += ["python3 - <<'END OF BLOCK'", text.rstrip("\n"), "END OF BLOCK"]
        elif following is not None and "prints" in following.markers:
            lines += ["{", text, "} | tee .printed"]
        else:
            lines.append(text)
    return "\n".join(lines) + "\n"


def has_work(page: list[Block]) -> bool:
    return any(block.outcome == "run" or block.markers.get("yaml") == "workflow" for block in page)


RUN = {page: found for page in PAGES if has_work(found := list(blocks(page)))}


@pytest.mark.parametrize("page", RUN, ids=[page.relative_to(ROOT).as_posix() for page in RUN])
def test_the_blocks_of_a_page_run_in_their_order(page: Path, example: Example, tmp_path: Path) -> None:
    folder, programs = tmp_path / "page", tmp_path / "programs"
    for path in (folder, programs, tmp_path / "page" / "tmp"):
        path.mkdir()
    write_files(folder)
    (folder / ".dpo").symlink_to(example.service.home)
    # The service is not at the port that the client takes by default. A stand-in may miss the gate of a page that says so:
    # exit status 4 then counts as success.
    dpo = programs / "dpo"
    dpo.write_text(
        f'#!/bin/sh\n: "${{DPO_BASE_URL:={example.service.url}}}"; export DPO_BASE_URL\n'
        f'{shlex.quote(DPO)} "$@"; status=$?; [ "$status$GATE" = "4may be missed" ] && exit 0; exit $status\n'
    )
    dpo.chmod(0o755)
    environment = {
        "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(tmp_path), "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    # `activate` puts the environment's programs first; ours stay before them.
    text = script(RUN[page], example, folder).replace("source .venv/bin/activate", "true")
    done = subprocess.run(
        ["bash"], input=text, text=True, cwd=folder, env=environment, capture_output=True, timeout=CEILING, check=False
    )
    place = (re.findall(r"@@ (\S+)", done.stdout) or ["before the first block"])[-1]
    assert done.returncode == 0, f"{place}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

"""A worker with several devices: narrow jobs run side by side, and a wide one has the bytes of a narrow one."""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.helpers.devices import job_on, succeeded, weights
from tests.helpers.preferences import write
from tests.helpers.service import Running, running, upload
from tests.helpers.trainer import make_pairs


@pytest.fixture
def service(home: Path) -> Iterator[Running]:
    with running(home, {"DPO_CPU_DEVICES": "3"}) as service:
        yield service


def rank_pids(home: Path) -> list[int]:
    """The processes of the ranks of the running job, in their order."""
    with suppress(FileNotFoundError, ValueError):
        return [int((path / "beat").read_text()) for path in sorted(home.glob("work/*/ranks/?"))]
    return []


def test_a_wide_job_that_loses_a_rank_has_the_bytes_of_a_narrow_one(service: Running, tmp_path: Path) -> None:
    file_id = upload(service, write(tmp_path / "pairs.jsonl", make_pairs(200)), "fine-tune")
    narrow = [job_on(service, file_id, 1, 12) for _ in range(2)]
    # 1. Two narrow jobs run at a time, and the wide one waits for the end of both.
    service.until(lambda: [service.job(job_id)["status"] for job_id in narrow] == ["running"] * 2, "two jobs at a time")
    wide = job_on(service, file_id, 3, 12, parallel={"shard": True})  # and each device keeps a third of the base
    for job_id in narrow:
        assert service.wait_for(job_id, succeeded)["devices"] == 1
    # 2. A rank of the wide job dies once it has a checkpoint.
    service.wait_for(wide, lambda job: job["progress"] is not None and job["progress"]["step"] >= 3)
    pids, before = rank_pids(service.home), service.job(wide)
    assert len(pids) == before["devices"] == 3
    os.kill(pids[1], signal.SIGKILL)
    # 3. It goes on from there, and has the bytes of the narrow one.
    job = service.wait_for(wide, succeeded)
    assert job["attempt"] == before["attempt"] + 1
    outcomes = [weights(service, job_id, tmp_path / job_id) for job_id in (*narrow, wide)]
    assert outcomes[0] == outcomes[1] == outcomes[2]

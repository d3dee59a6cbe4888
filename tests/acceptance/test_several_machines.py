"""A worker of a Ray cluster: a job spreads over two machines, and survives the cut of a network cable."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cluster import Network, ray_hosts
from tests.helpers.devices import job_on, succeeded, weights
from tests.helpers.judge_server import running_judge
from tests.helpers.labellings import by_likeness
from tests.helpers.preferences import write
from tests.helpers.service import YES_NO_CLASSIFIER, Running, ended_evaluation, ended_labelling, running, upload
from tests.helpers.trainer import make_pairs

WHY_NOT = Network.why_not()


@pytest.mark.skipif(WHY_NOT is not None, reason=f"{WHY_NOT}: no cable between machines was cut")
def test_a_job_over_two_machines_that_loses_one_has_the_bytes_of_a_narrow_one(home: Path, tmp_path: Path) -> None:
    """The second machine does not have the base model, which is sent there."""
    models = home / "models"
    (tmp_path / "none").mkdir()
    with ray_hosts(tmp_path) as hosts:
        hosts.add(2, models)
        hosts.add(2, tmp_path / "none", hidden=[models])
        environment = {"DPO_RAY_ADDRESS": hosts.address, "DPO_DEVICE": "cpu", "DPO_PRIVATE_JUDGES": "localhost:*"}
        with running(home, environment) as service, running_judge(lambda question, *_: f"Longer: {question}") as writer:
            file_id = upload(service, write(tmp_path / "pairs.jsonl", make_pairs(200)), "fine-tune")
            service.until(lambda: machines_of(service) == [2, 2], "a worker with two machines")
            # 1. The job is wider than either machine. One that is wider than both is refused.
            wide = job_on(service, file_id, {"min": 2, "max": 4}, 30, nodes=2)
            before = service.wait_for(wide, lambda job: (job["progress"] or {}).get("step", 0) >= 3)
            assert before["devices"] == 4
            with service.http() as client:
                wider = {"model": "tiny", "training_file": file_id, "resources": {"gpus": 5, "nodes": 2}}
                refused = client.post("/fine_tuning/jobs", json=wider).json()["error"]
                assert "wants 5 devices, and the largest worker has 4 on 2 machines" in refused["message"]
                wider["resources"] = {"gpus": 3}
                refused = client.post("/fine_tuning/jobs", json=wider).json()["error"]
                assert "2 machines have so many: raise 'resources.nodes'." in refused["message"]
            # 2. A machine is cut off. The job goes on, from its last checkpoint, on what is left.
            hosts.cut(2)
            narrow = job_on(service, file_id, 1, 30)
            job = service.wait_for(wide, succeeded)
            assert job["devices"] == 2 and job["attempt"] > before["attempt"]
            service.wait_for(narrow, succeeded)
            assert weights(service, wide, tmp_path / "wide") == weights(service, narrow, tmp_path / "narrow")
            # 3. Another machine comes. An evaluation on both has the items of one device.
            hosts.add(2, models)
            service.until(lambda: machines_of(service) == [2, 2], "a worker with two machines")
            judge = {"type": "classifier", "classifier": {"file": upload(service, classifier(tmp_path), "evals")}}
            data = upload(service, write(tmp_path / "held.jsonl", make_pairs(20, seed=1)), "evals")
            sampling = {"temperatures": [0.0, 1.0], "max_tokens": 20, "samples": 4}
            body: dict[str, Any] = {
                "type": "reward_kl", "candidate": {"model": job["fine_tuned_model"]}, "data": data, "seed": 5,
                "sampling": sampling, "judge": judge,
            }  # fmt: skip
            with service.http() as client:
                ids = [
                    client.post("/evaluations", json=body | {"resources": each}).raise_for_status().json()["id"]
                    for each in ({"gpus": 3, "nodes": 2}, {"gpus": 1})
                ]
            ends = [ended_evaluation(service, evaluation_id) for evaluation_id in ids]
            assert ends[0]["metrics"] == ends[1]["metrics"]
            contents = [content_of(service, end["result_files"][1]) for end in ends]
            assert contents[0] == contents[1]
            # 4. So has a labelling, some of whose answers come from an endpoint.
            body = {
                "data": data, "max_rows": 6, "sampling": sampling | {"samples": 2}, "seed": 5,
                "writers": [
                    {"model": job["fine_tuned_model"]}, {"endpoint": {"base_url": writer.url, "model": "other"}}
                ],
                "labellers": [by_likeness(), {"judge": judge}],
            }  # fmt: skip
            with service.http() as client:
                ids = [
                    client.post("/labellings", json=body | {"resources": each}).raise_for_status().json()["id"]
                    for each in ({"gpus": 3, "nodes": 2}, {"gpus": 1})
                ]
            ends = [ended_labelling(service, labelling_id) for labelling_id in ids]
            assert ends[0]["metrics"]["answers"] > 6 and "kappa@judge" in ends[0]["metrics"]
            contents = [content_of(service, end["result_files"][2]) for end in ends]
            assert contents[0] == contents[1]


def machines_of(service: Running) -> list[int] | None:
    """The devices of each machine, as the worker has registered them."""
    with service.http() as client:
        workers = client.get("/workers").raise_for_status().json()["data"]
    return next((worker["details"].get("machines") for worker in workers if worker["lane"] == "gpu"), None)


def classifier(folder: Path) -> Path:
    path = folder / "classifier.json"
    path.write_text(json.dumps(YES_NO_CLASSIFIER))
    return path


def content_of(service: Running, file_id: str) -> str:
    """The content of a result file."""
    with service.http() as client:
        return client.get(f"/files/{file_id}/content").raise_for_status().text

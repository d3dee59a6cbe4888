"""How often a step makes the CPU wait for its device."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.simulated_device import Simulation, simulated
from tests.helpers.trainer import dpo_method, make_pairs, make_work_folder, run_in_process, sft_method
from worker.trainer import loop
from worker.trainer.hardware import GPU
from worker.trainer.model import Policy
from worker.trainer.stage_run import StageRun

STEPS = {"max_steps": 4, "batch_size": 8}
JOBS = {
    "SFT": (sft_method(**STEPS), 1),
    "DPO": (dpo_method(**STEPS), 1),
    "WPO": (dpo_method(**STEPS, use_weighting=True), 1),
    "a reward model": (dpo_method(**STEPS, loss="reward_model"), 1),
    "KTO": (dpo_method(**STEPS, loss="kto"), 2),
    "AOT": (dpo_method(**STEPS, loss="aot"), 2),
}
"""Jobs by name: the method, and how often a step waits. A loss that couples rows first computes all log-probs."""


class Enough(Exception):
    """The steps that are counted are done."""


@pytest.mark.parametrize("name", JOBS)
def test_a_step_waits_for_its_device_at_its_end_only(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The values of all responses come with the norms of the gradients."""
    method, expected = JOBS[name]
    waits = list[list[str]]()
    check_policy, step = loop.check_policy, StageRun.step
    with ExitStack() as stack:
        simulations = list[Simulation]()

        def check_then_move(run: Any, stages: Any, policy: Policy) -> None:
            check_policy(run, stages, policy)
            policy.blocks = True
            simulations.append(stack.enter_context(simulated(policy, monkeypatch, replace(GPU, half=False))))

        def counted_step(running: StageRun) -> dict[str, float]:
            (simulation,) = simulations
            simulation.waits.clear()
            metrics = step(running)
            waits.append([*simulation.waits])
            if len(waits) == 3:
                raise Enough
            return metrics

        monkeypatch.setattr(loop, "check_policy", check_then_move)
        monkeypatch.setattr(StageRun, "step", counted_step)
        fields = {"adapter": {"r": 4}, "quantization": "none", "validation_split": 0.0, "method": method}
        with pytest.raises(Enough):
            run_in_process(make_work_folder(tmp_path, llama, fields, train=make_pairs(16)))
    for places in waits:
        assert len(places) == expected, places
        assert all("hardware.py" in place for place in places), places  # `download`

"""The sentiment experiment: its frontiers, paired differences and preference data."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.sentiment import START, frontier, make_preferences, paired, reward_at


def point(method: str, setting: str, kl: float, reward: float, at: str = "final") -> dict[str, Any]:
    errors = {"kl_error": 0.1, "reward_error": 0.03}
    return {"method": method, "setting": setting, "kl": kl, "reward": reward, "at": at, **errors}


def test_a_frontier_joins_sft_and_the_pareto_set_by_straight_lines() -> None:
    points = [
        point(START, "SFT", 0.0, 0.5), point(START, "base model", 0.0, 0.9), point("RLOO", "", 1.0, 0.99),
        point("DPO", "a", 4.0, 0.9), point("DPO", "a", 2.0, 0.6, at="1/2"), point("DPO", "dominated", 3.0, 0.55),
    ]  # fmt: skip
    line = frontier(points, "DPO")
    assert [corner["kl"] for corner in line] == [0.0, 2.0, 4.0], (
        "only points of this method, those during training included"
    )
    # By hand: slopes of 0.15 and 0.05 per nat, a reward error of 0.03 and a KL error of 0.1 nats.
    assert reward_at(line, 3.0) == pytest.approx((0.75, (0.03**2 + 0.015**2) ** 0.5))
    assert reward_at(line, 0.0) == pytest.approx((0.5, (0.03**2 + 0.005**2) ** 0.5))
    assert reward_at(line, 4.1) is None, "the frontier is unknown beyond its end"


def test_methods_are_paired_by_setting_and_seed() -> None:
    measurements = {
        f"measured|{method}|β=0.1|{seed}|final": {"reward": reward, "kl": kl}
        for method, seed, reward, kl in (
            ("A", 0, 0.7, 3.0), ("B", 0, 0.6, 2.0), ("A", 1, 0.9, 5.0), ("B", 1, 0.6, 4.0), ("A", 2, 0.9, 5.0)
        )
    }  # fmt: skip
    (row,) = paired(measurements, "A", "B", range(3))
    assert row["setting"] == "β=0.1" and row["seeds"] == 2, "a run without a partner is left out"
    assert row["reward"] == pytest.approx(0.2) and row["reward_error"] == pytest.approx(0.1)
    assert row["kl"] == pytest.approx(1.0) and row["kl_error"] == pytest.approx(0.0)


def test_four_completions_give_six_pairs_a_ranking_and_the_preferred_ones(tmp_path: Path) -> None:
    rewards = {"a": 0.1, "b": 2.0, "c": -1.0, "d": 0.5}
    items = [{"row": 7, "prompt": "p", "text": text, "reward": reward} for text, reward in rewards.items()]
    files = make_preferences([*items, *({**item, "row": 8, "text": "same"} for item in items)], tmp_path, seed=0)
    rows = {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in files.items()}
    assert [(row["chosen"], row["rejected"]) for row in rows["pairs"]] == [
        ("b", "d"), ("b", "a"), ("b", "c"), ("d", "a"), ("d", "c"), ("a", "c")
    ]  # fmt: skip
    assert rows["ranked"] == [{"prompt": "p", "responses": ["b", "d", "a", "c"]}]
    assert [row["completion"] for row in rows["preferred"]] == ["b", "b", "b", "d", "d", "a"]

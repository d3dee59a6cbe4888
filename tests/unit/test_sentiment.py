"""What the sentiment experiment makes of its measurements."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.sentiment import START, beside_dpo, make_preferences


def point(method: str, setting: str, kl: float, reward: float, at: str = "final") -> dict[str, Any]:
    errors = {"kl_error": 0.1, "reward_error": 0.03}
    return {"method": method, "setting": setting, "kl": kl, "reward": reward, "at": at, **errors}


def test_others_are_held_to_straight_lines_through_dpos_pareto_set() -> None:
    points = [
        point(START, "SFT", 0.0, 0.5), point(START, "base model", 1.0, 0.4),
        point("DPO", "a", 4.0, 0.9), point("DPO", "a", 2.0, 0.6, at="1/2"), point("DPO", "dominated", 3.0, 0.55),
        point("RLOO", "between", 3.0, 0.8), point("RLOO", "on the way", 1.0, 0.9, at="1/2"),
        point("RLOO", "beyond", 5.0, 0.95), point("Preferred-FT", "", 1.0, 0.55),
    ]  # fmt: skip
    found = {(one["method"], one["setting"]): one for one in beside_dpo(points)}
    assert set(found) == {("RLOO", "between"), ("Preferred-FT", "")}, "what DPO does not reach is not compared"
    assert found["RLOO", "between"]["dpo"] == pytest.approx(0.75)
    assert found["RLOO", "between"]["gain"] == pytest.approx(-0.05)
    assert found["RLOO", "between"]["gain_error"] == pytest.approx(0.03 * 2**0.5)
    assert found["Preferred-FT", ""]["gain"] == pytest.approx(0.0)


def test_four_completions_make_six_pairs_a_list_and_the_better_ones(tmp_path: Path) -> None:
    rewards = {"a": 0.1, "b": 2.0, "c": -1.0, "d": 0.5}
    items = [{"row": 7, "prompt": "p", "text": text, "reward": reward} for text, reward in rewards.items()]
    files = make_preferences([*items, *({**item, "row": 8, "text": "same"} for item in items)], tmp_path, seed=0)
    rows = {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in files.items()}
    assert [(row["chosen"], row["rejected"]) for row in rows["pairs"]] == [
        ("b", "d"), ("b", "a"), ("b", "c"), ("d", "a"), ("d", "c"), ("a", "c")
    ]  # fmt: skip
    assert rows["ranked"] == [{"prompt": "p", "responses": ["b", "d", "a", "c"]}]
    assert [row["completion"] for row in rows["preferred"]] == ["b", "b", "b", "d", "d", "a"]

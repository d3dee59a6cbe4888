"""A few faults of each kind, always the same, into one training: `make faults` does all of them many times."""

from tests.faults.run import inject

SELECTION = [
    "kill_trainer",
    "publish_without_commit",
    "s3_half_uploads",
    "kill_runner_and_trainer",
    "deliver_three_times",
    "drain_worker",
]


def test_faults_cost_time_and_nothing_else() -> None:
    found = inject(SELECTION, seed=3)
    assert found.problems == []
    assert [strike["fault"] for strike in found.strikes] == SELECTION
    ended = {"succeeded", "failed", "cancelled"}
    assert sum(number for name, number in found.counted.items() if name in ended) == found.counted["accepted"]

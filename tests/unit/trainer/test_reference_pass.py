"""A reference pass that was stopped or killed goes on where it ended, and has the same bits as one that was not."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.trainer import disturb, load, make_row
from worker.trainer import reference
from worker.trainer.cache import Cache
from worker.trainer.dataset import Rows
from worker.trainer.errors import Stopped
from worker.trainer.events import Events
from worker.trainer.launcher import Launcher
from worker.trainer.model import Policy
from worker.trainer.reference import Reference

ROWS = Rows.of([make_row(line, 6 + line % 3, 3 + line % 5, 9 - line % 4) for line in range(1, 25)])
PACKS = 6
Report = Callable[[int], None]


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def policy(llama: Path) -> Policy:
    policy = disturb(load(llama), 0.05)
    policy.packing = replace(policy.packing, budget=90, segment_tokens=90)
    return policy


@pytest.fixture
def scored(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each pack that the policy has scored."""
    packs, score = list[int](), policy.score

    def counting(*arguments: Any, **more: Any) -> Any:
        packs.append(len(packs))
        return score(*arguments, **more)

    monkeypatch.setattr(policy, "score", counting)
    return packs


def attempt(policy: Policy, folder: Path, tail_weight: float | None, report: Report = lambda done: None) -> Reference:
    """A pass with the cache in `folder`. Each attempt has a cache object of its own, as each has a process."""
    cache = Cache(folder, Events(io.StringIO()))
    return reference.find_or_compute(Launcher(policy), "digest", ROWS, tail_weight, cache, report)


def ends_after(reports: int, error: type[Exception]) -> Report:
    """A report that raises `error` when it is called for the `reports`-th time."""
    calls = list[int]()

    def report(done: int) -> None:
        calls.append(done)
        if len(calls) == reports:
            raise error

    return report


def assert_same(actual: Reference, expected: Reference) -> None:
    for name, values in vars(expected).items():
        assert torch.equal(getattr(actual, name), values), name


@pytest.mark.parametrize("tail_weight", [None, 0.5])
@pytest.mark.parametrize("end", [Stopped, Killed])
def test_a_pass_goes_on_where_it_ended(
    policy: Policy,
    scored: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tail_weight: float | None,
    end: type[Exception],
) -> None:
    """It ends after each pack. A stop keeps the last packs; a kill keeps those of the stretches before."""
    expected = reference.compute(Launcher(policy), ROWS, tail_weight)
    packs = len(scored)
    assert packs >= PACKS
    if end is Killed:
        monkeypatch.setattr(reference, "STRETCH_SECONDS", -1.0)  # a stretch for each pack
    scored.clear()
    reports = list[int]()
    # The first report is that of the packs that the cache had, and the second that of one more pack. The process is
    # killed during its report, before the pack is kept; so it takes a third.
    for _ in range(packs - 1):
        with pytest.raises(end):
            attempt(policy, tmp_path, tail_weight, ends_after(2 if end is Stopped else 3, end))
    assert_same(attempt(policy, tmp_path, tail_weight, reports.append), expected)
    lost = packs - 1 if end is Killed else 0
    assert len(scored) == packs + lost
    assert 0 < reports[0] < len(ROWS) and reports[-1] == len(ROWS)


def test_a_finished_pass_is_not_repeated(policy: Policy, scored: list[int], tmp_path: Path) -> None:
    first = attempt(policy, tmp_path, None)
    scored.clear()
    assert_same(attempt(policy, tmp_path, None), first)
    assert not scored


def test_what_is_damaged_is_computed_again(
    policy: Policy, scored: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "STRETCH_SECONDS", -1.0)
    first = attempt(policy, tmp_path, None)
    packs = len(scored)
    scored.clear()
    stretches = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(stretches) == packs
    stretches[0].write_bytes(stretches[0].read_bytes()[:-3])
    monkeypatch.setattr(reference, "STRETCH_SECONDS", 60.0)
    assert_same(attempt(policy, tmp_path, None), first)
    assert scored
    scored.clear()
    assert_same(attempt(policy, tmp_path, None), first)
    assert not scored


def test_a_stop_before_the_first_pack_keeps_nothing(policy: Policy, scored: list[int], tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        attempt(policy, tmp_path, None, ends_after(1, Stopped))
    assert not scored and not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_smaller_packs_go_on_where_larger_ones_ended(
    policy: Policy, scored: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a lack of memory, packs are smaller. With one thread, the log-probs of a segment do not depend on them."""
    monkeypatch.setattr(policy, "packing", replace(policy.packing, budget=270))
    expected = reference.compute(Launcher(policy), ROWS)
    with pytest.raises(Stopped):
        attempt(policy, tmp_path, None, ends_after(2, Stopped))
    policy.packing = replace(policy.packing, budget=90)
    scored.clear()
    assert_same(attempt(policy, tmp_path, None), expected)
    assert 0 < len(scored) < PACKS

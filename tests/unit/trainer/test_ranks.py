"""Several ranks give the bytes of one: gradients, adapters and metrics, after a stop or a kill as well."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from app.estimates.service import speedup
from app.spec.job import JobSpec
from tests.helpers.ranks import (
    COMMON,
    PAIRS,
    STEPS,
    TRAININGS,
    ThreadRanks,
    on_ranks,
    outcome,
    rows_for,
    step_on,
    train_on_ranks,
    work_folder,
)
from tests.helpers.trainer import (
    TrainerProcess,
    disturb,
    dpo_method,
    load,
    make_pairs,
    make_row,
    make_run,
    make_work_folder,
    of_kind,
    run_process,
    sft_method,
)
from worker.trainer import loop
from worker.trainer.errors import UserError
from worker.trainer.gradients import Ownership
from worker.trainer.joins import check
from worker.trainer.model import Policy, Scores
from worker.trainer.packing import SEGMENT_TOKENS, Pack, Segment, Tree, trees
from worker.trainer.ranks import Ranks
from worker.trainer.segments import StepPlan

# -- the order of a step -----------------------------------------------------------------------------------------------

sizes = st.lists(st.integers(1, 60), min_size=1, max_size=30)


def segments_of(tokens: list[int]) -> list[Segment]:
    rows = [make_row(number, 0, length) for number, length in enumerate(tokens)]
    return [Segment((tree,)) for tree in trees(rows, range(len(rows)), 1)]


@given(sizes, st.integers(1, 20), st.integers(1, 7))
@settings(deadline=None)
def test_every_segment_is_summed_once_in_an_order_that_does_not_depend_on_the_ranks(
    tokens: list[int], count: int, size: int
) -> None:
    plan = StepPlan.of(segments_of(tokens), count)
    assert sorted(plan.rows) == list(range(len(tokens)))
    loads = [sum(segment.tokens for segment in virtual_rank) for virtual_rank in plan.virtual_ranks]
    assert len(loads) == min(count, len(tokens))
    assert loads == sorted(loads, reverse=True) and loads[0] - loads[-1] <= max(tokens)
    rounds = [plan.rounds(rank, size) for rank in range(size)]
    for number in range(len(rounds[0])):
        computed = sorted(own[number] for own in rounds if own[number] is not None)  # type: ignore[type-var]
        assert computed == list(range(number * size, min((number + 1) * size, len(loads))))
    values = torch.tensor([
        float(plan.first_places[number] + k)
        for own in rounds for number in own if number is not None for k in range(len(plan.virtual_ranks[number]))
    ])  # fmt: skip
    assert plan.in_order(values, size).tolist() == list(range(len(tokens)))


# -- gradients ---------------------------------------------------------------------------------------------------------

LOSSES = ("nll", "sigmoid", "kto", "aot", "plackett_luce", "reward_model")
row_sizes = st.tuples(st.integers(1, 12), st.lists(st.integers(1, 12), min_size=2, max_size=3))


@cache
def policies(llama: Path, rewards: bool) -> list[Policy]:
    """Four equal policies, one for each rank."""
    method = dpo_method(loss="reward_model" if rewards else "sigmoid")
    return [disturb(load(llama, method=method), 0.05) for _ in range(4)]


@pytest.mark.parametrize("loss", LOSSES)
@given(
    lengths=st.lists(row_sizes, min_size=1, max_size=12),
    size=st.integers(2, 4),
    budgets=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    virtual_ranks=st.integers(1, 6),
)
@settings(deadline=None, max_examples=12)
def test_gradients_and_metrics_have_the_same_bits_on_any_number_of_ranks_and_with_any_budget(
    llama: Path,
    loss: str,
    lengths: list[tuple[int, list[int]]],
    size: int,
    budgets: tuple[int, int],
    virtual_ranks: int,
) -> None:
    rows, models = rows_for(loss, lengths), policies(llama, loss == "reward_model")
    expected, (metrics,) = step_on(1, loss, rows, budgets[0], virtual_ranks, models=models)
    actual, metrics_of_ranks = step_on(size, loss, rows, budgets[1], virtual_ranks, models=models)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(actual[name], gradient), name
    assert metrics_of_ranks == [metrics] * size


def test_a_rank_with_less_memory_than_the_others_changes_nothing(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It computes smaller packs, in steps and in passes without gradients. The ranks still agree who computes what."""
    rows = rows_for("sigmoid", [(5, [6, 7]), (4, [9, 3]), (8, [8, 8]), (3, [2, 5])] * 6)
    models = policies(llama, False)
    expected, (metrics,) = step_on(1, "sigmoid", rows, 200, 4, models=models)
    score, failures = models[1].score, list[int]()

    def failing(pack: Pack, **options: Any) -> Scores:
        if pack.tokens > 120:
            failures.append(pack.tokens)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score(pack, **options)

    monkeypatch.setattr(models[1], "score", failing)
    try:
        for _ in range(2):  # the second time, the room of the rank is known from the start
            actual, metrics_of_ranks = step_on(2, "sigmoid", rows, 200, 4, models=models)
            assert all(torch.equal(actual[name], gradient) for name, gradient in expected.items())
            assert metrics_of_ranks == [metrics] * 2
    finally:
        models[1].room = None
        models[1].recompute_activations(False)
    assert failures


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4])
def test_a_step_that_runs_out_of_memory_anywhere_has_each_value_once(
    llama: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    """Packs hold the end of one virtual rank and the beginning of the next one."""
    rows = rows_for("sigmoid", [(5 + k, [4, 5]) for k in range(20)])
    (policy, *_) = policies(llama, False)
    expected, (metrics,) = step_on(1, "sigmoid", rows, 90, 4, models=[policy])
    score, steps = policy.score, list[int]()

    def failing(pack: Pack, **options: Any) -> Scores:
        if torch.is_grad_enabled():  # not the reference pass
            steps.append(pack.tokens)
            if len(steps) == fails_at:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return score(pack, **options)

    monkeypatch.setattr(policy, "score", failing)
    try:
        actual, (again,) = step_on(1, "sigmoid", rows, 90, 4, models=[policy])
    finally:
        policy.room = None
        policy.recompute_activations(False)
    assert len(steps) > fails_at
    assert all(torch.equal(actual[name], gradient) for name, gradient in expected.items())
    assert again == metrics


def test_the_clipped_gradient_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 30), (7,), (12, 5), (1, 1), (64, 3)]
    gradients = [torch.randn(shape, generator=generator) for shape in shapes]
    theirs = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for parameter, gradient in zip(theirs, gradients, strict=True):
        parameter.grad = gradient.clone()
    norm = nn.utils.clip_grad_norm_(theirs, 1.5)

    def clip(ranks: ThreadRanks) -> tuple[float, list[Tensor]]:
        ours = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        owned = Ownership(ours, ranks)
        for parameter, gradient in zip(ours, gradients, strict=True):
            parameter.grad = gradient.clone() if any(parameter is own for own in owned.own) else None
        owned.norms = owned.own_norms()
        return owned.clip(1.5).item(), [parameter.grad for parameter in owned.own if parameter.grad is not None]

    for size in (1, 2, 3, 8):
        results = on_ranks(size, clip)
        assert [result for result, _ in results] == [norm.item()] * size
        clipped = [gradient for _, part in results for gradient in part]
        assert all(map(torch.equal, clipped, [parameter.grad for parameter in theirs]))  # type: ignore[arg-type]


@pytest.mark.parametrize("virtual_ranks", [4, 16])
def test_the_estimate_knows_how_many_devices_a_step_keeps_busy(virtual_ranks: int) -> None:
    for segments, devices in product(range(1, virtual_ranks + 1), range(1, 10)):
        spec = JobSpec.model_validate({
            "model": "m", "training_file": "f", "method": dpo_method(), "resources": {"gpus": devices},
            "parallel": {"virtual_ranks": virtual_ranks},
        }).resolved()  # fmt: skip
        tree = Tree((1,) * SEGMENT_TOKENS, (), ((1, ()),))
        plan = StepPlan.of([Segment((tree,))] * segments, virtual_ranks)
        busiest = max(sum(map(len, plan.parts(rank, devices))) for rank in range(devices))
        assert speedup(spec, devices, segments * SEGMENT_TOKENS) == segments / busiest


# -- the check of joined packs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "joins"),
    [
        ({}, True),
        ({"quantization": "nf4"}, True),
        ({"adapter": {"r": 4, "use_dora": True}}, False),  # autograd sums it
        ({"adapter": {"r": 4, "modules_to_save": ["lm_head"]}}, False),
    ],
)
def test_segments_share_a_pack_if_their_gradients_can_be_told_apart(
    llama: Path, fields: dict[str, Any], joins: bool
) -> None:
    policy = load(llama, **fields)
    check(policy, rows_for("sigmoid", [(5 + k % 7, [4 + k % 9, 3 + k % 5]) for k in range(40)]), Ranks())
    assert policy.joins == joins


def test_segments_do_not_share_a_pack_in_a_model_that_mixes_them(llama: Path) -> None:
    """As quantised activations do, whose scale depends on all rows of a product."""
    policy = load(llama)
    policy.body.layers[0].register_forward_hook(lambda module, inputs, output: output + 1e-3 * output.mean(1, True))
    before = {name: weight.clone() for name, weight in policy.trainable().items()}
    check(policy, rows_for("sigmoid", [(5 + k % 7, [4 + k % 9, 3 + k % 5]) for k in range(40)]), Ranks())
    assert not policy.joins
    assert all(torch.equal(weight, before[name]) for name, weight in policy.trainable().items())


# -- trainings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAININGS)
def test_the_weights_have_the_same_bytes_on_one_to_four_ranks_with_two_budgets(
    llama: Path, tmp_path: Path, name: str
) -> None:
    outcomes = {}
    for size in (1, 2, 3, 4):
        for budget in (2048, 1100):
            folder = work_folder(tmp_path / f"{size}-{budget}", llama, name)
            outcomes[size, budget] = outcome(folder, train_on_ranks(folder, size, budget))
    assert all(result == outcomes[1, 2048] for result in outcomes.values())


@pytest.fixture(scope="module")
def expected(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, float]]]:
    """The outcome of an undisturbed training on one rank."""
    folder = work_folder(tmp_path_factory.mktemp("alone") / "run", llama, "SFT, then DPO")
    status, events = run_process(folder)
    assert status == 0
    return outcome(folder, events)


@pytest.mark.parametrize(
    ("name", "ranks"), [("SFT, then DPO", 3), ("KTO", 2), ("AOT", 3), ("Plackett-Luce", 2), ("reward model", 4)]
)
def test_processes_have_the_bytes_of_one(llama: Path, tmp_path: Path, name: str, ranks: int) -> None:
    """Over gloo."""
    alone = work_folder(tmp_path / "alone", llama, name)
    expected = outcome(alone, train_on_ranks(alone, 1, 2048))
    folder = work_folder(tmp_path / "run", llama, name, ranks=ranks)
    status, events = run_process(folder)
    assert status == 0, (folder / "trainer.log").read_text()
    assert outcome(folder, events) == expected
    assert any(f"on {ranks} × cpu (1 thread)" in event["message"] for event in of_kind(events, "message"))


def test_dropout_is_drawn_for_each_segment_whatever_rank_computes_it(llama: Path, tmp_path: Path) -> None:
    spec = {**COMMON, "method": sft_method(**STEPS), "adapter": {"r": 4, "dropout": 0.2}}
    outcomes = []
    for ranks in (1, 2):
        folder = make_work_folder(tmp_path / str(ranks), llama, spec, ranks, train=PAIRS)
        status, events = run_process(folder)
        assert status == 0, (folder / "trainer.log").read_text()
        outcomes.append(outcome(folder, events))
    assert outcomes[0] == outcomes[1]


def resumed(llama: Path, folder: Path, source: Path, ranks: int) -> tuple[str, list[dict[str, float]]]:
    """The outcome of a training on `ranks` ranks that goes on from the last checkpoint in `source`."""
    work_folder(folder, llama, "SFT, then DPO", ranks)
    last = max((source / "checkpoints").glob("step-?"), key=lambda path: path.name)
    shutil.copytree(last, folder / "resume")
    status, events = run_process(folder)
    assert status == 0, (folder / "trainer.log").read_text()
    return outcome(folder, events)


@pytest.mark.parametrize(("signal_number", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75)])
def test_a_training_that_ends_on_three_ranks_goes_on_with_the_same_bytes_on_one_and_on_two(
    llama: Path, tmp_path: Path, expected: tuple[str, list[dict[str, float]]], signal_number: int, status: int
) -> None:
    folder = work_folder(tmp_path / "run", llama, "SFT, then DPO", ranks=3)
    with TrainerProcess(folder) as process:
        for event in process.events():
            if event["kind"] == "checkpoint":
                process.send_signal(signal_number)
                break
        assert len(list(process.events())) < 100 and process.status() == status
    for ranks in (1, 2):
        weights, metrics = resumed(llama, tmp_path / f"resumed-{ranks}", folder, ranks)
        assert weights == expected[0]
        assert metrics == expected[1][-len(metrics) :]


def rank_pids(folder: Path) -> list[int]:
    return [int((path / "beat").read_text()) for path in sorted((folder / "ranks").glob("?"))]


ENDLESS = dpo_method(**STEPS | {"max_steps": 100_000})
"""It is still running when a test strikes it, however busy the machine is."""


@pytest.mark.parametrize("way", ["killed", "stopped"])
def test_a_rank_that_dies_or_hangs_ends_the_training_at_once(llama: Path, tmp_path: Path, way: str) -> None:
    """The trainer ends like a trainer of one rank that was killed, so that the attempt counts as lost."""
    folder = work_folder(tmp_path / "run", llama, "SFT, then DPO", ranks=2, method=ENDLESS)
    with TrainerProcess(folder) as process:
        events = process.events()
        next(event for event in events if event["kind"] == "stage")
        pids = rank_pids(folder)
        if way == "killed":
            os.kill(pids[1], signal.SIGKILL)
        else:
            os.kill(pids[1], signal.SIGSTOP)
            os.utime(folder / "ranks" / "1" / "beat", (0, 0))  # as if it had been silent for long
        assert not of_kind(list(events), "done")
        assert process.status() == -signal.SIGKILL
        log = process.log()
    assert "a rank was ended by signal 9" in log
    assert ("rank 1 gives no sign of life" in log) == (way == "stopped")
    assert ("Current thread" in log or "Thread 0x" in log) == (way == "stopped")  # the stacks of the others
    assert not any(is_alive(pid) for pid in pids)


def launched(folder: Path, run_rank: str, size: int, endpoint: str | None = None) -> subprocess.CompletedProcess[str]:
    """Launch ranks in a process of its own. `run_rank` is the body of what each does; both periods of the watch are 4 s."""
    program = f"""
import signal, sys, threading, time
from pathlib import Path
from worker.trainer import progress, rank_processes
from worker.trainer.progress import progress as own
progress.HUNG_SECONDS = rank_processes.SILENT_SECONDS = 4.0

def run_rank(rank, local_rank):
{textwrap.indent(run_rank, "    ")}

folder = Path(sys.argv[1])
machine = rank_processes.Machine(0, 1, {endpoint!r}, None) if {endpoint!r} else None
status = rank_processes.launch(folder, {size}, run_rank, threading.Event(), machine)
print(rank_processes.failure(folder, {size}))
sys.exit(status)
"""
    return subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, timeout=120)


def test_a_rank_that_computes_for_ever_is_killed_and_all_write_where_they_are(tmp_path: Path) -> None:
    """It gives signs of life all the time. The other one waits for it, which is no fault."""
    done = launched(
        tmp_path,
        "if rank == 1:\n    while True:\n        time.sleep(0.01)  # the hung line\n"
        "signal.signal(signal.SIGTERM, signal.SIG_DFL)\nwith own.waits():\n    time.sleep(1000)",
        size=2,
    )
    assert done.returncode == -signal.SIGKILL
    assert done.stderr.startswith("rank 1 gives no sign of life")
    assert done.stderr.count("in run_rank") >= 2  # the stacks of both


def test_a_port_that_is_taken_ends_the_attempt_with_the_reason(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = launched(tmp_path, "return 0", size=1, endpoint=f"127.0.0.1:{taken.getsockname()[1]}")
    assert done.returncode == 1
    assert "Broken(" in done.stdout and "cannot meet" in done.stdout


def is_alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_the_ranks_end_when_the_runner_dies(llama: Path, tmp_path: Path) -> None:
    folder = work_folder(tmp_path / "run", llama, "SFT, then DPO", ranks=2, method=ENDLESS)
    with TrainerProcess(folder) as process:
        next(event for event in process.events() if event["kind"] == "stage")
        pids = rank_pids(folder)
        process.close_stdin()
        assert process.status() != 0
        assert not any(is_alive(pid) for pid in pids)


def test_an_error_of_all_ranks_is_reported_once(llama: Path, tmp_path: Path) -> None:
    folder = work_folder(tmp_path / "run", llama, "SFT, then DPO", ranks=2)
    (folder / "train.jsonl").write_text("{}\n")
    status, events = run_process(folder)
    assert status == 1
    (failed,) = of_kind(events, "failed")
    assert failed["code"] == "invalid_file"


def test_ranks_that_differ_are_refused(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as machines with different versions of a library."""
    folder, versions = work_folder(tmp_path / "run", llama, "AOT"), iter(["5.1", "5.2"])

    class Transformers:
        @property
        def __version__(self) -> str:
            return next(versions)

    monkeypatch.setattr("worker.trainer.alike.transformers", Transformers())
    with pytest.raises(UserError, match="differ in the version of transformers: 5") as caught:
        train_on_ranks(folder, 2, 2048)
    assert caught.value.code == "ranks_differ"


def test_machines_that_read_other_rows_are_refused(llama: Path, tmp_path: Path) -> None:
    """The first rank of each machine reads its own copy. Here the second machine has another file."""
    folders = [
        work_folder(tmp_path / "first", llama, "AOT"),
        make_work_folder(tmp_path / "second", llama, {}, train=make_pairs(9, seed=3)),
    ]
    (folders[1] / "spec.json").write_text((folders[0] / "spec.json").read_text())

    def run(ranks: ThreadRanks) -> None:
        folder, ranks.local_rank = folders[ranks.rank], 0
        loop.train(make_run(folder, ranks=ranks))

    with pytest.raises(UserError, match="differ in the rows of its files") as caught:
        on_ranks(2, run)
    assert caught.value.code == "ranks_differ"


@pytest.mark.parametrize(
    ("batch_size", "virtual_ranks", "remedy"), [(2, 16, "batch_size"), (60, 2, "parallel.virtual_ranks")]
)
def test_devices_that_idle_are_named_with_what_would_fill_them(
    llama: Path, tmp_path: Path, batch_size: int, virtual_ranks: int, remedy: str
) -> None:
    spec = {
        **COMMON,
        "method": dpo_method(**STEPS | {"batch_size": batch_size, "max_steps": 1}),
        "parallel": {"virtual_ranks": virtual_ranks},
    }
    folder = make_work_folder(tmp_path / "run", llama, spec, train=PAIRS)
    (idle,) = (
        event for event in of_kind(train_on_ranks(folder, 3, 2048), "message") if "devices idle" in event["message"]
    )
    assert remedy in idle["message"]

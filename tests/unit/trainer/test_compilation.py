"""Compiled layers: when they are chosen, that they compute the same, and what happens if they cannot be used."""

import io
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app.spec.job import JobSpec
from tests.helpers.hardware import choose
from tests.helpers.trainer import (
    ROWS,
    disturb,
    dpo_method,
    load,
    make_pairs,
    make_work_folder,
    of_kind,
    parse,
    run_in_process,
)
from worker.trainer import compilation, joins, memory
from worker.trainer.dataset import Rows
from worker.trainer.events import Events
from worker.trainer.launcher import Launcher
from worker.trainer.model import Policy
from worker.trainer.plan import Stage
from worker.trainer.ranks import Ranks

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.compile warns of itself
SETTINGS = {"max_steps": 2, "batch_size": 4}


def stage(**settings: Any) -> Stage:
    """A stage over a few short rows."""
    body = {"model": "base", "training_file": "train.jsonl", "method": dpo_method(**{**SETTINGS, **settings})}
    spec = JobSpec.model_validate(body).resolved()
    assert spec.method.dpo is not None
    return Stage("dpo", spec.method.dpo.hyperparameters, Rows.of(ROWS), Rows.of([]), seed=0)


def chosen(policy: Policy, running: Stage) -> list[dict[str, Any]]:
    """The messages of the choice for the stage `running`."""
    stream = io.StringIO()
    compilation.choose(policy, running, Events(stream), Ranks())
    return of_kind(parse(stream), "message")


@pytest.fixture(autouse=True)
def forget() -> None:
    """Compile anew: after many variants of a layer, the compiler lets others run uncompiled."""
    torch._dynamo.reset()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace layers into graphs, without making kernels of them."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


@pytest.mark.parametrize(
    ("setting", "repaid_from", "compiled"),
    [(None, float("inf"), False), (None, 0.0, True), (False, 0.0, False)],
)
@pytest.mark.usefixtures("quick")
def test_layers_are_compiled_if_the_stage_asks_for_it_or_repays_it(
    llama: Path, monkeypatch: pytest.MonkeyPatch, setting: bool | None, repaid_from: float, compiled: bool
) -> None:
    choose(monkeypatch, compiled_from=repaid_from)
    policy = load(llama)
    messages = chosen(policy, stage(compile=setting))
    assert policy.compiled == compiled, messages
    assert policy.joins
    assert [message["level"] for message in messages] == ["info"] * compiled
    chosen(policy, stage(compile=False))
    assert not policy.compiled


def test_a_longer_stage_repays_the_compilation(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By 4 FLOPs for each weight of a layer and each distinct token."""
    policy = load(llama)
    weights = sum(
        layer.weight.numel() for layer in policy.causal.modules()
        if isinstance(layer, torch.nn.Linear) and min(layer.weight.shape) > 4
        and layer is not policy.causal.get_output_embeddings()
    )  # fmt: skip
    tokens = 5 * 2 * sum(row.tokens for row in ROWS) // len(ROWS)
    running = stage(max_steps=5, batch_size=2)
    for factor, repays in ((0.999, True), (1.001, False)):
        choose(monkeypatch, compiled_from=factor * 4.0 * weights * tokens)
        assert compilation._repays(policy, running) == repays


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_compiled_layers_keep_the_gradients_of_segments_apart(llama: Path, quantization: str) -> None:
    """By the compiler's own kernels, against uncompiled layers, with several segments in a pack."""
    policy = disturb(load(llama, quantization=quantization), 0.02)
    segments = joins.segments_to_check(policy, ROWS)
    assert len(segments) > 1
    expected = joins.outcomes(policy, segments)
    policy.compiled = True
    for compiled, plain in zip(joins.outcomes(policy, segments), expected, strict=True):
        assert compiled.keys() == plain.keys()
        for name, values in plain.items():
            assert (compiled[name] - values).norm() <= 1e-5 * values.norm(), name


@pytest.mark.usefixtures("quick")
def test_layers_that_are_recomputed_later_are_checked_again(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Because activations do not fit. To recompute them compiles other graphs."""
    checked, check = list[bool](), compilation.check

    def counted_check(policy: Policy, running: Stage, events: Events, ranks: Ranks) -> None:
        checked.append(policy.recomputes_activations)
        check(policy, running, events, ranks)

    monkeypatch.setattr(compilation, "check", counted_check)
    monkeypatch.setattr(memory, "activations_fit", lambda *_: False)
    method = dpo_method(**SETTINGS, learning_rate=1e-3, compile=True)
    fields = {"adapter": {"r": 4}, "quantization": "none", "seed": 0, "validation_split": 0.0, "method": method}
    events = run_in_process(make_work_folder(tmp_path, llama, fields, train=make_pairs(8)))
    assert checked == [False, True]
    assert not [event for event in of_kind(events, "message") if event["level"] == "warn"]


def test_a_compiler_that_fails_in_a_step_costs_a_warning(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it may when activations are recomputed from then on, which is compiled anew."""

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
        raise RuntimeError("no space left on device")

    policy, stream = disturb(load(llama)), io.StringIO()
    launcher = Launcher(policy, events=Events(stream))

    def scores() -> Tensor:
        plan = launcher.plan(list(policy.segments(ROWS, range(len(ROWS)))))
        values, _ = launcher.backward(plan, lambda pack, _: total(policy.score(pack).responses))
        return values["logps"]

    def total(logps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return logps.sum(), {"logps": logps}

    expected = scores()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    policy.compiled = True
    assert torch.equal(scores(), expected)
    assert not policy.compiled
    (message,) = of_kind(parse(stream), "message")
    assert "not compiled any more" in message["message"] and "no space left" in message["message"]


@pytest.mark.parametrize("wrong", ["no compiler", "other numbers", "no gradients"])
def test_layers_that_compile_wrongly_run_uncompiled(llama: Path, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
        if wrong == "no compiler":
            raise RuntimeError("Failed to find C compiler")

        def compute(*inputs: Tensor) -> list[Any]:
            with torch.set_grad_enabled(wrong != "no gradients" and torch.is_grad_enabled()):
                factor = 1.0 if wrong == "no gradients" else 1.2
                return [factor * part if part.is_floating_point() else part for part in graph(*inputs)]

        return compute

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    policy = load(llama)
    _, message = chosen(policy, stage(compile=True))
    assert not policy.compiled and policy.joins
    assert message["level"] == "warn" and "are not compiled" in message["message"]


@pytest.mark.usefixtures("quick")
def test_a_job_with_compiled_layers_has_the_losses_of_one_without(llama: Path, tmp_path: Path) -> None:
    losses = {}
    for compiled in (False, True):
        method = dpo_method(**SETTINGS, learning_rate=1e-3, compile=compiled)
        fields = {"adapter": {"r": 4}, "quantization": "none", "seed": 0, "validation_split": 0.0, "method": method}
        events = run_in_process(make_work_folder(tmp_path / str(compiled), llama, fields, train=make_pairs(8)))
        losses[compiled] = [event["metrics"]["loss"] for event in of_kind(events, "metrics")]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)

"""A base that is divided among ranks gives the bytes of a whole one, and each rank holds a part of it."""

import io
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, core_model_loading

from app.spec.job import JobSpec
from tests.helpers.families import FAMILIES, ROWS, make_policy
from tests.helpers.ranks import (
    LOADING,
    STEPS,
    TRAININGS,
    ThreadRanks,
    gradient_on,
    on_ranks,
    outcome,
    rows_for,
    train_on_ranks,
    work_folder,
)
from tests.helpers.tiny_model import make_tiny_model
from tests.helpers.trainer import BASE_NAME, Event, TrainerProcess, dpo_method, of_kind, run_process
from worker.trainer import loading
from worker.trainer.dataset import Rows
from worker.trainer.errors import UserError
from worker.trainer.events import Events
from worker.trainer.exactness import check
from worker.trainer.loading import load_policy, shards_for
from worker.trainer.model import Base, Policy, Scores
from worker.trainer.packing import Pack
from worker.trainer.shards import Shards

SHARDED = {"parallel": {"shard": True}}
DIVIDED = "Each of the 2 devices keeps a part of the model."


def messages(events: list[Event]) -> list[str]:
    return [event["message"] for event in of_kind(events, "message")]


# -- every model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sharded_base_has_the_digest_the_metrics_and_the_gradients_of_a_whole_one(family: str) -> None:
    whole = make_policy(family, FAMILIES[family], io.StringIO())
    # Found by a pass, for which the ranks would have to meet.
    adapter = {"r": 4, "target_modules": sorted(whole.model.peft_config["default"].target_modules)}
    rows = Rows.of(ROWS)

    def step(ranks: ThreadRanks, shards: Shards | None) -> tuple[str, Any]:
        with LOADING:
            policy = make_policy(family, FAMILIES[family], io.StringIO(), shards, adapter=adapter)
        assert bool(policy.shards) == (shards is not None)
        check(policy, ROWS, Events(io.StringIO()))
        return policy.digest(), gradient_on(ranks, policy, "sigmoid", rows, 60, 3)

    ((digest, (expected, metrics)),) = on_ranks(1, lambda ranks: step(ranks, None))
    results = on_ranks(2, lambda ranks: step(ranks, Shards(ranks)))
    assert [result for result, _ in results] == [digest] * 2
    assert [result for _, (_, result) in results] == [metrics] * 2
    actual = {name: gradient for _, (part, _) in results for name, gradient in part.items()}
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], gradient) for name, gradient in expected.items())


# -- memory --------------------------------------------------------------------------------------------------------------


def load_on(ranks: ThreadRanks, model: Path, **fields: Any) -> Policy:
    """The policy of a job with a sharded base. The names of its layers are given, so no pass looks for them."""
    adapter = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
    values = {"adapter": adapter, "seed": 1, **SHARDED, **fields}
    spec = JobSpec.model_validate({"model": BASE_NAME, "training_file": "train.jsonl", **values}).resolved()
    base = Base(BASE_NAME, None, None, model)
    shards = shards_for(spec, base, ranks)
    with LOADING:
        return load_policy(spec, base, None, Events(io.StringIO()), shards)


def base_bytes(policy: Policy) -> int:
    """The memory that holds the base's weights on this rank, counted by storages."""
    tensors = [tensor for name, tensor in policy.causal.named_parameters() if "lora_" not in name]
    tensors += [parameter.quant_state.absmax for parameter in tensors if hasattr(parameter, "quant_state")]
    tensors += [unit.part for unit in policy.shards.units]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_a_rank_holds_its_part_of_the_base_and_two_layers(
    tmp_path: Path, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny_model(tmp_path / "deep", layers=12)
    (whole,) = on_ranks(1, lambda ranks: base_bytes(load_on(ranks, model, quantization=quantization)))
    read, taken, most_ahead = [0], [0], [0]  # of one rank at a time, which loads under the lock
    materialise, take = core_model_loading._materialize_copy, Shards._take

    def read_and_count(*arguments: Any, **options: Any) -> torch.Tensor:
        tensor: torch.Tensor = materialise(*arguments, **options)
        read[0] += tensor.numel()
        most_ahead[0] = max(most_ahead[0], read[0] - taken[0])
        return tensor

    def take_and_count(self: Shards, module: torch.nn.Module, slot: int) -> None:
        taken[0] = read[0]
        take(self, module, slot)

    monkeypatch.setattr(core_model_loading, "_materialize_copy", read_and_count)
    monkeypatch.setattr(Shards, "_take", take_and_count)
    for size in (2, 3):
        most_ahead[0] = 0
        policies = on_ranks(size, lambda ranks: load_on(ranks, model, quantization=quantization))
        weights = sum(parameter.numel() for parameter in policies[0].causal.model.layers[0].parameters())
        ends = 2 * policies[0].causal.config.vocab_size * 64  # embeddings and head are read first
        assert most_ahead[0] <= ends + 3 * weights  # a packed weight counts half
        for policy in policies:
            units = [len(unit.part) * size for unit in policy.shards.units]
            layer, ends = units[0], max(units[-2:])
            vectors = sum(p.nbytes for p in policy.causal.parameters() if p.dim() < 2)
            assert len(units) == 14 and units[:12] == [layer] * 12
            assert base_bytes(policy) <= whole / size + 2 * layer + ends + vectors + 16 * 128 * len(units)


# -- lack of memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails_at", ["before", "after"])
def test_a_rank_of_a_sharded_base_with_less_memory_than_the_others_changes_nothing(llama: Path, fails_at: str) -> None:
    """It gathers on for the other ranks, and computes smaller packs then."""
    rows = rows_for("sigmoid", [(5, [6, 7]), (4, [9, 3]), (8, [8, 8]), (3, [2, 5])] * 6)
    failures = list[int]()

    def step(ranks: ThreadRanks, fails: bool) -> Any:
        policy = load_on(ranks, llama, quantization="nf4", parallel={"shard": ranks.size > 1})
        check(policy, rows, Events(io.StringIO()))
        score = policy.score

        def failing(pack: Pack, **options: Any) -> Scores:
            scores = score(pack, **options) if fails_at == "after" else None
            if pack.tokens > 120:
                failures.append(pack.tokens)
                raise torch.OutOfMemoryError("CUDA out of memory")
            return scores or score(pack, **options)

        if fails:
            policy.score = failing  # type: ignore[method-assign]
        return gradient_on(ranks, policy, "sigmoid", rows, 200, 4)

    ((expected, metrics),) = on_ranks(1, lambda ranks: step(ranks, False))
    results = on_ranks(3, lambda ranks: step(ranks, ranks.rank == 1))
    assert failures and [result for _, result in results] == [metrics] * 3
    actual = {name: gradient for part, _ in results for name, gradient in part.items()}
    assert all(torch.equal(actual[name], gradient) for name, gradient in expected.items())


# -- trainings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAININGS)
def test_the_weights_have_the_same_bytes_with_a_sharded_base(llama: Path, tmp_path: Path, name: str) -> None:
    whole = work_folder(tmp_path / "whole", llama, name)
    expected = outcome(whole, train_on_ranks(whole, 1, 2048))
    for ranks in (2, 3):
        folder = work_folder(tmp_path / str(ranks), llama, name, ranks, **SHARDED)
        status, events = run_process(folder)
        assert status == 0, (folder / "trainer.log").read_text()
        assert any(re.fullmatch(r"Each of the \d devices .*", message) for message in messages(events))
        assert outcome(folder, events) == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"method": dpo_method(**{**STEPS, "batch_size": 1})},  # one rank idles
        {"quantization": "int8"},
        {"adapter": {"r": 4, "use_dora": True}},
        {"adapter": {"r": 4, "use_dora": True}, "quantization": "int8"},
        {"quantization": "none"},
        {"quantization": "nf4", "double_quantization": False},
        {"adapter": {"r": 4, "modules_to_save": ["embed_tokens", "lm_head"]}},
        {"method": dpo_method(reference_model="other", **STEPS)},
        {"method": dpo_method(activation_checkpointing=True, **STEPS)},
    ],
    ids=str,
)
def test_other_settings_have_the_same_bytes_with_a_sharded_base(
    llama: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    outcomes = []
    for ranks in (1, 2):
        settings = {**TRAININGS["SFT, then DPO"][0], **fields, **SHARDED}
        folder = work_folder(tmp_path / str(ranks), llama, "SFT, then DPO", ranks, **settings)
        if "reference_model" in str(fields):
            (folder / "reference").mkdir()
            make_tiny_model(folder / "reference" / "base", seed=1)
        status, events = run_process(folder)
        assert status == 0, (folder / "trainer.log").read_text()
        assert (DIVIDED in messages(events)) == (ranks == 2)
        outcomes.append(outcome(folder, events))
    assert outcomes[0] == outcomes[1]


def test_a_training_that_is_killed_with_a_sharded_base_goes_on_with_a_whole_one(llama: Path, tmp_path: Path) -> None:
    alone = work_folder(tmp_path / "alone", llama, "KTO")
    weights, metrics = outcome(alone, train_on_ranks(alone, 1, 2048))
    folder = work_folder(tmp_path / "run", llama, "KTO", 3, **SHARDED)
    with TrainerProcess(folder) as process:
        next(event for event in process.events() if event["kind"] == "checkpoint")
        process.send_signal(signal.SIGKILL)
        process.status()
    resumed = work_folder(tmp_path / "resumed", llama, "KTO")
    (folder / "checkpoints" / "step-1").rename(resumed / "resume")
    result, rest = outcome(resumed, train_on_ranks(resumed, 1, 2048))
    assert result == weights and rest == metrics[-len(rest) :]


def test_a_base_is_sharded_by_itself_if_it_would_fill_a_device(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    for free, sharded in ((10**9, False), (10**5, True)):
        monkeypatch.setattr(loading, "free_bytes", lambda device, free=free: free)
        folder = work_folder(tmp_path / str(free), llama, "AOT", adapter=adapter)
        assert (DIVIDED in messages(train_on_ranks(folder, 2, 2048))) == sharded


# -- refusals ------------------------------------------------------------------------------------------------------------


def test_untrained_control_tokens_are_found_in_a_sharded_base(tmp_path: Path) -> None:
    """The embeddings share their buffer with the head, which the check before has used."""
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path / "model"))
    model.get_input_embeddings().weight.data[:2] = 0.0
    model.save_pretrained(tmp_path / "model")
    for ranks in (1, 2):
        folder = work_folder(tmp_path / str(ranks), tmp_path / "model", "AOT", ranks, **SHARDED)
        status, events = run_process(folder)
        assert status == 0, (folder / "trainer.log").read_text()
        assert any("control tokens that the base never learned" in message for message in messages(events))


def test_a_base_whose_texts_are_computed_one_by_one_is_not_sharded() -> None:
    adapter = {"r": 4, "target_modules": ["q_proj"]}

    def run(ranks: ThreadRanks) -> None:
        with LOADING:
            policy = make_policy("llama", {}, io.StringIO(), Shards(ranks), adapter=adapter)
        policy.one_by_one = True
        check(policy, ROWS, Events(io.StringIO()), ranks)

    with pytest.raises(UserError, match="cannot be sharded: its texts are computed one by one") as caught:
        on_ranks(2, run)
    assert caught.value.param == "parallel.shard"


def test_layers_that_share_a_part_of_their_weights_are_not_sharded() -> None:
    model = make_policy("llama", {}, io.StringIO(), adapter="none").causal
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    with pytest.raises(ValueError, match="share a part of their weights"):
        Shards().finish(model, ends=True)

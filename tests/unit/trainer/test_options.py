"""Options of a training: each does what it says, and no more."""

import io
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.helpers.trainer import (
    ROWS,
    Event,
    Record,
    disturb,
    dpo_method,
    gradients,
    load,
    make_pairs,
    make_run,
    make_work_folder,
    of_kind,
    pack_of,
    parse,
    read_csv,
    run_in_process,
    sft_method,
    training_metrics,
)
from worker.trainer import joins, loading, memory
from worker.trainer.errors import UserError
from worker.trainer.loop import stages_of, train
from worker.trainer.model import Policy, Scores
from worker.trainer.packing import Pack, Packing
from worker.trainer.plan import Stage

PAIRS = make_pairs(12)
PLAIN = {"adapter": {"r": 4}, "quantization": "none", "seed": 0, "validation_split": 0.0}
SETTINGS = {"max_steps": 4, "batch_size": 4, "learning_rate": 0.005}
RANKED = [
    {"prompt": pair["prompt"], "responses": [pair["chosen"], pair["rejected"], pair["chosen"] + " or so"]}
    for pair in PAIRS
]
LABELLED = [
    {"prompt": pair["prompt"], "completion": pair["chosen" if k % 2 else "rejected"], "label": k % 2 == 1}
    for k, pair in enumerate(PAIRS)
]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "output" / "adapter_model.safetensors")


def messages(events: list[Event]) -> str:
    return "\n".join(event["message"] for event in of_kind(events, "message"))


# -- the reference --------------------------------------------------------------------------------------------


def run_with_cache(folder: Path, cache: Path) -> list[Event]:
    stream = io.StringIO()
    train(make_run(folder, stream, cache))
    return parse(stream)


def test_a_beta_sweep_computes_the_reference_once_and_a_hit_changes_no_bit(llama: Path, tmp_path: Path) -> None:
    """The seed and the rank of a fresh adapter do not change the reference either."""
    events_of_jobs, adapters = [], []
    for number, (beta, rank, cache) in enumerate(
        [(0.05, 4, "one"), (0.5, 4, "one"), (0.5, 8, "one"), (0.5, 4, "other")]
    ):
        method = dpo_method(**SETTINGS, beta=beta)
        spec = {**PLAIN, "adapter": {"r": rank}, "seed": rank, "validation_split": 0.25, "method": method}
        folder = make_work_folder(tmp_path / str(number), llama, spec, train=PAIRS)
        events_of_jobs.append(run_with_cache(folder, tmp_path / cache))
        adapters.append((folder / "output" / "adapter_model.safetensors").read_bytes())
    computed = [[event["key"].split("/")[0] for event in of_kind(events, "made")] for events in events_of_jobs]
    # The seed decides which rows are held out, so the third job has other rows. The file's tokens stay the same.
    assert computed == [["tokens", "reference", "reference"], [], ["reference", "reference"], computed[0]]
    assert "Reference log-probs found in the cache" in messages(events_of_jobs[1])
    assert "Reference log-probs computed" in messages(events_of_jobs[3])
    assert adapters[1] == adapters[3] != adapters[0]


def test_the_references_cache_key_changes_after_sft_and_with_other_rows(llama: Path, tmp_path: Path) -> None:
    keys = []
    sft = {"hyperparameters": {"max_steps": 2, "learning_rate": 0.01}}
    for number, (pairs, stage) in enumerate([(PAIRS, None), (PAIRS[1:], None), (PAIRS, sft)]):
        spec = {**PLAIN, "sft": stage, "method": dpo_method(**SETTINGS)}
        events = run_in_process(make_work_folder(tmp_path / str(number), llama, spec, train=pairs))
        keys.append(next(event["key"] for event in of_kind(events, "made") if event["key"].startswith("reference")))
    assert len(set(keys)) == 3


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_the_digest_covers_the_scales_of_quantised_layers(llama: Path, quantization: str) -> None:
    policy = load(llama, quantization=quantization)
    with torch.no_grad():
        policy.score(pack_of(policy, ROWS, [0]))  # int8 moves its scales with the first pass
    before = policy.digest()
    assert policy.digest() == before
    layer = policy.causal.model.layers[0].mlp.up_proj.base_layer
    if quantization == "nf4":
        layer.weight.quant_state.absmax += 1
    else:
        (layer.state if layer.state.SCB is not None else layer.weight).SCB.mul_(2)
    assert policy.digest() != before


def test_another_model_can_be_the_reference(llama: Path, tmp_path: Path) -> None:
    """Log-ratios are measured from it. Before the first update they are 0 only if it is the policy itself."""
    sft = make_work_folder(tmp_path / "sft", llama, {**PLAIN, "method": sft_method(**SETTINGS)}, train=PAIRS)
    run_in_process(sft)
    logratios = {}
    for name, start in (("itself", None), ("another", sft / "output")):
        spec = {**PLAIN, "method": dpo_method(**SETTINGS, reference_model="some/model")}
        folder = make_work_folder(tmp_path / name, llama, spec, train=PAIRS)
        (folder / "reference").mkdir()
        (folder / "reference" / "base").symlink_to(llama, target_is_directory=True)
        if start is not None:
            (folder / "reference" / "start").symlink_to(start, target_is_directory=True)
        logratios[name] = training_metrics(run_in_process(folder), "logratios/chosen", "dpo")[0]
    assert logratios["itself"] == pytest.approx(0, abs=1e-4)
    # The policy is a fresh adapter. SFT made the chosen answers likelier in the reference.
    assert logratios["another"] < -1


def test_another_model_stays_the_reference_after_an_interruption_in_sft(llama: Path, tmp_path: Path) -> None:
    spec = {**PLAIN, "sft": {"hyperparameters": {**SETTINGS, "checkpoint_every": 2}}}
    spec["method"] = dpo_method(**SETTINGS, reference_model="some/model")

    def folder(name: str) -> Path:
        work = make_work_folder(tmp_path / name, llama, spec, train=PAIRS)
        (work / "reference").mkdir()
        (work / "reference" / "base").symlink_to(llama, target_is_directory=True)
        return work

    straight = folder("straight")
    events = run_in_process(straight)
    resumed = folder("resumed")
    shutil.copytree(straight / of_kind(events, "checkpoint")[0]["path"], resumed / "resume")
    ratios = training_metrics(run_in_process(resumed), "logratios/chosen", "dpo")
    assert ratios == training_metrics(events, "logratios/chosen", "dpo")
    assert abs(ratios[0]) > 1  # the SFT stage has moved the policy away from it


def test_a_reference_with_another_tokenizer_is_refused(llama: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(llama, other)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(other)
    spec = {**PLAIN, "method": dpo_method(**SETTINGS, reference_model="some/model")}
    folder = make_work_folder(tmp_path / "work", llama, spec, train=PAIRS)
    (folder / "reference").mkdir()
    (folder / "reference" / "base").symlink_to(other, target_is_directory=True)
    with pytest.raises(UserError, match="tokenizer"):
        run_in_process(folder)


# -- what is trained, and how ---------------------------------------------------------------------------------


def test_ranked_lists_train_plackett_luce_as_lists_and_dpo_as_pairs(llama: Path, tmp_path: Path) -> None:
    rows = {}
    for loss in ("plackett_luce", "sigmoid"):
        spec = {**PLAIN, "method": dpo_method(**SETTINGS, loss=loss)}
        events = run_in_process(make_work_folder(tmp_path / loss, llama, spec, train=RANKED))
        (stage,) = of_kind(events, "stage")
        rows[loss] = stage["rows"]
        losses = training_metrics(events, "loss", "dpo")
        assert losses[-1] < losses[0]
    assert rows == {"plackett_luce": 12, "sigmoid": 12 * 3}


@pytest.mark.parametrize("records", [LABELLED, PAIRS], ids=["labelled", "pairs"])
def test_kto_trains_on_labelled_answers_and_on_pairs(llama: Path, tmp_path: Path, records: list[Record]) -> None:
    spec = {**PLAIN, "validation_split": 0.25, "method": dpo_method(**SETTINGS, loss="kto")}
    events = run_in_process(make_work_folder(tmp_path, llama, spec, train=records))
    assert training_metrics(events, "loss", "dpo")[0] == pytest.approx(0.5, abs=1e-6)  # 1 − σ(0)
    assert training_metrics(events, "eval/kl", "dpo")[0] == pytest.approx(0, abs=1e-4)
    (stage,) = of_kind(events, "stage")
    assert stage["rows"] + stage["validation_rows"] == (12 if records is LABELLED else 24)


def test_sft_on_labelled_answers_trains_on_the_good_ones(llama: Path, tmp_path: Path) -> None:
    events = run_in_process(
        make_work_folder(tmp_path, llama, {**PLAIN, "method": sft_method(**SETTINGS)}, train=LABELLED)
    )
    (stage,) = of_kind(events, "stage")
    assert stage["rows"] == sum(bool(record["label"]) for record in LABELLED)


@pytest.mark.parametrize("adapter", [{"r": 4}, "none"], ids=["adapter", "full"])
def test_a_reward_model_loads_with_transformers_and_gives_the_rewards_of_training(
    llama: Path, tmp_path: Path, adapter: Any
) -> None:
    settings = {**SETTINGS, "learning_rate": 0.002}
    spec = {
        **PLAIN,
        "adapter": adapter,
        "validation_split": 0.25,
        "method": dpo_method(**settings, loss="reward_model"),
    }
    folder = make_work_folder(tmp_path, llama, spec, train=PAIRS)
    events = run_in_process(folder)
    assert training_metrics(events, "loss", "dpo")[-1] < training_metrics(events, "loss", "dpo")[0]

    output = folder / "output"
    model = AutoModelForSequenceClassification.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert model.config.num_labels == 1

    def reward(text: str) -> float:
        with torch.no_grad():
            return float(model(**tokenizer(text + "</s>", return_tensors="pt")).logits)

    entries = [json.loads(line) for line in (output / "validation_logps.jsonl").read_text().splitlines()]
    assert len(entries) == 3
    for entry in entries:
        pair = PAIRS[entry["line"] - 1]
        expected = [reward(pair["prompt"] + pair[side]) for side in ("chosen", "rejected")]
        assert entry["rewards"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    held_out = {entry["line"] for entry in entries}
    trained = [pair for line, pair in enumerate(PAIRS, 1) if line not in held_out]
    rewards = [reward(pair["prompt"] + pair[side]) for pair in trained for side in ("chosen", "rejected")]
    assert model.config.reward_mean == pytest.approx(sum(rewards) / len(rewards), rel=1e-3, abs=1e-5)
    # Two texts of different lengths in one padded batch: the end of the sequence is not read as padding.
    texts = [PAIRS[0]["prompt"] + "</s>", PAIRS[1]["prompt"] + PAIRS[1]["chosen"] + "</s>"]
    with torch.no_grad():
        batch = model(**tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")).logits[:, 0]
    assert batch.tolist() == pytest.approx([reward(text.removesuffix("</s>")) for text in texts], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}], ids=["dora", "rslora"])
def test_dora_and_rslora_train_and_start_at_the_reference(
    llama: Path, tmp_path: Path, options: dict[str, bool], quantization: str
) -> None:
    spec = {**PLAIN, "quantization": quantization, "adapter": {"r": 4, **options}, "method": dpo_method(**SETTINGS)}
    folder = make_work_folder(tmp_path, llama, spec, train=PAIRS)
    losses = training_metrics(run_in_process(folder), "loss", "dpo")
    assert losses[0] == pytest.approx(0.6931472, abs=1e-5)
    assert losses[-1] < losses[0]
    config = json.loads((folder / "output" / "adapter_config.json").read_text())
    assert all(config[name] for name in options)


def test_int8_trains_and_its_log_probs_are_near_the_bases(llama: Path, tmp_path: Path) -> None:
    from bitsandbytes.nn import Linear8bitLt

    exact, quantised = load(llama), load(llama, quantization="int8")
    assert sum(isinstance(module, Linear8bitLt) for module in quantised.model.modules()) == 14
    with torch.no_grad():
        exact_scores, quantised_scores = (
            policy.score(pack_of(policy, ROWS, [0, 1, 2])) for policy in (exact, quantised)
        )
    differences = (exact_scores.tokens.logps - quantised_scores.tokens.logps).abs()
    assert 1e-4 < differences.mean().item() < 0.2
    spec = {**PLAIN, "quantization": "int8", "method": dpo_method(**SETTINGS)}
    losses = training_metrics(run_in_process(make_work_folder(tmp_path, llama, spec, train=PAIRS)), "loss", "dpo")
    assert losses[-1] < losses[0] == pytest.approx(0.6931472, abs=1e-4)


def test_rmsprop_takes_the_first_step_of_torchs(llama: Path, tmp_path: Path) -> None:
    """The first step moves each weight by rate · g / (√(0.01 g²) + ε), which is ten times the rate."""
    settings = {"max_steps": 1, "batch_size": 12, "learning_rate": 1e-4, "warmup_ratio": 0.0, "optimizer": "rmsprop"}
    folder = make_work_folder(tmp_path, llama, {**PLAIN, "method": sft_method(**settings)}, train=PAIRS)
    start = load(llama, seed=0, adapter={"r": 4}).trainable()
    run_in_process(folder)
    distances = {name: (tensor - start[adapted(name)]).abs() for name, tensor in weights_of(folder).items()}
    b_distances = torch.cat([distance.flatten() for name, distance in distances.items() if "lora_B" in name])
    assert b_distances.median().item() == pytest.approx(1e-3, rel=1e-2)


def adapted(name: str) -> str:
    return name.replace("lora_A.weight", "lora_A.default.weight").replace("lora_B.weight", "lora_B.default.weight")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the 8-bit optimizers run on it")
def test_an_8_bit_optimizer_without_a_gpu_is_refused_and_the_error_names_the_option(
    llama: Path, tmp_path: Path
) -> None:
    spec = {**PLAIN, "method": sft_method(**SETTINGS, optimizer="adamw_8bit")}
    with pytest.raises(UserError) as caught:
        run_in_process(make_work_folder(tmp_path, llama, spec, train=PAIRS))
    assert (caught.value.code, caught.value.param) == (
        "optimizer_needs_gpu",
        "method.supervised.hyperparameters.optimizer",
    )


def test_dft_weighs_each_token_by_its_probability(llama: Path, tmp_path: Path) -> None:
    losses = {}
    for loss in ("nll", "dft"):
        spec = {**PLAIN, "method": sft_method(max_steps=1, batch_size=12, loss=loss)}
        events = run_in_process(make_work_folder(tmp_path / loss, llama, spec, train=PAIRS))
        (losses[loss],) = training_metrics(events, "loss")
    assert 0 < losses["dft"] < losses["nll"]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_switching_recomputation_on_and_off_leaves_no_hooks_behind(request: pytest.FixtureRequest, family: str) -> None:
    policy = load(request.getfixturevalue(family))
    hooks = len(policy.causal.get_input_embeddings()._forward_hooks)
    for enabled in (True, False, True, False):
        policy.recompute_activations(enabled)
        policy.recompute_activations(enabled)
    assert len(policy.causal.get_input_embeddings()._forward_hooks) == hooks


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_recomputed_activations_change_no_bit_and_take_less_memory(request: pytest.FixtureRequest, family: str) -> None:
    policy = disturb(load(request.getfixturevalue(family)))
    pack = pack_of(policy, ROWS, [0, 1, 2])
    gradients_by_mode, bytes_by_mode = [], []
    for enabled in (False, True):
        policy.recompute_activations(enabled)
        bytes_by_mode.append(memory.activation_bytes(policy, pack))
        gradients_by_mode.append(gradients(policy, policy.score(pack).responses.sum()))
    for name, gradient in gradients_by_mode[0].items():
        assert torch.equal(gradient, gradients_by_mode[1][name]), name
    assert bytes_by_mode[1] < 0.5 * bytes_by_mode[0]


@pytest.mark.parametrize(("free", "recomputed"), [(10**12, False), (1, True)])
def test_activations_are_recomputed_where_they_would_not_fit(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, recomputed: bool
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    spec = {**PLAIN, "method": dpo_method(**SETTINGS)}
    events = run_in_process(make_work_folder(tmp_path, llama, spec, train=PAIRS))
    assert ("Activations are recomputed" in messages(events)) == recomputed


def test_the_activation_bytes_of_a_pass_grow_with_the_pack(llama: Path) -> None:
    policy = load(llama)
    one_row, three_rows = (
        memory.activation_bytes(policy, pack_of(policy, ROWS, numbers)) for numbers in ([0], [0, 1, 2])
    )
    tokens = [pack_of(policy, ROWS, numbers).tokens for numbers in ([0], [0, 1, 2])]
    hidden, layers = 64, 2
    assert one_row > 4 * hidden * layers * tokens[0]
    assert three_rows / one_row == pytest.approx(tokens[1] / tokens[0], rel=0.5)


# -- when to stop ---------------------------------------------------------------------------------------------


def test_early_stopping_keeps_the_best_weights(llama: Path, tmp_path: Path) -> None:
    """The learning rate overshoots. The validation gets worse after a few steps, and the job goes back to the best."""
    settings = {
        "max_steps": 12, "batch_size": 9, "learning_rate": 0.03, "lr_scheduler": "constant", "warmup_ratio": 0.0,
        "eval_every": 1, "early_stopping": {"metric": "eval/loss", "patience": 2},
    }  # fmt: skip
    spec = {**PLAIN, "validation_split": 0.25, "method": dpo_method(**settings)}
    folder = make_work_folder(tmp_path, llama, spec, train=PAIRS)
    events = run_in_process(folder)
    losses = training_metrics(events, "eval/loss", "dpo")
    best = min(range(len(losses)), key=losses.__getitem__)
    assert 0 < best == len(losses) - 3 < 9  # the patience allows two more steps
    assert f"keeps step {best}" in messages(events)
    entries = [json.loads(line) for line in (folder / "output" / "validation_logps.jsonl").read_text().splitlines()]
    margins = [
        0.1 * (entry["logps"][0] - entry["logps"][1] - entry["reference_logps"][0] + entry["reference_logps"][1])
        for entry in entries
    ]
    final = torch.nn.functional.softplus(-torch.tensor(margins)).mean().item()
    assert final == pytest.approx(losses[best], rel=1e-5)
    rows = read_csv(folder / "output" / "metrics.csv")
    assert len(rows) == len(losses)
    assert f"| eval/loss | {final:.6g} |" in (folder / "output" / "README.md").read_text(), (
        "the card reports the weights that are kept"
    )
    last = of_kind(events, "checkpoint")[-1]["path"]
    last_weights = load_file(folder / last / "model" / "adapter_model.safetensors")
    for name, kept_weights in weights_of(folder).items():
        assert torch.equal(last_weights[name], kept_weights), (
            "a stage's last checkpoint holds the weights that the stage leaves"
        )


def test_early_stopping_needs_validation_rows(llama: Path, tmp_path: Path) -> None:
    """A twentieth of three rows rounds to no row."""
    spec = {**PLAIN, "validation_split": 0.05, "method": dpo_method(**SETTINGS, early_stopping={})}
    with pytest.raises(UserError) as caught:
        run_in_process(make_work_folder(tmp_path, llama, spec, train=PAIRS[:3]))
    assert caught.value.param == "method.dpo.hyperparameters.early_stopping"


@pytest.mark.parametrize("eval_every", [1, 9], ids=["seen in validation", "seen in training"])
def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eval_every: int
) -> None:
    """The third update breaks the weights. Those after the second are written, although no checkpoint was due."""
    monkeypatch.setattr(Stage, "learning_rate", lambda stage, step: 1e-3 if step < 2 else 1e30)
    method = dpo_method(max_steps=9, batch_size=4, checkpoint_every=9, eval_every=eval_every)
    spec = {**PLAIN, "validation_split": 0.25, "method": method}
    folder = make_work_folder(tmp_path / "work", llama, spec, train=PAIRS)
    stream = io.StringIO()
    with pytest.raises(UserError) as caught:
        train(make_run(folder, stream))
    assert caught.value.code == "loss_not_finite"
    assert "Step 2 is the last" in caught.value.message
    (checkpoint,) = of_kind(parse(stream), "checkpoint")
    assert checkpoint["step"] == 2
    monkeypatch.undo()
    spec = {**PLAIN, "method": dpo_method(**SETTINGS)}
    restarted = make_work_folder(tmp_path / "again", llama, spec, train=PAIRS)
    (restarted / "start").symlink_to(folder / checkpoint["path"] / "model", target_is_directory=True)
    assert training_metrics(run_in_process(restarted), "loss", "dpo")[0] == pytest.approx(0.6931472, abs=1e-4)


# -- memory ---------------------------------------------------------------------------------------------------


def out_of_memory(times: int) -> tuple[list[int], Callable[..., Scores]]:
    """(budgets it was called with, a `Policy.score` that runs out of memory at its first `times` budgets)"""
    budgets: list[int] = []
    score = Policy.score

    def failing(policy: Policy, pack: Pack, **options: Any) -> Scores:
        budgets.append(policy.launch_tokens)
        if torch.is_grad_enabled() and len({*budgets}) <= times:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score(policy, pack, **options)

    return budgets, failing


def test_out_of_memory_halves_the_budget_and_repeats_the_step(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SETTINGS, "max_steps": 1, "activation_checkpointing": True}
    spec = {**PLAIN, "method": dpo_method(**settings)}
    monkeypatch.setattr(loading, "Packing", partial(Packing, segment_tokens=16))
    monkeypatch.setattr(joins, "check", lambda *_: None)  # it would find no memory either, and let packs be small
    undisturbed = run_in_process(make_work_folder(tmp_path / "undisturbed", llama, spec, train=PAIRS))
    budgets, failing = out_of_memory(times=1)
    monkeypatch.setattr(Policy, "score", failing)
    disturbed = run_in_process(make_work_folder(tmp_path / "disturbed", llama, spec, train=PAIRS))
    whole, half = sorted(set(budgets), reverse=True)
    assert whole == 2048 and half < whole / 2  # half of what was in the pack
    warnings = [event["message"] for event in of_kind(disturbed, "message") if "Out of memory" in event["message"]]
    assert warnings == [f"Out of memory: packs of {half} tokens from now on."]
    for name in ("loss", "grad_norm"):
        expected = training_metrics(undisturbed, name, "dpo")
        assert training_metrics(disturbed, name, "dpo") == pytest.approx(expected, rel=1e-5)


def test_a_row_that_cannot_fit_fails_the_job_and_names_max_length(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Policy, "score", out_of_memory(times=100)[1])
    spec = {**PLAIN, "method": dpo_method(**SETTINGS, activation_checkpointing=True)}
    with pytest.raises(UserError) as caught:
        run_in_process(make_work_folder(tmp_path, llama, spec, train=PAIRS))
    assert (caught.value.code, caught.value.param) == ("out_of_memory", "method.dpo.hyperparameters.max_length")


# -- metrics --------------------------------------------------------------------------------------------------


def test_every_step_reports_the_fill_rate_of_its_packs_and_the_mfu(llama: Path, tmp_path: Path) -> None:
    events = run_in_process(make_work_folder(tmp_path, llama, {**PLAIN, "method": dpo_method(**SETTINGS)}, train=PAIRS))
    assert all(0 < value <= 1 for value in training_metrics(events, "fill_rate", "dpo"))
    assert all(0 < value < 1 for value in training_metrics(events, "mfu", "dpo"))
    (padded,) = Packing(1024, windows=(None,)).packs(ROWS, [0, 1, 2])
    assert padded.tokens / padded.slots == pytest.approx(sum(row.tokens for row in ROWS) / 1024)


def test_pairs_of_one_prompt_are_neighbours_but_do_not_fill_a_batch_alone(llama: Path, tmp_path: Path) -> None:
    pairs = [{**pair, "prompt": "same"} if k % 2 else pair for k, pair in enumerate(make_pairs(40))]
    spec = {**PLAIN, "method": dpo_method(batch_size=8, n_epochs=1)}
    folder = make_work_folder(tmp_path, llama, spec, train=pairs)
    (stage,) = stages_of(make_run(folder))
    drawn = [stage.batch(step) for step in range(stage.steps)]
    assert sorted(number for batch in drawn for number in batch) == list(range(40))
    for batch in drawn:
        places_of_same_prompt = [k for k, number in enumerate(batch) if number % 2]
        # Groups of two (a quarter of the batch) stand side by side.
        assert all(
            any(abs(k - other) == 1 for other in places_of_same_prompt if other != k)
            for k in places_of_same_prompt[1:-1]
        )


@pytest.mark.filterwarnings("ignore")  # torch.compile warns of itself
def test_compiled_layers_have_the_same_log_probs(llama: Path) -> None:
    policy = disturb(load(llama))
    with torch.no_grad():  # compiling the backward pass too takes twice as long, and test_cuda.py covers it
        plain = policy.score(pack_of(policy, ROWS, [0, 1, 2])).responses
        policy.compiled = True
        compiled = policy.score(pack_of(policy, ROWS, [0, 1, 2])).responses
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=0)


# -- precision ------------------------------------------------------------------------------------------------


def test_double_quantization_decides_whether_the_4_bit_scales_are_quantised(llama: Path) -> None:
    nested_scales = {}
    for double_quantization in (None, True, False):
        policy = load(llama, quantization="nf4", double_quantization=double_quantization)
        layers = [module for module in policy.model.modules() if isinstance(module, Linear4bit)]
        nested_scales[double_quantization] = {layer.weight.quant_state.nested for layer in layers}
    assert nested_scales == {None: {True}, True: {True}, False: {False}}


def test_half_precision_scales_its_losses_and_no_gradient_vanishes(llama: Path) -> None:
    """As on a GPU without bfloat16: autocast in float16, whose smallest number is 6e-8."""
    gradients_by_dtype: dict[torch.dtype | None, dict[str, torch.Tensor]] = {}
    for dtype in (None, torch.float16):
        policy = disturb(load(llama, method=sft_method()))
        policy.autocast_dtype = dtype
        gradients_by_scale = {}
        for scale in (policy.loss_scales[0], 1.0):
            policy.loss_scale = scale
            tiny = 1e-6 * policy.score(pack_of(policy, ROWS, [0, 1, 2])).responses.mean()
            gradients_by_scale[scale] = {
                name: gradient / scale for name, gradient in gradients(policy, scale * tiny).items()
            }
        gradients_by_dtype[dtype] = gradients_by_scale[policy.loss_scales[0]]
        if dtype is not None:
            shares_of_zeros = {
                name: (gradient == 0).float().mean() for name, gradient in gradients_by_scale[1.0].items()
            }
            assert max(shares_of_zeros.values()) > 0.5, "without a scale, gradients vanish"
    for name, exact in gradients_by_dtype[None].items():
        assert (gradients_by_dtype[torch.float16][name] - exact).norm() < 0.05 * exact.norm(), name


def test_a_scale_that_overflows_is_lowered_and_changes_no_step(llama: Path, tmp_path: Path) -> None:
    """Scales are exact powers of two, so each of them gives the same step."""
    results = []
    for number, scales in enumerate([(1.0,), (2.0**14, 1.0), (2.0**140, 2.0**9, 1.0)]):
        folder = make_work_folder(
            tmp_path / str(number), llama, {**PLAIN, "method": dpo_method(**SETTINGS)}, train=PAIRS
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Policy, "loss_scales", scales)
            run_in_process(folder)
        results.append(weights_of(folder))
    for name, expected in results[0].items():
        for weights in results[1:]:
            torch.testing.assert_close(weights[name], expected, rtol=1e-5, atol=1e-7)


# -- several files --------------------------------------------------------------------------------------------


def test_several_files_are_one_training_set(llama: Path, tmp_path: Path) -> None:
    """No prompt is on both sides of the split, whichever file it is in. Each validation row names its file."""
    more = [*make_pairs(10, seed=5), *PAIRS[:4]]
    spec = {
        **PLAIN, "validation_split": 0.3, "more_training_files": ["more.jsonl"],
        "method": dpo_method(**SETTINGS),
    }  # fmt: skip
    folder = make_work_folder(tmp_path, llama, spec, train=PAIRS, more=more)
    run = make_run(folder)
    train(run)
    (stage,) = stages_of(run)
    assert len(stage.train) + len(stage.validation) == len(PAIRS) + len(more)
    assert set(stage.train.files) == set(stage.validation.files) == {0, 1}
    assert not set(stage.train.groups.tolist()) & set(stage.validation.groups.tolist())
    files: dict[str, list[dict[str, str]]] = {"train.jsonl": PAIRS, "more.jsonl": more}
    entries = [json.loads(line) for line in (folder / "output" / "validation_logps.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(llama)
    prompts = sorted(tokenizer.decode(row.prompt, skip_special_tokens=True) for row in stage.validation)
    assert prompts == sorted(files[entry["file"]][entry["line"] - 1]["prompt"] for entry in entries)
    assert "train.jsonl, more.jsonl" in (folder / "output" / "README.md").read_text()

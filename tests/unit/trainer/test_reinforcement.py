"""Reinforcement: its losses against TRL and closed forms, the optimum that theory knows, and runs that end and resume."""

import json
import math
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from trl import GRPOTrainer, RLOOTrainer

from app.errors import describe_validation_error
from app.spec.datasets.example import Example
from app.spec.datasets.rendering import Rendering
from app.spec.graders.schemas import StringCheck
from app.spec.hyperparameters import DPOHyperparameters, ReinforcementHyperparameters
from app.spec.job import JobSpec
from tests.helpers.trainer import (
    disturb,
    dpo_method,
    load,
    make_pairs,
    make_run,
    make_work_folder,
    of_kind,
    run_in_process,
    run_process,
    training_metrics,
)
from worker.model_files import point_to
from worker.trainer import decoding, plan, rollouts, sampling, weights
from worker.trainer.averages import Averages
from worker.trainer.data import Recipe, Response, Row
from worker.trainer.dataset import Rows
from worker.trainer.errors import Stopped, UserError
from worker.trainer.grading import Exercise, Grading
from worker.trainer.launcher import Launcher
from worker.trainer.loop import train
from worker.trainer.methods.preference import Preference
from worker.trainer.methods.reinforcement import Reinforcement
from worker.trainer.model import Policy
from worker.trainer.objectives import reinforcement as objectives
from worker.trainer.packing import TREE_TOKENS
from worker.trainer.ranks import Ranks
from worker.trainer.reference import References, compute
from worker.trainer.reward import RewardModel
from worker.trainer.rollouts import Answer
from worker.trainer.sampling import Prompt
from worker.trainer.tasks import Task, Tasks

CHECK = {
    "type": "string_check", "name": "exact", "input": "{{sample.output_text}}", "reference": "{{item.answer}}",
    "operation": "like",
}  # fmt: skip
SETTINGS = {
    "batch_size": 6, "samples": 4, "max_tokens": 5, "max_steps": 6, "learning_rate": 5e-3, "checkpoint_every": 1,
    "eval_every": 3, "warmup_ratio": 0.0,
}  # fmt: skip
QUESTIONS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": f"{number}. the cat?"}], "answer": "e" if number % 2 else "a"}
    for number in range(20)
]
ALGORITHMS = ("rloo", "grpo", "ppo", "online_dpo")


def spec(
    grader: dict[str, Any] = CHECK, fields: dict[str, Any] | None = None, **hyperparameters: Any
) -> dict[str, Any]:
    settings = {"grader": grader, "hyperparameters": {**SETTINGS, **hyperparameters}}
    method = {"type": "reinforcement", "reinforcement": settings}
    return {"method": method, "seed": 1, "quantization": "none", "adapter": {"r": 4}, **(fields or {})}


def adapter(folder: Path) -> bytes:
    return (folder / "output" / "adapter_model.safetensors").read_bytes()


# -- losses ----------------------------------------------------------------------------------------------------


class Drawn:
    """Log-probs of four answers to each of three prompts, of up to seven tokens, and rewards."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.rewards, self.mask = random(3, 4), torch.ones(12, 7, dtype=torch.float64)
        for k, length in enumerate((7, 3, 5, 1, 2, 7, 4, 6, 1, 1, 5, 3)):
            self.mask[k, length:] = 0
        self.logps = random(12, 7) - 2
        self.old, self.reference = self.logps + 0.3 * random(12, 7), self.logps + 0.3 * random(12, 7)
        self.logps.requires_grad_()

    def flat(self, values: Tensor) -> Tensor:
        return values[self.mask.bool()]

    def sums(self, values: Tensor) -> Tensor:
        return (values * self.mask).sum(1)

    def by_trl(self, trainer: type, advantages: Tensor, **fields: Any) -> tuple[Tensor, Tensor]:
        """(loss, gradient of the log-probs) by TRL's own code."""
        accelerator = SimpleNamespace(
            reduce=lambda values, **_: values, gather=lambda values: values, num_processes=1,
            gather_for_metrics=lambda values: values,
        )  # fmt: skip
        logps = self.logps.detach().clone().requires_grad_()
        fake = SimpleNamespace(
            _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps), None),
            aux_loss_enabled=False, epsilon_low=0.2, epsilon_high=0.2, accelerator=accelerator,
            model=SimpleNamespace(training=True), _metrics=defaultdict(lambda: defaultdict(list)), **fields,
        )  # fmt: skip
        ids = torch.zeros(12, 7, dtype=torch.long)
        inputs = {
            "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": self.mask,
            "advantages": advantages, "old_logps": self.sums(self.old), "old_per_token_logps": self.old,
            "ref_per_token_logps": self.reference, "num_items_in_batch": self.mask.sum(),
        }  # fmt: skip
        loss = trainer._compute_loss(cast(Any, fake), None, inputs)  # type: ignore[attr-defined]
        (gradient,) = torch.autograd.grad(loss, logps)
        return loss.detach(), self.flat(gradient)

    def ours(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = torch.autograd.grad(loss, self.logps)
        return loss.detach(), self.flat(gradient)


def test_the_loss_of_rloo_is_that_of_trl() -> None:
    drawn = Drawn()
    shaped = drawn.rewards - 0.05 * drawn.sums(drawn.old - drawn.reference).view(3, 4)
    advantages = objectives.leave_one_out(shaped)
    for row, expected in zip(shaped, advantages, strict=True):
        for k in range(4):
            others = [float(row[j]) for j in range(4) if j != k]
            assert float(expected[k]) == pytest.approx(float(row[k]) - sum(others) / 3, abs=1e-12)
    logratios = drawn.sums(drawn.logps - drawn.old)
    ours = drawn.ours(objectives.clipped(logratios, advantages.flatten(), 0.2).mean())
    assert objectives.is_clipped(logratios, advantages.flatten(), 0.2).any()
    for own, theirs in zip(ours, drawn.by_trl(RLOOTrainer, advantages.flatten()), strict=True):
        torch.testing.assert_close(own, theirs, rtol=0, atol=1e-12)


def test_the_loss_of_grpo_is_that_of_trl() -> None:
    drawn = Drawn()
    advantages = objectives.standardised(drawn.rewards)
    for row, expected in zip(drawn.rewards.tolist(), advantages.tolist(), strict=True):
        mean = sum(row) / 4
        std = math.sqrt(sum((value - mean) ** 2 for value in row) / 3)
        assert expected == pytest.approx([(value - mean) / (std + 1e-4) for value in row], abs=1e-12)
    by_token = advantages.flatten()[:, None].expand(12, 7)
    losses = objectives.clipped(drawn.logps - drawn.old, by_token, 0.2)
    losses = losses + 0.04 * objectives.k3(drawn.logps, drawn.reference)
    ours = drawn.ours((drawn.sums(losses) / drawn.mask.sum(1)).mean())
    options = {
        "beta": 0.04, "loss_type": "grpo", "importance_sampling_level": "token", "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None, "use_vllm": False, "current_gradient_accumulation_steps": 1,
        "args": SimpleNamespace(delta=None, use_bias_correction_kl=False), "_entropy_bonus_enabled": False,
    }  # fmt: skip
    theirs = drawn.by_trl(GRPOTrainer, advantages.flatten(), **options)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-12)


def test_ppos_advantages_are_the_decayed_sums_of_their_definition() -> None:
    """δ_t = r_t + V_{t+1} − V_t and A_t = Σ_k λ^k δ_{t+k}. With λ = 1 they are what is still to come, minus V."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    deltas = [float(rewards[t] + (values[t + 1] if t < 8 else 0) - values[t]) for t in range(9)]
    for decay in (0.0, 0.7, 1.0):
        expected = [sum(decay ** (k - t) * deltas[k] for k in range(t, 9)) for t in range(9)]
        assert objectives.generalised_advantages(rewards, values, decay).tolist() == pytest.approx(expected, abs=1e-12)
    whole = objectives.generalised_advantages(rewards, values, 1.0)
    torch.testing.assert_close(whole, rewards.flip(0).cumsum(0).flip(0) - values, rtol=0, atol=1e-12)


def test_the_value_head_may_move_by_the_clip_only() -> None:
    before, returns = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    values = torch.tensor([0.1, 0.5, -0.5, 3.0], dtype=torch.float64, requires_grad=True)
    losses = objectives.value_loss(values, before, returns, 0.2)
    assert losses.tolist() == pytest.approx([0.9**2 / 2, 0.8**2 / 2, 1.5**2 / 2, 2.0**2 / 2])
    (gradient,) = torch.autograd.grad(losses.sum(), values)
    assert gradient.tolist() == pytest.approx([-0.9, 0.0, -1.5, 2.0])


# -- the method ------------------------------------------------------------------------------------------------


class Fixed(Tasks):
    """Tasks that are given."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        object.__setattr__(self, "given", tasks)

    def of(self, row: Row) -> Task:
        given: Sequence[Task] = cast(Any, self).given
        return given[row.line]


def method_on(policy: Policy, prompts: Sequence[Sequence[int]], **settings: Any) -> Reinforcement:
    """The method over prompts of token ids. Its grader is not asked."""
    hyperparameters = ReinforcementHyperparameters(**{"max_tokens": 5, **settings}).resolved(full=False)
    rows = Rows.of(Row(line, tuple(prompt), (Response((5,), (True,)),)) for line, prompt in enumerate(prompts))
    tasks = Fixed([Task(Prompt(tuple(prompt), ""), cast(Any, None), {}) for prompt in prompts])
    grader = StringCheck.model_validate(CHECK | {"operation": "eq"})
    exercise = Exercise(Grading(grader, Path(), []), tasks, tasks)
    method = Reinforcement(Launcher(policy), hyperparameters, rows, rows[:0], exercise, seed=3)
    method.begin(cast(Any, None))
    return method


def rewarded(monkeypatch: pytest.MonkeyPatch, reward: Callable[[Task, tuple[int, ...]], float | None]) -> None:
    """Give each answer this reward, by its tokens, instead of asking a grader."""
    write = rollouts.write_answers
    monkeypatch.setattr(rollouts, "text_of", lambda _policy, completion, *_: json.dumps(completion.ids))

    def graded(policy: Policy, launcher: Launcher, tasks: Sequence[Task], samples: int, *others: Any) -> list[Answer]:
        answers = write(policy, launcher, tasks, samples, *others)
        return [
            Answer(one.ids, one.ended, one.logp, one.text, reward(tasks[k // samples], one.ids), None if
                   reward(tasks[k // samples], one.ids) is not None else "no reward")
            for k, one in enumerate(answers)
        ]  # fmt: skip

    monkeypatch.setattr(rollouts, "write_answers", graded)


def plain_logps(policy: Policy, prompt: Sequence[int], ids: Sequence[int]) -> Tensor:
    """log π of each token of an answer, by the model's own forward pass."""
    with policy.own_attention_in_use():
        logits = policy.logits(torch.tensor([*prompt, *ids]))
    logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return logps.gather(1, torch.tensor(ids)[:, None]).squeeze(1)


def ppo_loss(
    policy: Policy, batch: Any, logps: list[Tensor], reference: list[Tensor], prompts: list[tuple[int, ...]]
) -> Tensor:
    """PPO's loss by its definition, with the hidden states of plain forward passes."""
    head, graded = cast(Any, policy.value_head), batch.graded
    lengths = [len(answer.ids) for answer in graded.answers]
    old, values = (torch.split(flat.double(), lengths) for flat in (graded.old.flat, graded.values.flat))
    advantages, returns = list[float](), list[float]()
    for k, (own, value) in enumerate(zip(old, values, strict=True)):
        costs = [-0.3 * float(own[t] - reference[k][t]) for t in range(lengths[k])]
        costs[-1] += float(graded.rewards.flatten()[k])
        deltas = [
            costs[t] + (float(value[t + 1]) if t + 1 < lengths[k] else 0) - float(value[t]) for t in range(lengths[k])
        ]
        found = [sum(0.95 ** (j - t) * deltas[j] for j in range(t, lengths[k])) for t in range(lengths[k])]
        advantages += found
        returns += [advantage + float(before) for advantage, before in zip(found, value, strict=True)]
    whitened = torch.tensor(advantages, dtype=torch.float64)
    whitened = ((whitened - whitened.mean()) / (whitened.std() + 1e-4)).float()
    total, place = torch.zeros(()), 0
    for k, answer in enumerate(graded.answers):
        with policy.own_attention_in_use():
            states = policy.body(input_ids=torch.tensor([[*prompts[k // 5], *answer.ids]]), use_cache=False)[0][0]
        now = (states[len(prompts[k // 5]) - 1 : -1] * head.weight[0]).sum(1)
        for t in range(lengths[k]):
            ratio, advantage = (logps[k][t] - old[k][t].float()).exp(), whitened[place]
            total = total - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            before = float(values[k][t])
            near = now[t].clamp(before - 0.2, before + 0.2)
            total = total + 0.1 * torch.maximum((now[t] - returns[place]) ** 2, (near - returns[place]) ** 2) / 2
            place += 1
    return total / place


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_gradient_is_that_of_the_formula(
    llama: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, updates: int
) -> None:
    """By plain forward passes over each answer. With several updates, the second has other weights than its answers."""
    rewarded(monkeypatch, lambda _, ids: (sum(ids) % 7) / 7 if ids[0] % 5 else 1.0)
    policy = disturb(load(llama, method=spec(algorithm=algorithm)["method"]))
    method = method_on(
        policy, [(5, 6, 7), (9, 8), (4,)], algorithm=algorithm, samples=5, updates_per_batch=updates, beta=0.3
    )
    head = policy.value_head
    if head is not None:
        head.weight.data.normal_(generator=torch.Generator().manual_seed(4))
    disturb(policy, 0.05, seed=8)  # the reference is the policy before
    method.gradient([0, 1, 2], Averages())
    batch = method._batch
    assert batch is not None
    if updates == 2:
        disturb(policy, 0.02, seed=9)
        method.after_step(1)
        for parameter in policy.trainable().values():
            parameter.grad = None
        method.gradient([0, 1, 2], Averages())
        assert method._batch is batch
    ours = {name: cast(Tensor, parameter.grad).clone() for name, parameter in policy.trainable().items()}
    # The formula, from plain log-probs.
    answers, prompts = batch.graded.answers, [(5, 6, 7), (9, 8), (4,)]
    logps = [plain_logps(policy, prompts[k // 5], answer.ids) for k, answer in enumerate(answers)]
    with weights.swapped(policy, method.anchor), torch.no_grad():
        reference = [plain_logps(policy, prompts[k // 5], answer.ids) for k, answer in enumerate(answers)]
    old = list(torch.split(batch.graded.old.flat, [len(answer.ids) for answer in answers]))
    if updates == 1:
        torch.testing.assert_close(torch.cat(old), torch.cat(logps).detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batch.graded.reference.flat, torch.cat(reference), rtol=1e-4, atol=1e-4)
    rewards = batch.graded.rewards
    total = torch.zeros(())
    if algorithm == "ppo":
        total = ppo_loss(policy, batch, logps, reference, prompts)
    for k in range(3):
        group = range(5 * k, 5 * k + 5)
        divergence = torch.tensor([float((old[j] - reference[j]).sum()) for j in group])
        if algorithm == "online_dpo":
            best, worst = 5 * k + int(rewards[k].argmax()), 5 * k + int(rewards[k].argmin())
            margin = (logps[best] - reference[best]).sum() - (logps[worst] - reference[worst]).sum()
            total = total - torch.nn.functional.logsigmoid(0.3 * margin) / 3
        for j in group if algorithm in ("rloo", "grpo") else ():
            values = rewards[k] - (0.3 * divergence if algorithm == "rloo" else 0)
            if algorithm == "rloo":
                others = [float(values[i]) for i in range(5) if i != j - 5 * k]
                advantage = float(values[j - 5 * k]) - sum(others) / 4
                ratio = (logps[j] - old[j]).sum().exp()
                total = total - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) / 15
            else:
                advantage = float((values[j - 5 * k] - values.mean()) / (values.std() + 1e-4))
                ratio, towards = (logps[j] - old[j]).exp(), reference[j] - logps[j]
                losses = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
                total = total + (losses + 0.3 * (towards.exp() - towards - 1)).mean() / 15
    trained = policy.trainable()
    expected = torch.autograd.grad(total, list(trained.values()))
    for (name, gradient), theirs in zip(ours.items(), expected, strict=True):
        torch.testing.assert_close(gradient, theirs, rtol=1e-3, atol=2e-4 * float(theirs.abs().max()), msg=name)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_prompt_that_cannot_be_graded_changes_nothing(
    llama: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    """The gradient is that of the other prompts alone. Too many such prompts end the training, with the reason."""
    rewarded(monkeypatch, lambda task, ids: None if task.prompt.ids == (9, 8) and ids[0] % 2 else sum(ids) % 3)
    gradients = []
    for prompts in ([(5, 6, 7), (4, 4), (9, 8)], [(5, 6, 7), (4, 4)]):
        policy = disturb(load(llama, method=spec(algorithm=algorithm)["method"]))
        method = method_on(policy, prompts, algorithm=algorithm, samples=4)
        averages = Averages()
        method.gradient(list(range(len(prompts))), averages)
        gradients.append([cast(Tensor, parameter.grad) for parameter in policy.trainable().values()])
        assert averages.means()["rollouts/ungraded"] == pytest.approx((len(prompts) - 2) / len(prompts))
        assert any(gradient.any() for gradient in gradients[-1])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    monkeypatch.undo()
    with pytest.raises(
        UserError, match=r"3 of 3 prompts of a step have an answer that could not be graded\. .*no 'answer'"
    ):
        monkeypatch.setattr(rollouts, "text_of", lambda *_: "text")
        policy = load(llama, method=spec(algorithm=algorithm)["method"])
        method_on(policy, [(5, 6), (9, 8), (4,)], algorithm=algorithm).gradient([0, 1, 2], Averages())


def test_rewards_that_are_all_equal_teach_nothing_without_a_price_of_divergence(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewarded(monkeypatch, lambda *_: 1.0)
    for algorithm in ("rloo", "grpo", "online_dpo"):  # PPO's value head learns from equal rewards too
        policy = disturb(load(llama))
        method = method_on(policy, [(5, 6), (9,)], algorithm=algorithm, beta=0.1 if algorithm == "online_dpo" else 0.0)
        averages = Averages()
        method.gradient([0, 1], averages)
        assert averages.means()["rollouts/without_signal"] == 1
        assert not any(cast(Tensor, parameter.grad).any() for parameter in policy.trainable().values())


def test_answers_that_share_a_prompt_are_rows_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "TREE_TOKENS", 20)
    tasks = [Task(Prompt((1,) * 6, ""), cast(Any, None), {}), Task(Prompt((2,) * 30, ""), cast(Any, None), {})]
    answers = [Answer((3,) * length, False, 0.0, "", 0.0) for length in (5, 5, 9, 5, 14, 1, 8, 8)]
    rows = rollouts.all_rows(tasks, answers, 4)
    assert rows.members == ((0, 1), (2, 3), (4,), (5,), (6,), (7,))
    assert [row.prompt[0] for row in rows.rows] == [1, 1, 2, 2, 2, 2]


# -- the optimum -----------------------------------------------------------------------------------------------

BETA, PROMPT, HANDFUL = 0.3, (5, 9, 7), (20, 30, 40)
STEP = math.log(3)
"""The rewards of the handful of answers are 0, 1 and 2 times this. So Bradley–Terry prefers them with 3/4 and 9/10."""


def next_token(policy: Policy) -> Tensor:
    """log π of each answer of one token, [V]."""
    with torch.no_grad(), policy.own_attention_in_use():
        return policy.logits(torch.tensor(PROMPT))[-1].double().log_softmax(-1)


def rewards_of(size: int) -> Tensor:
    rewards = torch.zeros(size, dtype=torch.float64)
    for number, token in enumerate(HANDFUL):
        rewards[token] = number * STEP
    return rewards


def descend(policy: Policy, steps: int, rate: float, gradient: Callable[[int], object]) -> None:
    """Train by Adam, with a rate that falls to zero."""
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=rate, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        gradient(step)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("algorithm", ["rloo", "ppo"])
def test_reinforcement_reaches_the_optimum_of_its_objective(
    llama: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    """π* ∝ π_ref exp(r/β) (Rafailov et al. 2023, Eq. 4), over all answers of one token."""
    policy = load(llama, adapter="none", method=spec(algorithm=algorithm)["method"])
    reference = next_token(policy)
    rewards = rewards_of(len(reference))
    optimum = (reference + rewards / BETA).log_softmax(-1)
    assert float((optimum.exp() * (optimum - reference)).sum()) > 1
    rewarded(monkeypatch, lambda _, ids: float(rewards[ids[0]]))
    method = method_on(policy, [PROMPT] * 4, algorithm=algorithm, samples=64, max_tokens=1, beta=BETA)

    def gradient(step: int) -> None:
        method.gradient([0, 1, 2, 3], Averages())
        method.after_step(step + 1)

    descend(policy, 150 if algorithm == "rloo" else 400, 2e-3, gradient)  # four updates of PPO have the same answers
    learned = next_token(policy)
    assert float((learned.exp() * (learned - optimum)).sum()) < 0.01


def test_dpo_reaches_the_same_optimum(llama: Path) -> None:
    """On pairs whose shares are those of Bradley–Terry, among the handful of answers."""
    policy = load(llama, adapter="none")
    reference = next_token(policy)
    shares = {(1, 0): 3, (0, 1): 1, (2, 1): 3, (1, 2): 1, (2, 0): 9, (0, 2): 1}  # better, worse: how often
    pairs = [pair for pair, count in shares.items() for _ in range(count)]
    rows = Rows.of(
        Row(line, PROMPT, tuple(Response((HANDFUL[side],), (True,)) for side in pair))
        for line, pair in enumerate(pairs)
    )
    launcher = Launcher(policy)
    method = Preference(launcher, DPOHyperparameters(beta=BETA).resolved(full=True), rows, rows[:0])
    method.references = References(compute(launcher, rows), compute(launcher, rows[:0]))
    descend(policy, 150, 2e-3, lambda _: method.gradient(list(range(len(rows))), Averages()))
    optimum = (reference + rewards_of(len(reference)) / BETA)[list(HANDFUL)].log_softmax(-1)
    learned = next_token(policy)[list(HANDFUL)].log_softmax(-1)
    assert float((learned.exp() * (learned - optimum)).sum()) < 0.01


# -- runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_raises_the_reward_of_prompts_that_it_has_not_seen(llama: Path, tmp_path: Path, algorithm: str) -> None:
    settings: dict[str, Any] = {
        "max_steps": 120 if algorithm == "ppo" else 30,  # four updates have the same answers
        "batch_size": 8, "samples": 8, "eval_every": 15, "eval_samples": 4, "algorithm": algorithm,
    }  # fmt: skip
    folder = make_work_folder(tmp_path, llama, spec(fields={"validation_split": 0.3}, **settings), train=QUESTIONS)
    events = run_in_process(folder)
    rewards = training_metrics(events, "eval/reward", "reinforcement")
    assert rewards[0] < 0.5 and rewards[-1] > 0.9, rewards
    assert max(map(abs, training_metrics(events, "rollouts/mismatch", "reinforcement"))) < 1e-4
    lines = [json.loads(line) for line in (folder / "output" / "validation_logps.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and all(len(line["answers"]) == 4 for line in lines)
    for line in lines:
        wanted = QUESTIONS[line["line"] - 1]["answer"]
        assert all(answer["reward"] == (wanted in answer["text"]) for answer in line["answers"])
    (done,) = of_kind(events, "done")
    tokens = training_metrics(events, "rollouts/tokens", "reinforcement")
    assert done["trained_tokens"] > sum(tokens) * 64
    assert {file.name for file in (folder / "output").glob("*.safetensors")} == {"adapter_model.safetensors"}


@pytest.mark.parametrize("stop_at", [2, 3])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_resumed_run_has_the_same_bytes(llama: Path, tmp_path: Path, algorithm: str, stop_at: int) -> None:
    """Between two batches of answers, and between two updates on one."""
    body = spec(algorithm=algorithm, updates_per_batch=2)
    whole = make_work_folder(tmp_path / "whole", llama, body, train=QUESTIONS)
    events = run_in_process(whole)
    again = make_work_folder(tmp_path / "again", llama, body, train=QUESTIONS)
    shutil.copytree(whole / "checkpoints" / f"step-{stop_at}", again / "resume")
    resumed = run_in_process(again)
    assert training_metrics(resumed, "reward", "reinforcement") == training_metrics(events, "reward", "reinforcement")[
        stop_at:
    ]  # fmt: skip
    assert adapter(again) == adapter(whole)
    assert (again / "output" / "validation_logps.jsonl").read_bytes() == (
        whole / "output" / "validation_logps.jsonl"
    ).read_bytes()


@pytest.mark.parametrize("algorithm", ["rloo", "ppo"])
def test_several_devices_and_recomputed_activations_give_the_same_bytes(
    llama: Path, tmp_path: Path, algorithm: str
) -> None:
    """A batch has more answers than are sampled together."""
    body = spec(batch_size=10, max_steps=3, updates_per_batch=2, algorithm=algorithm)
    outputs = []
    changes: list[tuple[str, int, dict[str, Any]]] = [
        ("one", 1, {}), ("two", 2, {}), ("again", 1, {"activation_checkpointing": True}),
    ]  # fmt: skip
    for name, ranks, fields in changes:
        settings = body["method"]["reinforcement"]["hyperparameters"] | fields
        method = {"type": "reinforcement", "reinforcement": {"grader": CHECK, "hyperparameters": settings}}
        folder = make_work_folder(tmp_path / name, llama, body | {"method": method}, ranks, train=QUESTIONS)
        status, events = run_process(folder)
        assert status == 0, events[-1]
        outputs.append(adapter(folder))
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.parametrize("stop_at", [1, 4, 7])
def test_ppo_after_sft_with_early_stopping_resumes_in_either_stage(
    llama: Path, tmp_path_factory: pytest.TempPathFactory, stop_at: int, ppo_after_sft: Path
) -> None:
    """The weights of the value head, and the best weights, are in the checkpoint."""
    again = make_work_folder(tmp_path_factory.mktemp("again"), llama, PPO_AFTER_SFT, **PPO_FILES)
    shutil.copytree(ppo_after_sft / "checkpoints" / f"step-{stop_at}", again / "resume")
    run_in_process(again)
    assert adapter(again) == adapter(ppo_after_sft)


PPO_AFTER_SFT = spec(
    algorithm="ppo", early_stopping={"metric": "eval/reward", "patience": 50}, eval_every=2, updates_per_batch=2,
    fields={
        "sft": {
            "training_file": "answers.jsonl",
            "hyperparameters": {"max_steps": 2, "batch_size": 4, "checkpoint_every": 1},
        },
        "validation_split": 0.3,
    },
)  # fmt: skip
PPO_FILES: dict[str, Any] = {
    "train": QUESTIONS,
    "answers": [{"prompt": f"{number}. a?", "completion": " the end"} for number in range(8)],
}


@pytest.fixture(scope="module")
def ppo_after_sft(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run."""
    folder = make_work_folder(tmp_path_factory.mktemp("whole"), llama, PPO_AFTER_SFT, **PPO_FILES)
    run_in_process(folder)
    return folder


def test_a_run_that_is_stopped_while_it_writes_answers_goes_on_later(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops at the next token, with a checkpoint of the step before. In the end it has the same bytes."""
    body = spec(max_tokens=30, max_steps=4, batch_size=10, samples=8, checkpoint_every=100, eval_every=100)
    whole = make_work_folder(tmp_path / "whole", llama, body, train=QUESTIONS)
    run_in_process(whole)
    folder = make_work_folder(tmp_path / "stopped", llama, body, train=QUESTIONS)
    run, drawn, draw = make_run(folder), list[int](), sampling.draw

    def stopping(*arguments: Any) -> Any:
        drawn.append(1)
        if len(drawn) == 1 + 30 + 2 * 3 * 30 + 40:  # the first token of each, the validation, two steps, and some
            run.stopping.set()
        return draw(*arguments)

    monkeypatch.setattr(sampling, "draw", stopping)
    with pytest.raises(Stopped):
        train(run)
    assert len(drawn) == 1 + 30 + 2 * 3 * 30 + 40
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert checkpoint.name in ("step-1", "step-2")
    checkpoint.rename(folder / "resume")
    run_in_process(folder)
    assert adapter(folder) == adapter(whole)


def test_sft_before_reinforcement_and_a_file_of_its_own_for_validation(llama: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": f"{number}. a?", "completion": " the end"} for number in range(8)]
    fields = {
        "sft": {"training_file": "answers.jsonl", "hyperparameters": {"max_steps": 2, "batch_size": 4}},
        "validation_file": "held-out.jsonl", "mapping": {"prompt": "question"},
    }  # fmt: skip
    rows = [{"question": f"{number}. the dog?", "answer": "e", "other": [number]} for number in range(12)]
    held_out = [{"question": f"{number}. a cow?", "answer": "a"} for number in range(3)]
    files: dict[str, Any] = {"train": rows, "answers": pairs, "held-out": held_out}
    folder = make_work_folder(tmp_path, llama, spec(fields=fields), **files)
    events = run_in_process(folder)
    assert {event["stage"] for event in of_kind(events, "metrics")} == {"sft", "reinforcement"}
    assert of_kind(events, "done")
    answers = [json.loads(line) for line in (folder / "output" / "validation_logps.jsonl").read_text().splitlines()]
    assert [bool(line["answers"][0]["reward"]) for line in answers] == [
        "a" in line["answers"][0]["text"] for line in answers
    ]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_reward_model_grades_answers(llama: Path, tmp_path: Path, ranks: int) -> None:
    """Alone and within a formula, with the rewards that it gives to the same texts later."""
    judged = make_work_folder(
        tmp_path / "judge", llama, {"method": dpo_method(loss="reward_model", max_steps=4), "quantization": "none"},
        train=make_pairs(16),
    )  # fmt: skip
    run_in_process(judged)
    learned = {"type": "reward_model", "name": "learned", "model": "judge"}
    multi = {
        "type": "multi", "name": "both", "graders": {"exact": CHECK, "learned": learned},
        "calculate_output": "10 * learned - exact",
    }  # fmt: skip
    for name, grader in (("alone", learned), ("multi", multi)):
        fields = {"validation_split": 0.3}
        folder = make_work_folder(tmp_path / name, llama, spec(grader, fields, max_steps=2), ranks, train=QUESTIONS)
        (folder / "graders" / "0").mkdir(parents=True)
        point_to(folder / "graders" / "0" / "base", judged / "output")
        status, events = run_process(folder)
        assert status == 0, events[-1]
        model = RewardModel(judged / "output", Rendering())
        lines = [json.loads(line) for line in (folder / "output" / "validation_logps.jsonl").read_text().splitlines()]
        assert len(lines) == 6
        for line in lines:
            question, (answer,) = QUESTIONS[line["line"] - 1], line["answers"]
            (reward,) = model.scores([(Example(1, question["messages"], ()), answer["text"])])
            expected = reward if grader is learned else 10 * reward - (question["answer"] in answer["text"])
            assert answer["reward"] == pytest.approx(expected, rel=1e-4)


def test_a_classifier_grades_answers(llama: Path, tmp_path: Path) -> None:
    """It reads the prompt too, which has each of its words once."""
    terms = {"the": [1.0, 2.0], "cat": [1.0, 1.0]}
    (tmp_path / "words.json").write_text(json.dumps({"terms": terms, "intercept": -4.0, "normalise": False}))
    grader = {"type": "classifier", "name": "words", "classifier": {"file": "../words.json"}}
    fields, settings = {"validation_split": 0.3}, {"max_steps": 20, "samples": 8, "beta": 0.01}
    folder = make_work_folder(tmp_path / "run", llama, spec(grader, fields, **settings), train=QUESTIONS)
    run_in_process(folder)
    lines = [json.loads(line) for line in (folder / "output" / "validation_logps.jsonl").read_text().splitlines()]
    for line in lines:
        (answer,) = line["answers"]
        words = re.findall(r"\b\w\w+\b", answer["text"].lower())
        assert answer["reward"] == pytest.approx(2 * (1 + words.count("the")) + 1 + words.count("cat") - 4)
    assert any(line["answers"][0]["reward"] > 0 for line in lines), "the model has learned to say them"
    (tmp_path / "words.json").write_text("{}")
    with pytest.raises(UserError, match="not a classifier") as refused:
        run_in_process(make_work_folder(tmp_path / "again", llama, spec(grader), train=QUESTIONS))
    assert refused.value.param == "method.reinforcement.grader.classifier.file"


def test_a_spec_has_its_graders_files_at_other_places() -> None:
    words = {"type": "classifier", "name": "words", "classifier": {"file": "file-words"}}
    for graders, field in (({"w": words}, "graders.w"), ([CHECK, words], "graders.1"), (words, "graders")):
        multi = {"type": "multi", "name": "m", "graders": graders, "calculate_output": "1"}
        own = JobSpec.model_validate({"model": "m", "training_file": "f", **spec(multi)})
        files = [("training_file", "f"), (f"method.reinforcement.grader.{field}.classifier.file", "file-words")]
        assert own.files() == files
        moved = own.with_files({name: f"data/{place}" for name, place in files})
        assert moved.files() == [(name, f"data/{place}") for name, place in files]
        assert own.needs(files[1][0]) is None


def test_each_row_of_a_file_on_one_line_has_its_own_answers(llama: Path, tmp_path: Path) -> None:
    """A JSON array. Its rows are told apart by their numbers, also where a row is left out."""
    folder = make_work_folder(tmp_path, llama, spec(fields={"validation_split": 0.3}, max_steps=1))
    blank = {"messages": [{"role": "user", "content": " "}]}
    (folder / "train.jsonl").write_text(json.dumps([*QUESTIONS[:7], blank, *QUESTIONS[7:]]))
    run = make_run(folder)
    stages = plan.stages(run.spec, folder, load(llama).tokenizer, 512, run.cache, run.events)
    (stage,) = stages
    assert stage.exercise is not None
    found = [stage.exercise.train.of(row) for rows in (stage.train, stage.validation) for row in rows]
    assert sorted(json.dumps(task.item) for task in found) == sorted(json.dumps(row) for row in QUESTIONS)
    assert all(task.item["messages"] == task.example.prompt for task in found)


def test_a_validation_that_cannot_be_graded_ends_the_training(llama: Path, tmp_path: Path) -> None:
    held_out = [{key: value for key, value in row.items() if key != "answer"} for row in QUESTIONS[:4]]
    body = spec(fields={"validation_file": "held.jsonl"}, early_stopping={"metric": "eval/reward"})
    folder = make_work_folder(tmp_path, llama, body, train=QUESTIONS, held=held_out)
    with pytest.raises(UserError, match="4 of 4 prompts of the validation have an answer that could not be graded"):
        run_in_process(folder)


def test_a_ratio_of_any_size_has_a_finite_loss_and_gradient() -> None:
    logratios = torch.tensor([-1000.0, -90.0, 0.0, 90.0, 1000.0], requires_grad=True)
    for advantage in (-1.0, 0.0, 1.0):
        loss = (
            objectives.clipped(logratios, torch.full((5,), advantage), 0.2).sum()
            + objectives.k3(-logratios, 0 * logratios).sum()
        )
        (gradient,) = torch.autograd.grad(loss, logratios)
        assert loss.isfinite() and gradient.isfinite().all()


def test_a_model_whose_cache_is_unknown_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler's logits are compared with the model's own, also where prompts are copied."""
    policy = load(llama)
    policy.shared = False
    decoding.check(policy, [(5, 6, 7)], 8, None, Ranks())
    step = decoding.CopiedPrompts.step

    def wrong(self: decoding.CopiedPrompts, tokens: Tensor) -> None:
        step(self, tokens)
        self.logits = self.logits.roll(1, -1)

    monkeypatch.setattr(decoding.CopiedPrompts, "step", wrong)
    with pytest.raises(UserError, match="cannot write answers here"):
        decoding.check(policy, [(5, 6, 7)], 8, None, Ranks())


def test_answers_need_room_beside_their_prompt(llama: Path, tmp_path: Path) -> None:
    folder = make_work_folder(tmp_path, llama, spec(max_tokens=5000), train=QUESTIONS)
    with pytest.raises(UserError, match="'max_tokens' leaves no room") as refused:
        train(make_run(folder))
    assert refused.value.param == "method.reinforcement.hyperparameters.max_tokens"


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"method": {"type": "reinforcement"}}, "method.reinforcement", "grader"),
        (spec(algorithm="reinforce"), "method.reinforcement.hyperparameters.algorithm", "rloo"),
        (spec(samples=1), "method.reinforcement.hyperparameters.samples", "greater than or equal to 2"),
        (spec(compute_multiplier=2), "method.reinforcement.hyperparameters.compute_multiplier", "not both"),
        (spec(fields={"sft": {}}), "sft.training_file", "answers of its own"),
        (spec(eval_interval=2), "method.reinforcement.hyperparameters.eval_interval", "not both"),
        (spec(algorithm="online_dpo", beta=0), "method.reinforcement.hyperparameters.beta", "above 0"),
        (spec(algorithm="online_dpo", clip=0.1), "method.reinforcement.hyperparameters.clip", "no meaning"),
        (spec(gae_lambda=0.9), "method.reinforcement.hyperparameters.gae_lambda", "no meaning"),
        (spec(algorithm="grpo", value_weight=1), "method.reinforcement.hyperparameters.value_weight", "no meaning"),
        (spec(reasoning_effort="high"), "method.reinforcement.hyperparameters.reasoning_effort", "default"),
        (spec(max_length=32, max_tokens=32), "method.reinforcement.hyperparameters.max_tokens", "no room"),
        (spec(CHECK | {"input": "{{x}}"}), "method.reinforcement.grader.input", "{{x}}"),
        (spec(fields={"parallel": {"shard": True}}), "parallel.shard", "whole model"),
        (spec(early_stopping={"metric": "eval/rewards/margins"}), "early_stopping.metric", "no metric"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(change: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(ValidationError) as refused:
        JobSpec.model_validate({"model": "m", "training_file": "f", **change})
    error = refused.value.errors()[0]
    message, named, _ = describe_validation_error(error | {"loc": ("body", *error["loc"])})
    assert words in message and str(named).endswith(param)


@pytest.mark.parametrize(
    ("samples", "max_tokens", "together"), [(4, 100, 400), (8, 1000, TREE_TOKENS), (2, 5000, 5000)]
)
def test_what_fits_and_what_repays_is_judged_with_the_answers_that_are_still_to_come(
    samples: int, max_tokens: int, together: int
) -> None:
    rows = Rows.of([Row(1, (5,) * 30, (Response((6,), (True,)),)), Row(2, (5,) * 10, (Response((6,), (True,)),))])
    settings = ReinforcementHyperparameters(samples=samples, max_tokens=max_tokens).resolved(full=False)
    stage = plan.Stage("reinforcement", settings, rows, rows[:0], seed=0)
    assert (stage.longest, stage.written_tokens) == (31 + together, samples * max_tokens)
    plain = plan.Stage("dpo", DPOHyperparameters().resolved(full=False), rows, rows[:0], seed=0)
    assert (plain.longest, plain.written_tokens) == (31, 0)


def test_a_stored_spec_says_what_was_run() -> None:
    body = {
        "model": "m",
        "training_file": "f",
        **spec(samples=None, compute_multiplier=0.5, eval_every="auto", eval_interval=7),
    }
    resolved = JobSpec.model_validate(body).resolved()
    settings = cast(ReinforcementHyperparameters, resolved.method.hyperparameters)
    assert (settings.samples, settings.eval_every, settings.beta, settings.clip) == (4, 7, 0.05, 0.2)
    assert JobSpec.stored(resolved.to_store()).resolved() == resolved
    most = body | spec(samples=None, compute_multiplier=10)
    assert JobSpec.stored(JobSpec.model_validate(most).resolved().to_store()).method.hyperparameters.answers == 64  # type: ignore[attr-defined]
    assert "reinforcement" not in JobSpec.model_validate({"model": "m", "training_file": "f"}).to_store()["method"]


def test_the_recipe_of_tasks_cuts_prompts(llama: Path, tmp_path: Path) -> None:
    """A prompt and an answer of `max_tokens` fit into `max_length`."""
    rows = [{"messages": [{"role": "user", "content": "the cat sat on the mat " * 30}], "answer": "e"}] * 8
    folder = make_work_folder(tmp_path, llama, spec(max_length=32, max_tokens=8, max_steps=1), train=rows)
    events = run_in_process(folder)
    assert of_kind(events, "done")
    tasks = Tasks([folder / "train.jsonl"], load(llama).tokenizer, Recipe(cast(Any, "prompts"), 24))
    assert len(tasks.of(Row(3, (), ())).prompt.ids) == 24

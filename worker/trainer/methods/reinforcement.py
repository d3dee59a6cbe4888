"""Reinforcement: the policy writes answers, a grader gives rewards, and the policy learns from them.

for each batch of prompts:
    write K answers to each prompt, and grade them
    compute the log-probs of their tokens under the policy, and under its first weights, the reference
    `updates_per_batch` times: loss of the answers → gradient → update

The tree of a prompt carries its answers, so the prompt is computed once for all of them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from app.spec.hyperparameters import ReinforcementHyperparameters
from worker.trainer import rollouts, weights
from worker.trainer.averages import Averages
from worker.trainer.dataset import Rows
from worker.trainer.errors import UserError
from worker.trainer.grading import Exercise
from worker.trainer.hardware import upload
from worker.trainer.launcher import Launcher, TokenCounts, Values, nothing
from worker.trainer.logps import TokenScores
from worker.trainer.methods.method import Method, ValidatedRow
from worker.trainer.model import per_response
from worker.trainer.objectives import reinforcement as objectives
from worker.trainer.packing import Pack
from worker.trainer.reference import References
from worker.trainer.rollouts import Answer, AnswerRows, TokenValues
from worker.trainer.tasks import Task

if TYPE_CHECKING:
    from worker.trainer.plan import Stage

FLAT = ("old", "reference", "values")
"""The numbers of all tokens in a checkpoint."""
MOST_UNGRADED = 0.5
"""The largest share of the prompts of a batch that may be left out, because an answer could not be graded."""


@dataclass(frozen=True)
class Graded:
    """Answers to P prompts, K each, with their log-probs before an update. Flat, they are M = P · K."""

    answers: list[Answer]
    old: TokenValues
    """log π of their tokens, by the weights that wrote them."""
    reference: TokenValues
    """log π_ref of their tokens."""
    samples: int
    """K."""
    values: TokenValues | None = None
    """PPO's estimates of what is still to come, before each token."""

    @property
    def lengths(self) -> Tensor:
        """Tokens of each answer, [M]."""
        return torch.tensor([len(answer.ids) for answer in self.answers])

    @property
    def rewards(self) -> Tensor:
        """The rewards, [P, K] in float64; NaN for an answer that could not be graded."""
        values = [math.nan if answer.reward is None else answer.reward for answer in self.answers]
        return torch.tensor(values, dtype=torch.float64).view(-1, self.samples)

    @property
    def graded(self) -> Tensor:
        """Whether all answers to a prompt could be graded, [P]."""
        return self.rewards.isfinite().all(1)

    @property
    def divergences(self) -> Tensor:
        """log π − log π_ref of each answer, [P, K]: the estimate k1 of KL(π‖π_ref)."""
        return (self.old.sums() - self.reference.sums()).view(-1, self.samples)

    def report(self, averages: Averages) -> None:
        """Add the metrics of the answers to `averages`."""
        lengths, logps, rewards = self.lengths, self.old.sums(), self.rewards[self.graded]
        averages.add("reward", rewards)
        averages.add("kl", self.divergences)
        averages.add("rollouts/ungraded", (~self.graded).double())
        averages.add("rollouts/tokens", lengths)
        averages.add("rollouts/ended", torch.tensor([float(answer.ended) for answer in self.answers]))
        averages.add("rollouts/entropy", -logps, lengths)

    def report_training(self, averages: Averages) -> None:
        """Add the metrics that only steps have."""
        rewards = self.rewards[self.graded]
        averages.add("rollouts/reward_std", rewards.std(1))
        averages.add("rollouts/without_signal", (rewards.amax(1) == rewards.amin(1)).double())
        by_sampler = torch.tensor([answer.logp for answer in self.answers], dtype=torch.float64)
        averages.add("rollouts/mismatch", by_sampler - self.old.sums(), self.lengths)


@dataclass(frozen=True)
class Batch:
    """The answers of some steps, and what the loss needs of them."""

    number: int
    """The number of the batch, counted from 0."""
    numbers: tuple[int, ...]
    """The rows of its prompts."""
    graded: Graded
    trained: AnswerRows
    """The answers that are trained on."""
    advantages: TokenValues
    """The advantage of each token, in float64. For `online_dpo` they are not used."""
    counts: Tensor
    """Whether an answer counts, [M]."""
    total: int
    """The number of answers that count; for `online_dpo`, of pairs; for `ppo`, of tokens."""
    returns: TokenValues | None = None
    """The values that PPO's head learns, before each token."""


class Reinforcement(Method):
    """Reinforcement. The loss of a step is the mean over answers, for `online_dpo` over pairs, for `ppo` over tokens.

    `ppo` has a value head. Its weights are in checkpoints, and not in the artifact.
    """

    def __init__(
        self,
        launcher: Launcher,
        settings: ReinforcementHyperparameters,
        train: Rows,
        validation: Rows,
        exercise: Exercise,
        seed: int,
    ) -> None:
        super().__init__(launcher, settings, train, validation)
        self.settings, self.exercise, self.seed = settings, exercise, seed
        self.anchor: dict[str, Tensor] = {}
        """The trained weights of the reference: those before the first step."""
        self.steps = 0
        """The number of optimizer steps so far."""
        self._batch: Batch | None = None
        self._checked = False

    @classmethod
    def of(cls, launcher: Launcher, stage: "Stage") -> Self:
        settings = stage.hyperparameters
        assert isinstance(settings, ReinforcementHyperparameters)
        assert stage.exercise is not None
        return cls(launcher, settings, stage.train, stage.validation, stage.exercise, stage.seed)

    def begin(self, references: Callable[[float | None], References]) -> None:
        self.anchor = weights.copied(self.policy)

    # -- a step --------------------------------------------------------------------------------------------------

    def prepare(self, numbers: Sequence[int]) -> None:
        """Nothing can be prepared: the next answers depend on the next weights."""

    def gradient(self, numbers: Sequence[int], averages: Averages, draw: str | None = None) -> TokenCounts:
        batch = self._batch_of(numbers)
        plan = self.launcher.plan(batch.trained.segments(self.policy))
        values, counts = self.launcher.backward(plan, lambda pack, _: self._loss(pack, batch), draw)
        averages.add("loss", values["loss"].double().sum() / batch.total)
        if "clipped" in values:
            averages.add("rollouts/clipped", values["clipped"], values["parts"])
        if "value_loss" in values:
            averages.add("rollouts/value_loss", values["value_loss"], values["parts"])
        batch.graded.report(averages)
        batch.graded.report_training(averages)
        return counts

    def tokens(self, numbers: Sequence[int]) -> int:
        """Tokens of the prompts and of their answers."""
        assert self._batch is not None
        prompts = sum(len(self._task(number).prompt.ids) for number in self._batch.numbers)
        return prompts + int(self._batch.graded.lengths.sum())

    def after_step(self, step: int) -> None:
        self.steps = step

    def _batch_of(self, numbers: Sequence[int]) -> Batch:
        """The answers for the next step, over the rows `numbers`: written now, unless the step before had them too."""
        number = self.steps // self.settings.repeats
        if self._batch is None or self._batch.number != number:
            tasks = [self._task(row) for row in numbers]
            graded = self._write(tasks, self.settings.answers, f"{self.seed} batch {number}")
            self._batch = self._prepared(number, tuple(numbers), graded)
        return self._batch

    def _prepared(self, number: int, numbers: tuple[int, ...], graded: Graded) -> Batch:
        """The batch of `graded` answers to the rows `numbers`."""
        settings, tasks = self.settings, [self._task(row) for row in numbers]
        self._require_graded(graded, "a step")
        rewards, counts = graded.rewards.nan_to_num(0.0), graded.graded  # (P, K), (P,)
        if settings.algorithm == "online_dpo":
            pairs = [(k, [k * graded.samples + int(row.argmax()), k * graded.samples + int(row.argmin())])
                     for k, row in enumerate(rewards)]  # fmt: skip
            counts = counts & (rewards.amax(1) > rewards.amin(1))
            trained, advantages = AnswerRows.of(tasks, graded.answers, pairs), torch.zeros_like(rewards)
            total = int(counts.sum())
        else:
            trained = rollouts.all_rows(tasks, graded.answers, graded.samples)
            if settings.algorithm == "rloo":
                advantages = objectives.leave_one_out(rewards - (settings.beta or 0.0) * graded.divergences)
            else:
                advantages = objectives.standardised(rewards)
            total = int(counts.sum()) * graded.samples
        each, lengths = counts[:, None].expand_as(rewards).flatten(), graded.lengths
        by_token = TokenValues(advantages.flatten().repeat_interleave(lengths), lengths.tolist())
        batch = Batch(number, numbers, graded, trained, by_token, each, max(1, total))
        return batch if settings.algorithm != "ppo" else self._with_values(batch, rewards.flatten())

    def _with_values(self, batch: Batch, rewards: Tensor) -> Batch:
        """`batch` with the advantages of PPO. `rewards` [M] come with the last token of each answer.

        Each token also costs β times its part of the divergence from the reference.
        """
        graded, lengths = batch.graded, batch.graded.lengths
        assert graded.values is not None
        values = graded.values.flat.double()
        costs = -(self.settings.beta or 0.0) * (graded.old.flat.double() - graded.reference.flat.double())
        costs[lengths.cumsum(0) - 1] += rewards
        each = zip(*(torch.split(flat, lengths.tolist()) for flat in (costs, values)), strict=True)
        decay = 1.0 if self.settings.gae_lambda is None else self.settings.gae_lambda
        advantages = torch.cat([objectives.generalised_advantages(own, value, decay) for own, value in each])  # (T,)
        returns = advantages + values
        counted = advantages[batch.counts.repeat_interleave(lengths)]
        if len(counted) > 1:
            advantages = (advantages - counted.mean()) / (counted.std() + objectives.STD_FLOOR)
        by_token = [TokenValues(flat, lengths.tolist()) for flat in (advantages, returns)]
        return replace(batch, advantages=by_token[0], returns=by_token[1], total=max(1, len(counted)))

    def _require_graded(self, graded: Graded, where: str) -> None:
        """Raise `UserError` if the grader fails on too many answers of a step or of the validation."""
        ungraded = int((~graded.graded).sum())
        if ungraded > MOST_UNGRADED * len(graded.graded):
            reason = next(answer.error for answer in graded.answers if answer.error is not None)
            share = f"{ungraded} of {len(graded.graded)} prompts of {where}"
            message = f"{share} have an answer that could not be graded. {reason}"
            raise UserError("grading_failed", message, "method.reinforcement.grader")

    def _loss(self, pack: Pack, batch: Batch) -> tuple[Tensor, Values]:
        """The loss of a pack, and for each of its answers its part of the loss and how much of it is clipped, [R]."""
        settings, device = self.settings, self.policy.device
        answers = batch.trained.answers(pack.places)
        ppo = settings.algorithm == "ppo"
        scores, lengths = self.policy.score(pack, values=ppo), pack.lengths[pack.leaves]  # leaves: answers, in order
        old, reference, by_token = (
            upload(values.of(answers), device).to(scores.responses.dtype)
            for values in (batch.graded.old, batch.graded.reference, batch.advantages)
        )  # (N,)
        counts = upload(batch.counts[answers], device)
        beta, clip = settings.beta or 0.0, settings.clip or 0.0
        values: Values = {}
        if settings.algorithm == "online_dpo":
            pairs = scores.responses.view(-1, 2), per_response(pack, reference).view(-1, 2)
            losses = objectives.preference(*pairs, beta).repeat_interleave(2) / 2
        elif settings.algorithm == "rloo":
            logratios, advantages = scores.responses - per_response(pack, old), by_token[lengths.cumsum(0) - 1]
            losses = objectives.clipped(logratios, advantages, clip)
            clipped = objectives.is_clipped(logratios, advantages, clip) & counts
            values |= {"clipped": clipped.double(), "parts": counts.double()}
        else:
            logps = scores.tokens.logps
            tokens = objectives.clipped(logps - old, by_token, clip)
            clipped = objectives.is_clipped(logps - old, by_token, clip) & counts[pack.leaf]
            values["clipped"] = per_response(pack, clipped.double())
            values["parts"] = torch.where(counts, lengths, 0).double()
            if settings.algorithm == "grpo":
                losses = per_response(pack, tokens + beta * objectives.k3(logps, reference)) / lengths
            else:
                errors = self._value_errors(pack, batch, answers, scores.tokens)
                values["value_loss"] = torch.where(counts, per_response(pack, errors.detach().double()), 0.0)
                losses = per_response(pack, tokens + (settings.value_weight or 0.0) * errors)
        losses = torch.where(counts, losses, 0.0)
        return losses.sum() / batch.total, values | {"loss": losses}

    def _value_errors(self, pack: Pack, batch: Batch, answers: Sequence[int], tokens: TokenScores) -> Tensor:
        """The loss of the value head for each token of a pack, [N]."""
        assert batch.graded.values is not None
        assert batch.returns is not None
        assert tokens.values is not None
        before, returns = (
            upload(values.of(answers), self.policy.device).to(tokens.values.dtype)
            for values in (batch.graded.values, batch.returns)
        )
        return objectives.value_loss(tokens.values, before, returns, self.settings.clip or 0.0)

    # -- answers -------------------------------------------------------------------------------------------------

    def _task(self, number: int) -> Task:
        return self.exercise.train.of(self.train[number])

    def _write(self, tasks: Sequence[Task], samples: int, draw: str, between: Callable[[], None] = nothing) -> Graded:
        """Graded answers to `tasks`. `between` is called between the launches that compute their log-probs."""
        if not self._checked:
            rollouts.check(self.policy, tasks, self.settings.max_tokens, self.launcher)
            self._checked = True
        answers = rollouts.write_answers(
            self.policy, self.launcher, tasks, samples, self.settings.max_tokens, draw, self.exercise.grading,
            self.check_stop,
        )  # fmt: skip
        rows, lengths = rollouts.all_rows(tasks, answers, samples), [len(answer.ids) for answer in answers]
        old = rollouts.token_scores(self.launcher, rows, lengths, between)
        with weights.swapped(self.policy, self.anchor):
            reference = rollouts.token_scores(self.launcher, rows, lengths, between, values=False)
        return Graded(answers, old["logps"], reference["logps"], samples, old.get("values"))

    # -- a validation --------------------------------------------------------------------------------------------

    def validate(self, averages: Averages, check_stop: Callable[[], None]) -> list[ValidatedRow]:
        """The answers have the same random numbers in all validations. The loss is −(reward − β KL)."""
        samples, tasks = self.settings.eval_samples or 1, self.exercise.validation
        prompts = [tasks.of(row) for row in self.validation]
        written = self._write(prompts, samples, f"{self.seed} validation", check_stop)
        self._require_graded(written, "the validation")
        written.report(averages)
        objective = written.rewards - (self.settings.beta or 0.0) * written.divergences
        averages.add("loss", -objective[written.graded])
        own, reference = (values.sums().view(-1, samples) for values in (written.old, written.reference))
        return [
            ValidatedRow(number, own[number], reference[number], tuple(answers))
            for number in range(len(self.validation))
            for answers in [written.answers[number * samples : (number + 1) * samples]]
        ]

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        state = {"anchor": self.anchor, "sampler": {"shared": torch.tensor(self.policy.shared)}}
        batch = self._batch
        if batch is not None and batch.number == self.steps // self.settings.repeats:
            graded, answers = batch.graded, batch.graded.answers
            state["rollouts"] = {
                "rows": torch.tensor(batch.numbers),
                "ids": torch.tensor([token for answer in answers for token in answer.ids]),
                "lengths": graded.lengths,
                "ended": torch.tensor([answer.ended for answer in answers]),
                "logps": torch.tensor([answer.logp for answer in answers], dtype=torch.float64),
                "rewards": graded.rewards,
                "old": graded.old.flat,
                "reference": graded.reference.flat,
                **({} if graded.values is None else {"values": graded.values.flat}),
            }
        if self.policy.value_head is not None:
            state["value_head"] = {"weight": self.policy.value_head.weight.detach()}
        return state

    def load_state_dict(self, state: Mapping[str, dict[str, Tensor]], step: int) -> None:
        self.steps = step
        self.anchor = {name: values.to(self.policy.device) for name, values in state["anchor"].items()}
        if not state["sampler"]["shared"] and self.policy.shared:  # its check has found that before
            self.policy.shared = False
        self._checked = True
        if self.policy.value_head is not None:
            self.policy.value_head.weight.data.copy_(state["value_head"]["weight"])
        if "rollouts" not in state:
            return
        kept = {name: values.tolist() for name, values in state["rollouts"].items() if name not in FLAT}
        lengths, rewards = kept["lengths"], [reward for row in kept["rewards"] for reward in row]
        ids = torch.split(state["rollouts"]["ids"], lengths)
        answers = [
            Answer(tuple(part.tolist()), ended, logp, "", None if math.isnan(reward) else reward)
            for part, ended, logp, reward in zip(ids, kept["ended"], kept["logps"], rewards, strict=True)
        ]
        flat = {name: TokenValues(state["rollouts"][name], lengths) for name in FLAT if name in state["rollouts"]}
        graded = Graded(answers, flat["old"], flat["reference"], len(kept["rewards"][0]), flat.get("values"))
        self._batch = self._prepared(step // self.settings.repeats, tuple(kept["rows"]), graded)

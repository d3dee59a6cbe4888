"""The launcher: computes segments in packs, on one rank or several, within the memory of each device.

A launch is the computation of one pack. It holds as many segments as fit the budget of the policy's packing. After
running out of GPU memory, a rank halves its launches and repeats what it has not sent yet. The others wait for it.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import accumulate, islice

import torch
from torch import Tensor

from app.spec.resources import VIRTUAL_RANKS
from worker.trainer.errors import UserError, first_line, is_compiler_error
from worker.trainer.events import Events
from worker.trainer.fully_sharded import Divided
from worker.trainer.gradients import Ownership, Reduction, Sum, take_gradients
from worker.trainer.hardware import download, warn_again
from worker.trainer.model import Policy
from worker.trainer.packing import Pack, Segment
from worker.trainer.progress import progress
from worker.trainer.ranks import Ranks
from worker.trainer.segments import StepPlan

Values = dict[str, Tensor]
"""Values of responses of rows, by name: [R] each, in the order of their rows."""
NORMS = "norms"
"""The name of the norms of gradients beside those of values."""
Loss = Callable[[Pack, Sequence[int]], tuple[Tensor, Values]]
"""The loss of a pack, a scalar, and values for metrics. It gets the canonical numbers of the pack's segments."""


def nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True)
class TokenCounts:
    """Token counts of the packs of a step."""

    tokens: int = 0
    """Distinct tokens, without padding."""
    slots: int = 0
    """Tokens with padding."""
    scored: int = 0
    """Scored tokens: the positions at which the head computes logits."""

    def __add__(self, other: "TokenCounts") -> "TokenCounts":
        return TokenCounts(self.tokens + other.tokens, self.slots + other.slots, self.scored + other.scored)

    @classmethod
    def of(cls, pack: Pack) -> "TokenCounts":
        """The counts of one pack."""
        return cls(pack.tokens, pack.slots, len(pack.targets))


@dataclass
class Launcher:
    """Computes segments under a policy.

    `param` is the field of the job spec to name if a row does not fit into memory. `virtual_ranks` is the number of
    parts that a step is divided into. `may_recompute`: whether activations may be recomputed to save memory.
    """

    policy: Policy
    ranks: Ranks = field(default_factory=Ranks)
    events: Events | None = None
    param: str = "method"
    virtual_ranks: int = VIRTUAL_RANKS
    may_recompute: bool = True
    owned: Ownership = field(init=False)
    """Which rank updates which parameters."""
    forward_passes: int = 1
    """The number of forward passes in a launch."""
    rewards: bool = False
    """Whether they compute rewards instead of log-probs."""
    meanwhile: Callable[[], None] = nothing
    """The CPU does this while the devices compute the end of a step."""
    _prepared: tuple[list[Segment], Pack] | None = None
    """The first pack of the next step."""
    _warned_of_idle_ranks: bool = False

    def __post_init__(self) -> None:
        kind = Ownership if self.policy.root is None else Divided
        self.owned = kind(list(self.policy.trainable().values()), self.ranks)

    # -- forward passes ------------------------------------------------------------------------------------------

    def forward(
        self, segments: Iterable[Segment], score: Callable[[Pack], Values]
    ) -> Iterator[tuple[list[Segment], Values]]:
        """The results of `score` for the packs of `segments`, without gradients, on all ranks and in order.

        Each item has some segments and the values of all their responses, on the CPU. The ranks compute one group of
        segments each for it.
        """
        groups = self.policy.packing.groups(segments)  # the same on all ranks, whatever room each has
        while together := list(islice(groups, self.ranks.size)):
            parts = list[Values]()

            def compute(pack: Pack, _: range, parts: list[Values] = parts) -> None:
                parts.append(_downloaded(score(pack)))

            own = together[self.ranks.rank] if self.ranks.rank < len(together) else []
            with torch.no_grad():
                self._launch(own, compute, spare=together[0][:1])
            gathered = [part for parts in self.ranks.gather(parts) for part in parts]
            yield [segment for group in together for segment in group], joined(gathered)

    def _launch(
        self,
        segments: Sequence[Segment],
        compute: Callable[[Pack, range], None],
        restart: Callable[[int], int] = lambda done: done,
        *,
        spare: Sequence[Segment],
        done: int = 0,
        backward: bool = False,
    ) -> None:
        """Call `compute` for each pack of `segments` on this rank, with the numbers of the segments in the pack.

        `done` is the number of segments to leave out. After a call that ran out of memory, `restart` gets the number of
        segments done, and returns the number of the segment to go on with. `backward`: whether `compute` has a backward
        pass. The ranks of a divided model launch together until none has segments left. With one that is trained in
        full, a rank without segments computes the segment `spare`, which then counts nothing.
        """
        policy = self.policy
        while self._is_left(done < len(segments)):
            packing = replace(policy.packing, budget=policy.launch_tokens)
            group = next(packing.groups(segments[done:]), [])
            progress.mark()
            try:
                with policy.shards.together(self.forward_passes, backward=backward):
                    if group:
                        compute(self._build(group), range(done, done + len(group)))
                    elif policy.root is not None:
                        self._idle(spare, backward)
            except torch.OutOfMemoryError as error:
                self._save_memory([segment.tokens for segment in group], error)
            except RuntimeError as error:
                # The ranks of a group must compute alike, so there the attempt ends.
                if not (policy.compiled and is_compiler_error(error)) or self.ranks.size > 1:
                    raise
                policy.compiled = False
                self._warn(f"The layers of the model are not compiled any more: {first_line(error)}.")
            else:
                done += len(group)
                continue
            # Outside of the handler: there, the exception would still hold the tensors of the failed launch.
            policy.groups.use(False)
            warn_again()
            gc.collect()
            torch.cuda.empty_cache()
            done = restart(done)

    def _build(self, group: list[Segment]) -> Pack:
        """A pack of `group` on the policy's device."""
        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared[0] == group:
            return prepared[1]
        return self.policy.packing.build(group).to(self.policy.device)

    def prepare(self, plan: StepPlan) -> None:
        """Build this rank's first pack of the step `plan` in advance."""
        segments = [segment for part in plan.parts(self.ranks.rank, self.ranks.size) for segment in part]
        group = next(replace(self.policy.packing, budget=self.policy.launch_tokens).groups(segments), [])
        if group and not self.policy.is_divided:  # their packs end with a round
            with suppress(torch.OutOfMemoryError):  # the step will make smaller packs
                self._prepared = group, self._build(group)

    def _is_left(self, own: bool) -> bool:
        """Whether to launch again: this rank has segments left, or another one that needs this rank has."""
        return self.ranks.any(own) if self.policy.is_divided else own

    def _idle(self, spare: Sequence[Segment], backward: bool) -> None:
        """A launch whose results count nothing."""
        pack = self.policy.packing.build(spare).to(self.policy.device)
        values = self.policy.rewards(pack) if self.rewards else self.policy.score(pack).responses
        if backward:
            (0.0 * values.sum()).backward()  # type: ignore[no-untyped-call]

    def _save_memory(self, tokens: list[int], error: torch.OutOfMemoryError) -> None:
        """Keep no dequantised weights, make smaller packs, or recompute activations.

        `tokens` are the sizes of the segments in the pack that failed. Raises `UserError` if a segment does not fit
        alone.
        """
        policy, largest = self.policy, max(tokens, default=0)
        if policy.root is not None:  # the other ranks wait in the same pass, which cannot be repeated
            text = "A pack of full-parameter training does not fit into the GPU's memory."
            message = f"{text} Lower 'max_length', or use more devices."
            raise UserError("out_of_memory", message, f"{self.param}.max_length") from error
        if policy.groups.release():
            message = "Out of memory: weights in NF4 do not stay dequantised from now on."
        elif len(tokens) > 1:
            policy.room = min(policy.launch_tokens, sum(tokens)) // 2
            message = f"Out of memory: packs of {policy.room} tokens from now on."
        elif self.may_recompute and policy.can_recompute and not policy.recomputes_activations:
            policy.recompute_activations(True)
            message = "Out of memory: activations are recomputed in the backward pass from now on."
        else:
            text = f"{largest} tokens that are computed together do not fit into the GPU's memory."
            param = f"{self.param}.max_length"
            raise UserError("out_of_memory", f"{text} Lower 'max_length', or quantise the base.", param) from error
        self._warn(message)

    def _warn(self, message: str) -> None:
        if self.events is not None:
            self.events.message(message, level="warn")

    # -- the gradient of a step ----------------------------------------------------------------------------------

    def plan(self, segments: Sequence[Segment]) -> StepPlan:
        """The canonical order of the `segments` of a step.

        Full-parameter training has as many virtual ranks as ranks: each further sum takes the memory of a model.
        """
        plan = StepPlan.of(segments, self.ranks.size if self.policy.full else self.virtual_ranks)
        busy, size = len(plan.virtual_ranks), self.ranks.size
        if busy < size and not self._warned_of_idle_ranks:
            self._warned_of_idle_ranks = True
            remedy = "A larger 'batch_size'" if busy == len(segments) else "A larger 'parallel.virtual_ranks'"
            self._warn(
                f"{size - busy} of {size} devices idle in a step: it has {len(segments)} segments of about "
                f"{self.policy.packing.segment_tokens} tokens, in {busy} virtual ranks. {remedy} would fill them."
            )
        return plan

    def backward(self, plan: StepPlan, loss: Loss, draw: str | None = None) -> tuple[Values, TokenCounts]:
        """Set the gradients of the owned parameters to that of Σ `loss` over the packs of `plan`.

        The loss is multiplied by the policy's loss scale. `draw` seeds the random numbers of each segment; packs must
        then hold one segment. Returns the values of all responses in canonical order, on the CPU, and the counts of all
        packs, both of all ranks.
        """
        take_gradients({}, self.owned.parameters)  # those of a loss scale that overflowed
        step = _Backward(self, plan, loss, draw)
        spare = plan.segments[-1:]  # of the smallest virtual rank
        if self.policy.is_divided:  # the ranks launch together, so they must be in the same round
            done = 0
            for number, end in enumerate(step.ends):
                self._launch(step.segments[:end], step.compute, step.restart, done=done, spare=spare, backward=True)
                step.send(end, number + 1)
                done = end
        else:
            step.send(0)
            self._launch(step.segments, step.compute, step.restart, spare=spare, backward=True)
        step.finish()
        values = joined([step.results[number] for number in range(len(step.segments))])
        norms = self.owned.own_norms()
        self.meanwhile()
        own = _downloaded(values | {NORMS: norms})
        self.owned.norms = own.pop(NORMS)
        gathered = self.ranks.gather((own, step.counts))
        values = joined([values for values, _ in gathered if values])
        in_order = {name: plan.in_order(tensor, self.ranks.size) for name, tensor in values.items()}
        return in_order, sum((counts for _, counts in gathered), TokenCounts())


class _Backward:
    """A backward pass over this rank's part of a step: its rounds, of one virtual rank each."""

    def __init__(self, launcher: Launcher, plan: StepPlan, loss: Loss, draw: str | None) -> None:
        self.policy, self.ranks, self.plan, self.loss, self.draw = launcher.policy, launcher.ranks, plan, loss, draw
        self.parameters = launcher.owned.parameters
        self.own = plan.rounds(self.ranks.rank, self.ranks.size)
        """The virtual rank of each round; None in the last one if no virtual rank is left for this rank."""
        parts = plan.parts(self.ranks.rank, self.ranks.size)
        self.segments = [segment for part in parts for segment in part]
        self.round_of = [j for j, part in enumerate(parts) for _ in part]
        """The round of each segment."""
        self.places = [plan.first_places[number] + k for number in self.own if number is not None
                       for k in range(len(plan.virtual_ranks[number]))]  # fmt: skip
        """The number of each segment in canonical order."""
        self.ends = list(accumulate(map(len, parts)))
        """The number of segments up to the end of each round."""
        self.sums: list[Sum] = [{} for _ in parts]
        self.reduction, self.sent = Reduction(launcher.owned), 0
        """`sent` is the number of rounds whose sums are in the reduction."""
        self.results: dict[int, Values] = {}
        """The values of each segment, by its number. One that is computed again replaces them."""
        self.counts = TokenCounts()
        """The counts of all packs, with those that were computed again."""

    def compute(self, pack: Pack, numbers: range) -> None:
        """Add the gradient of the loss of `pack`, which holds the segments `numbers`."""
        places = [self.places[number] for number in numbers]
        if self.draw is not None:
            (place,) = places
            torch.manual_seed(int.from_bytes(sha256(f"{self.draw} {place}".encode()).digest()[:7]))
        sums = [self.sums[self.round_of[number]] for number in numbers]
        apart = self.policy.segment_gradients.added_to(sums, pack.extents)
        with apart if self.policy.root is None else nullcontext():  # FSDP sums all gradients itself
            loss, values = self.loss(pack, places)
            (self.policy.loss_scale * loss).backward()  # type: ignore[no-untyped-call]
        for number, extent in zip(numbers, pack.extents, strict=True):
            self.results[number] = {name: tensor.detach()[extent.responses] for name, tensor in values.items()}
        self.counts += TokenCounts.of(pack)
        if not self.policy.is_divided:
            self.send(numbers.stop)

    def send(self, done: int, rounds: int | None = None) -> None:
        """Send the sums of the rounds that are complete after `done` segments, or only those of the first `rounds`.

        FSDP has summed the gradients of a divided model that is trained in full.
        """
        if self.policy.root is not None:
            return
        while self.sent < len(self.own[:rounds]) and self.ends[self.sent] <= done:
            j, size = self.sent, self.ranks.size
            take_gradients(self.sums[j], self.parameters)
            count = min(size, len(self.plan.virtual_ranks) - j * size)
            self.reduction.add(j, count, None if self.own[j] is None else self.sums[j])
            self.sums[j], self.sent = {}, j + 1

    def finish(self) -> None:
        """Set the gradients of the owned parameters."""
        if self.policy.root is None:
            self.reduction.finish()

    def restart(self, done: int) -> int:
        """Drop all sums that were not sent. Returns the number of the first segment whose sum is lost."""
        self.sums = [{} for _ in self.sums]
        take_gradients({}, self.parameters)
        return self.ends[self.sent - 1] if self.sent else 0


def _downloaded(values: Values) -> Values:
    """Copies of `values` on the CPU."""
    return dict(zip(values, download([*values.values()]), strict=True))


def joined(parts: Sequence[Values]) -> Values:
    """The values of all `parts`, in order."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}

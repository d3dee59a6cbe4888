"""Evaluations: what a model says of answers, and the answers that it gives itself.

Like a training, an evaluation is a work folder in, events out, and a folder left: `evaluation.json`, `sides/` with
the models that it needs, the data; then `output/items.jsonl`, a line for each pair or completion, of which
`worker.evaluation_figures` makes figures. One model is in memory at a time. Completions are handed over as they
come, in parts: a run that is broken off goes on behind them.
"""

import gc
import json
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch

from app.spec.datasets.check import numbered_examples
from app.spec.datasets.example import Example, Kind
from app.spec.datasets.rendering import Rendering
from app.spec.evaluation import BestOf, EvaluationSpec, Judge, SamplingSpec, Scorer, Side
from app.spec.hyperparameters import DEFAULT_MAX_LENGTH
from app.spec.job import JobSpec
from worker.classifier import BadClassifier, LinearClassifier
from worker.judges.questions import questions, verdicts
from worker.model_files import context_length
from worker.trainer import data, dataset, exactness, reference, reward
from worker.trainer.cache import Cache
from worker.trainer.data import Recipe, Response, Row
from worker.trainer.errors import Stopped, UserError
from worker.trainer.events import CompletionsWritten, EvaluationDone, Events
from worker.trainer.loading import load_policy
from worker.trainer.model import Base, Policy
from worker.trainer.rendering import Renderer
from worker.trainer.sampling import Sampling, Wanted, batches, sample

PART_SECONDS = 5.0
MAX_PROMPT_TOKENS = 1 << 30
MAX_COMPLETIONS = 1_000_000
BATCH_TOKENS = {"cpu": 16_384, "cuda": 131_072}
"""Of prompts and answers that are sampled at once, by device."""
BATCH_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 27}
"""Of the logits of one step."""
JUDGE_TOKENS = 512
"""Of what a model says as a judge."""
FIXED = -1.0
"""In the place of a temperature: an answer that was not sampled."""
Item = dict[str, Any]
CompletionKey = tuple[float, int, int]
"""The temperature of a completion, its row, and its number among those of the row."""
Key = TypeVar("Key", int, tuple[int, int])


@dataclass(frozen=True)
class Made:
    """A completion as it is kept: of row `row`, the `sample`-th at `temperature`."""

    temperature: float
    row: int
    sample: int
    ids: tuple[int, ...]
    ended: bool
    logp: float

    @property
    def key(self) -> tuple[float, int, int]:
        return self.temperature, self.row, self.sample


class Prompt(NamedTuple):
    """What a model answers: tokens, and the rest of the prompt's text, of which its first token is made too."""

    ids: tuple[int, ...]
    rest: str


class Evaluator:
    """One run over a work folder."""

    def __init__(self, folder: Path, events: Events, stopping: threading.Event, cache: Cache | None = None) -> None:
        self.folder, self.events, self.stopping = folder, events, stopping
        self.cache = cache or Cache(folder / "cache", events)
        self.spec = EvaluationSpec.model_validate_json((folder / "evaluation.json").read_text()).resolved()
        self.run_settings: dict[str, Any] = json.loads((folder / "run.json").read_text())

    def run(self) -> None:
        """Evaluate, and leave `output/items.jsonl`. Raises `UserError` or `Stopped`."""
        work = {
            "preference": self._preference,
            "reward_kl": self._reward_kl,
            "win_rate": self._win_rate,
            "agreement": self._agreement,
        }[self.spec.type]
        try:
            items = work()
        except torch.OutOfMemoryError as error:
            message = (
                "The model or one row does not fit into the GPU's memory. Lower 'max_length', or quantise the base."
            )
            raise UserError("out_of_memory", message, "candidate.model") from error
        output = self.folder / "output"
        output.mkdir(exist_ok=True)
        with (output / "items.jsonl").open("w") as file:
            for item in items:
                try:
                    file.write(json.dumps(item, ensure_ascii=False, allow_nan=False) + "\n")
                except ValueError as error:
                    message = f"Line {item['line']}: a log-prob or a reward is not a finite number."
                    raise UserError("not_finite", message, "candidate.model") from error
        self.events.emit(EvaluationDone(len(items)))

    # -- what each type does -----------------------------------------------------------------------------------

    def _preference(self) -> list[Item]:
        """The margin of implicit rewards of each pair, β·[log π/π_ref (chosen) − log π/π_ref (rejected)].

        The implicit reward is Rafailov et al. 2023, Eq. 5. `prompt_number` is shared by items of one prompt, here and
        in the other types.
        """
        candidate, baseline = self._pair_logps("candidate"), self._pair_logps("baseline")
        beta = self.run_settings["beta"]
        items = []
        for key in sorted(key for key in candidate if key in baseline):
            (chosen, rejected), (chosen_ref, rejected_ref) = candidate[key].logps, baseline[key].logps
            items.append(
                {
                    "line": key[0],
                    "prompt_number": candidate[key].prompt,
                    "margin": beta * ((chosen - chosen_ref) - (rejected - rejected_ref)),
                    "logps": [chosen, rejected],
                    "reference_logps": [chosen_ref, rejected_ref],
                    "tokens": list(candidate[key].tokens),
                }
            )
        return items

    def _reward_kl(self) -> list[Item]:
        """Of each completion its log-probs under candidate and reference, and what its reward says."""
        rows, made = self._examples(), dict[CompletionKey, Made]()
        policy, best_of = self._load("candidate"), cast(Side, self.spec.candidate).best_of
        prompts = self._prompts(policy, "candidate", rows)
        texts = {}
        for one in self._sampled(policy, "candidate", prompts, self.spec.sampling):
            made[one.key] = one
            texts[one.key] = self._text(policy, one, prompts[one.row], rows[one.row])
        vocabulary = policy.tokenizer.get_vocab()
        del policy
        best = self._best("candidate", best_of, texts, rows)
        groups = sorted(best)
        prompts_of = _numbered(rows)
        items = [
            self._item(made[best[group]], rows[group[1]], texts[best[group]])
            | {"sample": group[2], "prompt_number": prompts_of[group[1]], "logp": made[best[group]].logp}
            for group in groups
        ]
        if best_of is not None:
            for item in items:
                item["kl_bound"] = best_of.kl_bound
        else:
            answers = dataset.Rows.of(
                Row(rows[row].line, prompts[row].ids, (Response(made[key].ids, (True,) * len(made[key].ids)),))
                for key in groups for row in (key[1],)
            )  # fmt: skip
            for item, logp in zip(items, self._reference_logps(answers, vocabulary), strict=True):
                item["reference_logp"] = logp
        if self.spec.judge is not None:
            said = [(rows[group[1]], texts[best[group]]) for group in groups]
            rewards = self._rewards(self.spec.judge, "judge", said)
            for item, value in zip(items, rewards, strict=True):
                item["reward"] = value
        return items

    def _reference_logps(self, answers: dataset.Rows, vocabulary: dict[str, int]) -> list[float]:
        """The log-probs of completions under the baseline, which must have the candidate's `vocabulary`."""
        gc.collect()
        policy = self._load("baseline")
        if policy.tokenizer.get_vocab() != vocabulary:
            message = "Candidate and baseline have other tokenizers: the KL between them is not defined."
            raise UserError("invalid_value", message, "baseline.model")
        exactness.check(policy, answers, self.events)
        found: list[float] = reference.compute(policy, answers, tick=self._tick).logps.tolist()
        return found

    def _win_rate(self) -> list[Item]:
        """Of each row the answers of both sides, and what the judge says of them."""
        rows = self._examples()
        # What is there already first: what is wrong with it is said before anything is sampled.
        order = sorted(("candidate", "baseline"), key=lambda name: getattr(self.spec, name).model is not None)
        of = {name: self._side(name, getattr(self.spec, name), rows) for name in order}
        known = {key for found in of.values() for key in found}
        sampled = sorted(key for key in known if key[0] != FIXED)
        prompts = _numbered(rows)
        items: list[Item] = []
        for temperature, row, number in sampled or sorted(known):
            pair = {
                name: found.get((temperature, row, number), found.get((FIXED, row, 0))) for name, found in of.items()
            }
            if all(answer is not None for answer in pair.values()):
                shown = None if temperature == FIXED else temperature
                items.append({**_named(rows[row], row, prompts[row]), "temperature": shown, "sample": number, **pair})
        self._judge(items, rows)
        return items

    def _agreement(self) -> list[Item]:
        """Of each two answers to a prompt how often people prefer which, and what the judge says of them.

        Rows with the same prompt and the same two answers are what several people said. The answers are called
        `first` and `second` by their text, so that their names say nothing of what is preferred.
        """
        rows = self._examples()
        prompts = _numbered(rows)
        items: dict[tuple[int, str, str], Item] = {}
        for row, example in rows.items():
            chosen, rejected = data.said(example.responses[0]), data.said(example.responses[-1])
            first, second = sorted((chosen, rejected))
            found = items.setdefault(
                (prompts[row], first, second),
                _named(example, row, prompts[row]) | {"first": first, "second": second, "votes": [0, 0]},
            )
            found["votes"][chosen != first] += 1
        self._judge(list(items.values()), rows)
        return list(items.values())

    # -- models ------------------------------------------------------------------------------------------------

    def _load(self, name: str) -> Policy:
        """The model of a side, without anything that trains."""
        gc.collect()  # what was loaded before is in cycles
        folder, settings = self.folder / "sides" / name, self.run_settings["sides"][name]
        start = folder / "start" if (folder / "start").exists() else None
        spec = JobSpec.model_validate(
            {
                "model": settings["model"],
                "training_file": "-",
                "quantization": settings["quantization"],
                "seed": 0,
                "double_quantization": settings.get("double_quantization"),
                "compute_dtype": settings.get("compute_dtype"),
            }
        )
        base = Base(settings["base_model"], None, settings["version"], folder / "base")
        policy = load_policy(spec.resolved(), base, start, self.events, trainable=False)
        self.events.message(f"'{settings['model']}' is loaded on {policy.device.type}.")
        return policy

    def _tick(self) -> None:
        if self.stopping.is_set():
            raise Stopped

    # -- rows --------------------------------------------------------------------------------------------------

    def _examples(self) -> dict[int, Example]:
        """The rows of the data by their number in the file, those that are drawn."""
        with (self.folder / self.spec.data).open("rb") as file:
            found = dict(numbered_examples(file, self.spec.mapping))
        return {row: found[row] for row in sorted(self._drawn(found))}

    def _drawn(self, keys: Collection[Key]) -> set[Key]:
        """`max_rows` of the rows, always the same ones for a seed."""
        if self.spec.max_rows is None or len(keys) <= self.spec.max_rows:
            return set(keys)
        ranked = sorted(keys, key=lambda key: sha256(f"{self.spec.seed} {key}".encode()).digest())
        return set(ranked[: self.spec.max_rows])

    @dataclass(frozen=True)
    class _Pair:
        logps: tuple[float, float]
        tokens: tuple[int, int]
        prompt: int
        """A number that pairs of one prompt share."""

    def _pair_logps(self, name: str) -> "dict[tuple[int, int], Evaluator._Pair]":
        """The log-probs of all pairs under a side's model, by line and place among the pairs of that line."""
        policy = self._load(name)
        recipe = Recipe(
            Kind.PREFERENCE, self._max_length(policy), mapping=self.spec.mapping, rendering=self._rendering(name)
        )
        rows, _ = dataset.load(self.folder / self.spec.data, policy.tokenizer, recipe, self.cache)
        if not len(rows):
            raise UserError("invalid_file", "No row of the data is left to evaluate.", "data")
        seen, keys = Counter[int](), []
        for line in rows.lines:
            keys.append((line, seen[line]))
            seen[line] += 1
        dataset.require_embedded(rows, policy.tokenizer, policy.causal.config, policy.name)
        drawn = self._drawn(keys)
        rows, keys = rows.where([key in drawn for key in keys]), [key for key in keys if key in drawn]
        exactness.check(policy, rows, self.events)
        found = reference.find(policy, policy.digest(), rows, None, self.cache, self._tick)
        prompts: dict[bytes, int] = {}
        pairs = {}
        for number, (key, row, prompt) in enumerate(zip(keys, rows, rows.prompts(), strict=True)):
            chosen, rejected = found.logps[found.first[number] :][:2].tolist()
            tokens = (sum(row.responses[0].scored), sum(row.responses[1].scored))
            pairs[key] = self._Pair((chosen, rejected), tokens, prompts.setdefault(prompt, len(prompts)))
        return pairs

    @staticmethod
    def _context(policy: Policy) -> int:
        return context_length(policy.causal.config.to_dict()) or DEFAULT_MAX_LENGTH

    def _max_length(self, policy: Policy) -> int:
        context = self._context(policy)
        return min(self.spec.max_length or context, context)

    def _rendering(self, name: str) -> Rendering:
        """How the model of a side reads conversations: as it was trained."""
        return Rendering(**self.run_settings["sides"].get(name, {}).get("rendering", vars(self.spec.rendering)))

    def _prompts(self, policy: Policy, name: str, rows: dict[int, Example]) -> dict[int, Prompt]:
        """The prompts of a side's model, as it was trained on them: at most so long that an answer has room."""
        assert self.spec.sampling is not None
        room = self._max_length(policy) - self.spec.sampling.max_tokens
        if room < 1:
            message = f"'max_tokens' leaves no room for a prompt in the model's {self._max_length(policy)} tokens."
            raise UserError("invalid_value", message, "sampling.max_tokens")
        renderer = Renderer(policy.tokenizer, self._rendering(name))
        recipe = Recipe(Kind.RANKED, room)
        return {row: Prompt(*data.prompt_ids(example, renderer, recipe)) for row, example in rows.items()}

    # -- answers -----------------------------------------------------------------------------------------------

    def _side(self, name: str, side: Side, rows: dict[int, Example]) -> dict[tuple[float, int, int], str]:
        """The answers of a side by temperature, row and number."""
        if side.answers is not None:
            place = 0 if side.answers == "chosen" else -1
            good = {row: example for row, example in rows.items() if example.desirable}
            return {(FIXED, row, 0): data.said(example.responses[place]) for row, example in good.items()}
        if side.file is not None:
            with (self.folder / side.file).open("rb") as file:
                given = {row: example for row, example in numbered_examples(file, side.mapping) if row in rows}
            for row, example in given.items():
                if data.written(example) != data.written(rows[row]):
                    message = f"Line {example.line}: the answer is to another prompt than that of the data."
                    raise UserError("invalid_file", message, f"{name}.file")
            if len(given) < len(rows):
                text = f"{name}: {len(rows) - len(given)} of {len(rows)} rows have no answer and are left out."
                self.events.message(text, level="warn")
            return {(FIXED, row, 0): data.said(example.responses[0]) for row, example in given.items()}
        policy = self._load(name)
        prompts = self._prompts(policy, name, rows)
        made = self._sampled(policy, name, prompts, self.spec.sampling)
        texts = {one.key: self._text(policy, one, prompts[one.row], rows[one.row]) for one in made}
        del policy
        return {key: texts[best] for key, best in self._best(name, side.best_of, texts, rows).items()}

    def _best(
        self, name: str, best_of: BestOf | None, texts: dict[CompletionKey, str], rows: dict[int, Example]
    ) -> dict[CompletionKey, CompletionKey]:
        """The completions of a side that count, by temperature, row and number: of each `n` the one that is best."""
        if best_of is None:
            return {key: key for key in texts}
        gc.collect()
        keys = sorted(texts)
        scores = self._rewards(best_of.by, f"{name}.best_of.by", [(rows[key[1]], texts[key]) for key in keys])
        found: dict[CompletionKey, tuple[float, CompletionKey]] = {}
        for key, score in zip(keys, scores, strict=True):
            group = key[0], key[1], key[2] // best_of.n
            if group not in found or score > found[group][0]:
                found[group] = score, key
        return {group: key for group, (_, key) in found.items()}

    def _sampled(
        self, policy: Policy, name: str, prompts: "dict[int, Prompt]", spec: SamplingSpec | None
    ) -> Iterator[Made]:
        """All completions of a model: those of the parts that are there, then new ones, in parts of their own."""
        assert spec is not None
        of = self._samples_of(name)
        sides = [name] if name == "judge" or self.spec.type != "win_rate" else ["candidate", "baseline"]
        each = sum(self._samples_of(side) if temperature else 1 for temperature in spec.temperatures
                   for side in sides if side == "judge" or getattr(self.spec, side).model is not None)  # fmt: skip
        self._total = each * len(prompts)
        if self._total > MAX_COMPLETIONS:
            message = f"{self._total} completions are more than {MAX_COMPLETIONS}: give 'max_rows', or fewer samples."
            raise UserError("invalid_value", message, "sampling.samples")
        # Two sides that drew with the same random numbers would be alike in more than what they are: of independent
        # answers the win rate is another. Seeds of users are below 2³¹.
        seed = (self.spec.seed or 0) + (1 << 31 if name == "baseline" else 0)
        settings = policy.causal.generation_config.eos_token_id
        ends = {*Renderer(policy.tokenizer, self._rendering(name)).ends}
        ends |= {*(settings if isinstance(settings, list) else [settings])} - {None}
        there = {one.key: one for one in self._kept(name)}
        self.events.message(f"{name}: {len(there)} completions are there already.")
        most = (
            1
            if policy.one_by_one
            else max(1, BATCH_LOGITS[policy.device.type] // policy.causal.config.get_text_config().vocab_size)
        )
        fresh, written = list[Made](), time.monotonic() - PART_SECONDS
        for temperature in spec.temperatures:
            sampling = Sampling(temperature, spec.top_p, spec.max_tokens, seed)
            numbers = range(of if temperature else 1)
            wanted = [Wanted(row, number, prompt.ids) for row, prompt in prompts.items() for number in numbers]
            # The same batches each time, and whole ones: a run that was broken off comes to the same bits.
            for batch in batches(wanted, BATCH_TOKENS[policy.device.type], spec.max_tokens, most):
                keys = [(temperature, one.row, one.sample) for one in batch]
                if not all(key in there for key in keys):
                    try:
                        made = self._batch(policy, batch, sampling, ends)
                    except Stopped:
                        self._keep(name, fresh)
                        raise
                    fresh += made
                    there |= {one.key: one for one in made}
                    if time.monotonic() - written > PART_SECONDS:
                        self._keep(name, fresh)
                        fresh, written = [], time.monotonic()
                yield from (there[key] for key in keys)
        self._keep(name, fresh)

    def _samples_of(self, name: str) -> int:
        """How many completions of each prompt a side's model makes."""
        side: Side | None = None if name == "judge" else getattr(self.spec, name)
        samples = self.spec.sampling.samples if self.spec.sampling is not None and name != "judge" else 1
        return samples * (side.best_of.n if side is not None and side.best_of is not None else 1)

    def _batch(self, policy: Policy, batch: list[Wanted], sampling: Sampling, ends: Collection[int]) -> list[Made]:
        """The completions of a batch; of its halves, where the whole does not fit into memory."""
        try:
            return [
                Made(sampling.temperature, one.row, one.sample, one.ids, one.ended, one.logp)
                for one in sample(policy, batch, sampling, ends, self._tick)
            ]
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
        gc.collect()
        torch.cuda.empty_cache()
        half = len(batch) // 2
        return [made for part in (batch[:half], batch[half:]) for made in self._batch(policy, part, sampling, ends)]

    def _kept(self, name: str) -> Iterator[Made]:
        for path in sorted((self.folder / "parts").glob(f"{name}-*.jsonl")):
            for line in path.read_text().splitlines():
                found = json.loads(line)
                yield Made(**found | {"ids": tuple(found["ids"])})

    def _keep(self, name: str, made: list[Made]) -> None:
        """Hand completions over, so that they need not be made again."""
        if not made:
            return
        folder = self.folder / "parts"
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}-{len(list(folder.iterdir())):05d}-{self.run_settings['attempt']}.jsonl"
        path.write_text("".join(json.dumps(vars(one)) + "\n" for one in made))
        self.events.emit(CompletionsWritten(f"parts/{path.name}", len(made), self._total))

    def _text(self, policy: Policy, one: Made, prompt: "Prompt", example: Example) -> str:
        """The answer as data has it: without the end of the prompt's text that its first token was made of too."""
        ids = one.ids[:-1] if one.ended else one.ids
        text: str = policy.tokenizer.decode(ids, skip_special_tokens=True).removeprefix(prompt.rest)
        as_it_is = policy.tokenizer.chat_template is None and isinstance(example.prompt, str)
        return text if as_it_is else text.strip()

    @staticmethod
    def _item(one: Made, example: Example, text: str) -> Item:
        return {
            "line": example.line, "row": one.row, "temperature": one.temperature, "sample": one.sample,
            "prompt": data.written(example), "text": text, "tokens": len(one.ids), "ended": one.ended,
        }  # fmt: skip

    # -- judges ------------------------------------------------------------------------------------------------

    def _judge(self, items: list[Item], rows: dict[int, Example]) -> None:
        """Add to each item how long its two answers are and what the judge says of them; an endpoint is asked later."""
        judge, sides = self.spec.judge, self.spec.sides_named
        for item in items:
            item |= {f"{name}_characters": len(item[name]) for name in sides}
        if judge is None or judge.endpoint is not None:
            return
        if judge.asked:
            self._ask(judge, items)
            return
        for name in sides:
            rewards = self._rewards(judge, "judge", [(rows[item["row"]], item[name]) for item in items])
            for item, value in zip(items, rewards, strict=True):
                item[f"{name}_reward"] = value

    def _ask(self, judge: Judge, items: list[Item]) -> None:
        """Have a model say which answer of each item it prefers, as an endpoint would be asked; greedily."""
        asked = [(number, text) for number, item in enumerate(items)
                 for text in questions(judge, item, self.spec.sides_named)]  # fmt: skip
        policy = self._load("judge")
        room = self._context(policy) - JUDGE_TOKENS
        renderer, prompts = Renderer(policy.tokenizer, self._rendering("judge")), {}
        for place, (_, text) in enumerate(asked):
            example = Example(0, [{"role": "user", "content": text}], ())
            prompt = Prompt(*data.prompt_ids(example, renderer, Recipe(Kind.RANKED, MAX_PROMPT_TOKENS)))
            if len(prompt.ids) <= room:
                prompts[place] = prompt
        if len(prompts) < len(asked):
            text = f"{len(asked) - len(prompts)} of {len(asked)} questions do not fit into the judge's context."
            self.events.message(text, level="warn")
        said: list[list[str | None]] = [[] for _ in items]
        made = self._sampled(policy, "judge", prompts, SamplingSpec(temperatures=[0.0], max_tokens=JUDGE_TOKENS))
        texts = {one.row: policy.tokenizer.decode(one.ids, skip_special_tokens=True) for one in made}
        for place, (number, _) in enumerate(asked):
            said[number].append(texts.get(place))
        for item, answers in zip(items, said, strict=True):
            sides = self.spec.sides_named
            item |= {"asked": bool(answers), "verdicts": verdicts(answers, sides), "judgements": answers}

    def _rewards(self, scorer: Scorer | Judge, name: str, answers: list[tuple[Example, str]]) -> list[float]:
        """The score of each answer to its prompt, by a scorer whose model is the side `name`."""
        if scorer.classifier is not None:
            try:
                classifier = LinearClassifier.load(self.folder / scorer.classifier.file)
            except BadClassifier as error:
                message = f"The file is not a classifier: {error}"
                raise UserError("invalid_file", message, f"{name}.classifier.file") from error
            return [classifier.score(_whole(example, text)) for example, text in answers]
        answered = [
            replace(example, responses=(text,), desirable=True, raw=False, turns=()) for example, text in answers
        ]
        place, rendering = self.folder / "sides" / name / "base", self._rendering(name)
        return reward.scores(place, answered, rendering, self.spec.max_length, self._tick)


def _whole(example: Example, answer: str) -> str:
    """A prompt and its answer as one text, as a model without a chat template would read it."""
    return data.written(example) + ("" if isinstance(example.prompt, str) else " ") + answer


def _named(example: Example, row: int, prompt: int) -> Item:
    return {"line": example.line, "row": row, "prompt_number": prompt, "prompt": data.written(example)}


def _numbered(rows: dict[int, Example]) -> dict[int, int]:
    """A number for the prompt of each row, which rows of one prompt share."""
    numbers: dict[str, int] = {}
    return {row: numbers.setdefault(data.written(example), len(numbers)) for row, example in rows.items()}

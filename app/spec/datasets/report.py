"""The report of a file: counts, lengths, samples and warnings, gathered while its examples are read."""

import math
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field

from app.spec.datasets.columns import LABEL_ALIASES, plain_name
from app.spec.datasets.errors import DatasetError, Dropped
from app.spec.datasets.example import Example, Kind, Message, PromptContent, ResponseContent
from app.spec.datasets.labels import LabelScheme
from app.spec.json_types import JsonObject

MAX_ISSUES = 1000
MAX_DUPLICATES = 100
MAX_REMEMBERED = 2_000_000
"""Maximum number of rows among which duplicates are found. Their hashes take 150 MB."""
MAX_SAMPLES, SHOWN_CHARACTERS = 3, 600
"""Number of sample rows in a report, and the length to which their texts are cut."""


class Lengths:
    """A histogram of lengths, with a bin for each power of two. Memory use does not grow with their number."""

    def __init__(self) -> None:
        self.total, self.longest = 0, 0
        self._bins = [0] * 64

    def add(self, length: int) -> None:
        self.total += length
        if length > self.longest:
            self.longest = length
        self._bins[length.bit_length()] += 1

    @property
    def count(self) -> int:
        return sum(self._bins)

    def as_json(self) -> JsonObject:
        """The lengths as JSON. A bin of `histogram` counts the lengths from `from` to below `to`."""
        last = self.longest.bit_length()
        bins = [
            {"from": (1 << k) >> 1, "to": 1 << k, "count": self._bins[k]} for k in range(last + 1 if self.count else 0)
        ]
        mean = self.total / self.count if self.count else 0.0
        return {"count": self.count, "mean": round(mean, 1), "max": self.longest, "histogram": bins}


@dataclass(frozen=True)
class Outline:
    """The figures of a file for an estimate: usable rows, and characters of their texts. `summary` is a sentence."""

    summary: str
    kept: int
    prompts: int
    best: int
    worst: int
    longest: int
    """Characters of the longest prompt or best answer."""


@dataclass
class Report:
    """The contents of a file. `issues` lists the first dropped rows with line, field and reason."""

    format: str = ""
    kind: Kind = Kind.SUPERVISED
    rows: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    issues: list[JsonObject] = field(default_factory=list)
    duplicates: int = 0
    """Number of kept rows that repeat an earlier one."""
    duplicate_lines: list[dict[str, int]] = field(default_factory=list)
    """The first duplicates: `line`, and the `first_line` that it repeats."""
    contradictions: int = 0
    """Number of kept rows with the texts of an earlier row, but another verdict."""
    contradiction_lines: list[dict[str, int]] = field(default_factory=list)
    conversations: int = 0
    """Number of rows whose prompt has earlier turns or a system prompt."""
    with_tools: int = 0
    with_reasoning: int = 0
    empty_prompts: int = 0
    desirable: int = 0
    undesirable: int = 0
    chosen_longer: int = 0
    chosen_shorter: int = 0
    prompts: Lengths = field(default_factory=Lengths)
    best: Lengths = field(default_factory=Lengths)
    worst: Lengths = field(default_factory=Lengths)
    scheme: LabelScheme | None = None
    """The meanings of the values in a verdict or label column, with their counts."""
    unread: Counter[str] = field(default_factory=Counter)
    """Columns and keys of messages that nothing reads, each with the number of rows that have it."""
    samples: list[Example] = field(default_factory=list)
    count_prompts: bool = False
    """Whether to fill `prompt_counts`."""
    prompt_counts: Counter[int] = field(default_factory=Counter)
    """Number of rows by the hash of their prompt, to find the prompts of another file that occur in this one."""
    error: JsonObject | None = None
    """The first row that cannot be understood. No row after it was read."""
    _first_rows: dict[int, int] = field(default_factory=dict)
    """The first row of each set of texts: hash of the texts → line << 32 | lower 32 bits of the hash of the verdict."""

    def add(self, example: Example) -> None:
        """Count a kept example."""
        self.rows += 1
        self.kept += 1
        if self.count_prompts and len(self.prompt_counts) < MAX_REMEMBERED:
            self.prompt_counts[hash(example.prompt_key)] += 1
        prompt, responses = example.prompt, example.responses
        prompt_text: Hashable
        if isinstance(prompt, str):
            prompt_text, size = prompt + example.system, len(prompt) + len(example.system)
            if example.system:
                self.conversations += 1
        else:
            prompt_text, size = tuple(map(_turn_key, prompt)), sum([len(turn["content"]) for turn in prompt])
            self.conversations += len(prompt) > 1
        self.prompts.add(size)
        if example.tools:
            self.with_tools += 1
            prompt_text = (prompt_text, repr(example.tools))
        texts: list[Hashable] = [
            response if isinstance(response, str) else self._turns(response) for response in responses
        ]
        if texts:
            best = _characters(responses[0])
            self.best.add(best)
            if len(texts) > 1:
                worst = _characters(responses[-1])
                self.worst.add(worst)
                if best > worst:
                    self.chosen_longer += 1
                elif best < worst:
                    self.chosen_shorter += 1
        if self.kind == Kind.LABELLED:
            if example.desirable:
                self.desirable += 1
            else:
                self.undesirable += 1
        if not size and not example.raw:
            self.empty_prompts += 1
        self._find_duplicate(hash((prompt_text, frozenset(texts))), hash((*texts, example.desirable)), example.line)
        if len(self.samples) < MAX_SAMPLES or self._one_sided(example):
            self.samples = [*self.samples[: MAX_SAMPLES - 1], example]

    def _turns(self, response: list[Message]) -> Hashable:
        """A hashable form of an answer that is a list of turns. Also counts answers with reasoning."""
        self.with_reasoning += any("reasoning" in turn for turn in response)
        return tuple(map(_turn_key, response))

    def _find_duplicate(self, texts: int, verdict: int, line: int) -> None:
        """Count a row as a duplicate or a contradiction of an earlier row. `texts` and `verdict` are hashes."""
        verdict &= 0xFFFFFFFF
        first = self._first_rows.get(texts)
        if first is None:
            if len(self._first_rows) < MAX_REMEMBERED:
                self._first_rows[texts] = line << 32 | verdict
            return
        lines = {"line": line, "first_line": first >> 32}
        if first & 0xFFFFFFFF == verdict:
            self.duplicates += 1
            if len(self.duplicate_lines) < MAX_DUPLICATES:
                self.duplicate_lines.append(lines)
        else:
            self.contradictions += 1
            if len(self.contradiction_lines) < MAX_DUPLICATES:
                self.contradiction_lines.append(lines)

    def _one_sided(self, example: Example) -> bool:
        """Whether all samples have the other label. The report should show both labels."""
        return self.kind == Kind.LABELLED and all(sample.desirable != example.desirable for sample in self.samples)

    def drop(self, line: int, dropped: Dropped) -> None:
        """Count a dropped row."""
        self.rows += 1
        self.dropped[dropped.reason] = self.dropped.get(dropped.reason, 0) + 1
        if len(self.issues) < MAX_ISSUES:
            self.issues.append({"line": line, "field": dropped.field, "reason": dropped.reason})

    def fail(self, error: DatasetError) -> None:
        """Record that the file cannot be understood or has no rows."""
        self.error = {
            "line": error.line, "field": error.field, "reason": error.reason, "message": str(error),
            "mapping": error.mapping,
        }  # fmt: skip

    def summary(self) -> str:
        """The counts of kept and dropped rows in one sentence."""
        text = f"{self.kept} of {self.rows} rows kept ({self.format})"
        if self.dropped:
            text += ", dropped: " + ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))
        return text

    def outline(self) -> Outline:
        """The outline of the file."""
        longest = max(self.prompts.longest, self.best.longest)
        return Outline(self.summary(), self.kept, self.prompts.total, self.best.total, self.worst.total, longest)

    def as_json(self) -> JsonObject:
        """The report as `GET /v1/files/{id}/report` returns it. Lengths are in characters."""
        pairs = self.worst.count
        answers = {"chosen": self.best, "rejected": self.worst} if pairs else {"answer": self.best}
        report: JsonObject = {
            "valid": self.error is None and self.kept > 0,
            "format": self.format or None,
            "kind": self.kind.value if self.format else None,
            "rows": self.rows,
            "kept": self.kept,
            "dropped": self.dropped,
            "issues": self.issues,
            "error": self.error,
            "duplicates": {"rows": self.duplicates, "lines": self.duplicate_lines},
            "contradictions": {"rows": self.contradictions, "lines": self.contradiction_lines},
            "unread": dict(self.unread),
            "conversations": self.conversations,
            "with_tools": self.with_tools,
            "with_reasoning": self.with_reasoning,
            "characters": {name: lengths.as_json() for name, lengths in ({"prompt": self.prompts} | answers).items()},
            "chosen_longer_rate": round(self.chosen_longer / pairs, 4) if pairs else None,
            "labels": {"desirable": self.desirable, "undesirable": self.undesirable}
            if self.kind == Kind.LABELLED and self.kept
            else None,
            "values": None if self.scheme is None else _scheme_json(self.scheme),
            "samples": [_sample(example, self.kind) for example in self.samples],
        }
        report["warnings"] = self._warnings()
        return report

    def _warnings(self) -> list[str]:
        """Warnings about properties of the data that often harm training."""
        warnings = []
        pairs = self.worst.count
        compared = self.chosen_longer + self.chosen_shorter
        if compared >= 20:
            share, chance = self.chosen_longer / compared, 0.5 / math.sqrt(compared)
            if abs(share - 0.5) > max(0.1, 3 * chance):
                longer = "longer" if share > 0.5 else "shorter"
                warnings.append(
                    f"The preferred answer is the {longer} one in {max(share, 1 - share):.0%} of pairs: the model may "
                    "learn length. Compare 'rewards/accuracies' with it, or try the loss 'simpo' or 'ld_alpha'."
                )
        if self.contradictions:
            first = self.contradiction_lines[0]
            warnings.append(
                f"{self.contradictions} rows have the texts of an earlier row and say the opposite, for example line "
                f"{first['line']} and line {first['first_line']}: they cancel each other out."
            )
        if self.kept and self.duplicates > 0.05 * self.kept:
            warnings.append(f"{self.duplicates} of {self.kept} rows repeat an earlier one; each copy is trained on.")
        if self.rows >= 20 and self.rows - self.kept > 0.1 * self.rows:
            warnings.append(f"{self.rows - self.kept} of {self.rows} rows are left out; 'dropped' says why.")
        if self.kind == Kind.LABELLED and self.kept:
            warnings += self._label_warnings()
        if self.kind == Kind.SUPERVISED:
            warnings += [
                f"The column '{name}' is not read: all answers are trained on. To use it, map it to 'label'."
                for name in self.unread
                if plain_name(name) in LABEL_ALIASES
            ]
        if self.format == "implicit_prompt" and self.kept:
            warnings.append(
                "There is no column 'prompt': the text that both answers begin with is used, "
                f"{self.prompts.total / self.kept:.0f} characters on average."
            )
        if self.empty_prompts:
            warnings.append(f"{self.empty_prompts} rows have an empty prompt.")
        if 0 < self.kept < 10:
            warnings.append(f"{self.kept} rows are very few for a training.")
        if pairs and self.with_tools:
            warnings.append("Tool calls are shown to the model as its chat template writes them; check the samples.")
        return warnings

    def _label_warnings(self) -> list[str]:
        good, bad = self.desirable, self.undesirable
        if not good or not bad:
            return ["All answers have the same label, so there is nothing to compare."]
        if max(good, bad) > 4 * min(good, bad):
            return [
                f"{good} answers are good and {bad} are not: set 'desirable_weight' and 'undesirable_weight' so "
                "that weight times number is about the same."
            ]
        return []


def _turn_key(turn: Message) -> Hashable:
    """A hashable form of a turn."""
    return (turn["role"], turn["content"]) if len(turn) == 2 else repr(turn)


def _characters(response: ResponseContent) -> int:
    """The length of an answer with the reasoning of its turns, in characters."""
    if isinstance(response, str):
        return len(response)
    return sum(len(turn["content"]) + len(turn.get("reasoning", "")) for turn in response)


def _scheme_json(scheme: LabelScheme) -> JsonObject:
    counted = sorted(scheme.counts.items(), key=lambda entry: -entry[1])
    listed = [{"value": value, "means": meaning, "rows": rows} for (value, meaning), rows in counted]
    return {"column": scheme.column, "values": listed}


def _sample(example: Example, kind: Kind) -> JsonObject:
    """An example as the report shows it: the prompt, and each answer with its role, such as chosen or rank 2."""
    answers = []
    for position, response in enumerate(example.responses):
        counts_for = "answer"
        if kind == Kind.PREFERENCE:
            counts_for = ("chosen", "rejected")[position]
        elif kind == Kind.RANKED:
            counts_for = f"rank {position + 1}"
        elif kind == Kind.LABELLED:
            counts_for = "desirable" if example.desirable else "undesirable"
        answers.append({"counts_for": counts_for, "text": _shortened(response)})
    prompt: PromptContent = example.conversation if example.system else example.prompt
    return {"line": example.line, "prompt": _shortened(prompt), "answers": answers}


def _shortened(turns: PromptContent | ResponseContent) -> str:
    """Text, or turns with their roles, cut to `SHOWN_CHARACTERS`."""
    text = turns if isinstance(turns, str) else "\n".join(f"{turn['role']}: {_turn_text(turn)}" for turn in turns)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"


def _turn_text(turn: Message) -> str:
    reasoning = f"(thinks: {turn['reasoning']}) " if "reasoning" in turn else ""
    calls = [f"{call['function']['name']}({call['function']['arguments']})" for call in turn.get("tool_calls", [])]
    return reasoning + turn["content"] + (" → " + ", ".join(calls) if calls else "")

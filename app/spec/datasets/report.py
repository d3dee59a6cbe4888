"""What a file holds: counted as its examples go by."""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from app.spec.datasets.columns import LOOKS_LIKE_A_LABEL, plain_name
from app.spec.datasets.errors import DatasetError, Dropped
from app.spec.datasets.example import Example, Kind, Message, Prompt, Response
from app.spec.datasets.labels import Scheme

MAX_ISSUES = 1000
MAX_DUPLICATES = 100
MAX_REMEMBERED = 2_000_000
"""Rows in which duplicates are looked for: 150 MB of hashes."""
SHOWN, SHOWN_CHARACTERS = 3, 600
"""Rows that are shown, and how much of each of their texts."""


class Lengths:
    """How long some texts are, in powers of two: memory does not grow with their number."""

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

    def as_json(self) -> dict[str, Any]:
        """`histogram` counts the lengths from `from` up to, not including, `to`."""
        last = self.longest.bit_length()
        bins = [
            {"from": (1 << k) >> 1, "to": 1 << k, "count": self._bins[k]} for k in range(last + 1 if self.count else 0)
        ]
        mean = self.total / self.count if self.count else 0.0
        return {"count": self.count, "mean": round(mean, 1), "max": self.longest, "histogram": bins}


@dataclass
class Report:
    """What a file holds. `issues` names the first rows that were dropped, with line, field and reason."""

    format: str = ""
    kind: Kind = Kind.SUPERVISED
    rows: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    issues: list[dict[str, Any]] = field(default_factory=list)
    duplicates: int = 0
    """Kept rows that say what an earlier one says."""
    duplicate_lines: list[dict[str, int]] = field(default_factory=list)
    """The first of them: `line`, and `first_line` that it repeats."""
    contradictions: int = 0
    """Kept rows that say of the same texts the opposite of what an earlier one says."""
    contradiction_lines: list[dict[str, int]] = field(default_factory=list)
    conversations: int = 0
    """Rows whose prompt has earlier turns, or a system prompt."""
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
    scheme: Scheme | None = None
    """What the values of a column of verdicts or labels were taken to mean, with their counts."""
    unread: Counter[str] = field(default_factory=Counter)
    """Columns, and members of messages, that nothing reads, with the rows that have them."""
    samples: list[Example] = field(default_factory=list)
    keeps_asked: bool = False
    asked: Counter[int] = field(default_factory=Counter)
    """Rows by a hash of what they ask, where they are to be compared with those of another file."""
    error: dict[str, Any] | None = None
    """The first row that cannot be understood, after which nothing was read."""
    _seen: dict[int, int] = field(default_factory=dict)
    """By a hash of a row's texts, its line and, in the lower 32 bits, a hash of what it says of them."""

    def add(self, example: Example) -> None:
        """Count a kept example."""
        self.rows += 1
        self.kept += 1
        if self.keeps_asked and len(self.asked) < MAX_REMEMBERED:
            self.asked[hash(example.asked)] += 1
        prompt, responses = example.prompt, example.responses
        said: Any
        if isinstance(prompt, str):
            said, size = prompt + example.system, len(prompt) + len(example.system)
            if example.system:
                self.conversations += 1
        else:
            said, size = tuple(map(_key, prompt)), sum([len(turn["content"]) for turn in prompt])
            self.conversations += len(prompt) > 1
        self.prompts.add(size)
        if example.tools:
            self.with_tools += 1
            said = (said, repr(example.tools))
        texts: list[Any] = [one if isinstance(one, str) else self._turns(one) for one in responses]
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
        self._compare(hash((said, frozenset(texts))), hash((*texts, example.desirable)), example.line)
        if len(self.samples) < SHOWN or self._one_sided(example):
            self.samples = [*self.samples[: SHOWN - 1], example]

    def _turns(self, response: list[Message]) -> Any:
        """An answer of several turns, or with reasoning, to compare."""
        self.with_reasoning += any("reasoning" in turn for turn in response)
        return tuple(map(_key, response))

    def _compare(self, texts: int, verdict: int, line: int) -> None:
        """Look for an earlier row of the same texts, which says the same or something else."""
        verdict &= 0xFFFFFFFF
        first = self._seen.get(texts)
        if first is None:
            if len(self._seen) < MAX_REMEMBERED:
                self._seen[texts] = line << 32 | verdict
            return
        places = {"line": line, "first_line": first >> 32}
        if first & 0xFFFFFFFF == verdict:
            self.duplicates += 1
            if len(self.duplicate_lines) < MAX_DUPLICATES:
                self.duplicate_lines.append(places)
        else:
            self.contradictions += 1
            if len(self.contradiction_lines) < MAX_DUPLICATES:
                self.contradiction_lines.append(places)

    def _one_sided(self, example: Example) -> bool:
        """Whether the samples are all of the other label: a person wants to see one of each."""
        return self.kind == Kind.LABELLED and all(one.desirable != example.desirable for one in self.samples)

    def drop(self, line: int, dropped: Dropped) -> None:
        """Count a row that teaches nothing."""
        self.rows += 1
        self.dropped[dropped.reason] = self.dropped.get(dropped.reason, 0) + 1
        if len(self.issues) < MAX_ISSUES:
            self.issues.append({"line": line, "field": dropped.field, "reason": dropped.reason})

    def fail(self, error: DatasetError) -> None:
        """The file cannot be understood, or holds nothing."""
        self.error = {
            "line": error.line, "field": error.field, "reason": error.reason, "message": str(error),
            "mapping": error.mapping,
        }  # fmt: skip

    def summary(self) -> str:
        """One sentence for people."""
        text = f"{self.kept} of {self.rows} rows kept ({self.format})"
        if self.dropped:
            text += ", dropped: " + ", ".join(f"{n} {reason}" for reason, n in sorted(self.dropped.items()))
        return text

    def as_json(self) -> dict[str, Any]:
        """The report as `GET /v1/files/{id}/report` answers it; lengths are in characters."""
        pairs = self.worst.count
        answers = {"chosen": self.best, "rejected": self.worst} if pairs else {"answer": self.best}
        found: dict[str, Any] = {
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
            "values": None if self.scheme is None else _values(self.scheme),
            "samples": [_shown(example, self.kind) for example in self.samples],
        }
        found["warnings"] = self._warnings()
        return found

    def _warnings(self) -> list[str]:
        """What someone who has trained on such data before would say."""
        said = []
        pairs = self.worst.count
        compared = self.chosen_longer + self.chosen_shorter
        if compared >= 20:
            share, chance = self.chosen_longer / compared, 0.5 / math.sqrt(compared)
            if abs(share - 0.5) > max(0.1, 3 * chance):
                longer = "longer" if share > 0.5 else "shorter"
                said.append(
                    f"The preferred answer is the {longer} one in {max(share, 1 - share):.0%} of pairs: the model may "
                    "learn length. Compare 'rewards/accuracies' with it, or try the loss 'simpo' or 'ld_alpha'."
                )
        if self.contradictions:
            first = self.contradiction_lines[0]
            said.append(
                f"{self.contradictions} rows say the opposite of an earlier one of the same texts (line "
                f"{first['line']} and line {first['first_line']}): they cancel each other out."
            )
        if self.kept and self.duplicates > 0.05 * self.kept:
            said.append(
                f"{self.duplicates} of {self.kept} rows repeat an earlier one; they count as often as they stand."
            )
        if self.rows >= 20 and self.rows - self.kept > 0.1 * self.rows:
            said.append(f"{self.rows - self.kept} of {self.rows} rows are left out; 'dropped' says why.")
        if self.kind == Kind.LABELLED and self.kept:
            said += self._about_labels()
        if self.kind == Kind.SUPERVISED:
            said += [
                f"The column '{name}' is not read: all answers are learned. If it says which are good, map it: 'label'."
                for name in self.unread
                if plain_name(name) in LOOKS_LIKE_A_LABEL
            ]
        if self.format == "implicit_prompt" and self.kept:
            said.append(
                "There is no column 'prompt': what both answers begin with is taken for it, "
                f"{self.prompts.total / self.kept:.0f} characters on average."
            )
        if self.empty_prompts:
            said.append(f"{self.empty_prompts} rows have an empty prompt.")
        if 0 < self.kept < 10:
            said.append(f"{self.kept} rows are very few.")
        if pairs and self.with_tools:
            said.append("Tool calls are shown to the model as its chat template writes them; check the samples.")
        return said

    def _about_labels(self) -> list[str]:
        good, bad = self.desirable, self.undesirable
        if not good or not bad:
            return ["All answers have the same label: nothing says what is better."]
        if max(good, bad) > 4 * min(good, bad):
            return [
                f"{good} answers are good and {bad} are not: set 'desirable_weight' and 'undesirable_weight' so "
                "that weight times number is about the same."
            ]
        return []


def _key(turn: Message) -> Any:
    """What a turn says, to compare."""
    return (turn["role"], turn["content"]) if len(turn) == 2 else repr(turn)


def _characters(response: Response) -> int:
    """How long an answer is: all that its turns say and think."""
    if isinstance(response, str):
        return len(response)
    return sum(len(turn["content"]) + len(turn.get("reasoning", "")) for turn in response)


def _values(scheme: Scheme) -> dict[str, Any]:
    counted = sorted(scheme.counts.items(), key=lambda entry: -entry[1])
    listed = [{"value": value, "means": meaning, "rows": rows} for (value, meaning), rows in counted]
    return {"column": scheme.column, "values": listed}


def _shown(example: Example, kind: Kind) -> dict[str, Any]:
    """An example for a person's eyes: what is asked, and each answer with what it counts for."""
    answers = []
    for place, response in enumerate(example.responses):
        counts_for = "answer"
        if kind == Kind.PREFERENCE:
            counts_for = ("chosen", "rejected")[place]
        elif kind == Kind.RANKED:
            counts_for = f"rank {place + 1}"
        elif kind == Kind.LABELLED:
            counts_for = "desirable" if example.desirable else "undesirable"
        answers.append({"counts_for": counts_for, "text": _written(response)})
    shown: Prompt = example.conversation if example.system else example.prompt
    return {"line": example.line, "prompt": _written(shown), "answers": answers}


def _written(turns: Prompt | Response) -> str:
    """Text, or turns with who says them; cut to what can be looked at."""
    text = turns if isinstance(turns, str) else "\n".join(f"{turn['role']}: {_said(turn)}" for turn in turns)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"


def _said(turn: Message) -> str:
    thought = f"(thinks: {turn['reasoning']}) " if "reasoning" in turn else ""
    calls = [f"{call['function']['name']}({call['function']['arguments']})" for call in turn.get("tool_calls", [])]
    return thought + turn["content"] + (" → " + ", ".join(calls) if calls else "")

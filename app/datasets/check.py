"""Read a whole file and say what it holds, what is useless in it, and whether it can be trained on."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from app.datasets.conversations import Dropped
from app.datasets.example import Example, Kind
from app.datasets.formats import Format, detect
from app.datasets.mapping import Mapping
from app.datasets.reader import DatasetError, records

MAX_ISSUES = 1000
MAX_DUPLICATES = 100
MAX_REMEMBERED = 2_000_000
"""Rows in which duplicates are looked for: 130 MB of hashes."""


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
    conversations: int = 0
    """Rows whose prompt has earlier turns, or a system prompt."""
    with_tools: int = 0
    desirable: int = 0
    undesirable: int = 0
    chosen_longer: int = 0
    chosen_shorter: int = 0
    prompts: Lengths = field(default_factory=Lengths)
    best: Lengths = field(default_factory=Lengths)
    worst: Lengths = field(default_factory=Lengths)
    error: dict[str, Any] | None = None
    """The first row that cannot be understood, after which nothing was read."""
    _seen: dict[int, int] = field(default_factory=dict)

    def add(self, example: Example) -> None:
        """Count a kept example."""
        self.rows += 1
        self.kept += 1
        prompt, responses = example.prompt, example.responses
        if isinstance(prompt, str):
            said: Any = prompt
            self.prompts.add(len(prompt))
        else:
            said = (repr(prompt), repr(example.tools) if example.tools else "")
            self.prompts.add(sum(len(turn["content"]) for turn in prompt))
            self.conversations += len(prompt) > 1
        if example.tools:
            self.with_tools += 1
        texts = tuple([one if type(one) is str else repr(one) for one in responses])
        best = len(texts[0]) if texts else 0
        if texts:
            self.best.add(best)
        if len(texts) > 1:
            worst = len(texts[-1])
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
        self._look_for_duplicate(hash((said, texts, example.desirable)), example.line)

    def _look_for_duplicate(self, key: int, line: int) -> None:
        first = self._seen.get(key)
        if first is not None:
            self.duplicates += 1
            if len(self.duplicate_lines) < MAX_DUPLICATES:
                self.duplicate_lines.append({"line": line, "first_line": first})
        elif len(self._seen) < MAX_REMEMBERED:
            self._seen[key] = line

    def drop(self, line: int, dropped: Dropped) -> None:
        """Count a row that teaches nothing."""
        self.rows += 1
        self.dropped[dropped.reason] = self.dropped.get(dropped.reason, 0) + 1
        if len(self.issues) < MAX_ISSUES:
            self.issues.append({"line": line, "field": dropped.field, "reason": dropped.reason})

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
            "conversations": self.conversations,
            "with_tools": self.with_tools,
            "characters": {name: lengths.as_json() for name, lengths in ({"prompt": self.prompts} | answers).items()},
            "chosen_longer_rate": round(self.chosen_longer / pairs, 4) if pairs else None,
            "labels": {"desirable": self.desirable, "undesirable": self.undesirable}
            if self.kind == Kind.LABELLED and self.kept
            else None,
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
        if self.kept and self.duplicates > 0.05 * self.kept:
            said.append(
                f"{self.duplicates} of {self.kept} rows repeat an earlier one; they count as often as they stand."
            )
        if self.rows >= 20 and self.rows - self.kept > 0.1 * self.rows:
            said.append(f"{self.rows - self.kept} of {self.rows} rows are left out; 'dropped' says why.")
        if self.kind == Kind.LABELLED and self.kept:
            good, bad = self.desirable, self.undesirable
            if not good or not bad:
                said.append("All answers have the same label: nothing says what is better.")
            elif max(good, bad) > 4 * min(good, bad):
                said.append(
                    f"{good} answers are good and {bad} are not: set 'desirable_weight' and 'undesirable_weight' so "
                    "that weight times number is about the same."
                )
        if 0 < self.kept < 10:
            said.append(f"{self.kept} rows are very few.")
        if pairs and self.with_tools:
            said.append("Tool calls are shown to the model as its chat template writes them; check the samples.")
        return said


def examples(file: IO[bytes], mapping: Mapping | None = None, report: Report | None = None) -> Iterator[Example]:
    """The usable examples of `file`, in order; `report` is filled in as they go by.

    Raises `DatasetError` at the first row that cannot be understood.
    """
    return (example for _, example in numbered_examples(file, mapping, report))


def numbered_examples(
    file: IO[bytes], mapping: Mapping | None = None, report: Report | None = None
) -> Iterator[tuple[int, Example]]:
    """The same, each with the number of its row, from 0 on: those that are left out are counted too."""
    format: Format | None = None
    for number, (line, record) in enumerate(records(file)):
        if mapping is not None:
            record = mapping.apply(record, line)
        if format is None:
            format = detect(record, line)
            if report is not None:
                report.format, report.kind = format.name, format.kind
        elif not format.needs <= record.keys():
            missing = sorted(format.needs - record.keys())[0]
            raise DatasetError(line, missing, f"is missing (the file's format is {format.name})")
        try:
            example = format.read(record, line)
        except Dropped as dropped:
            if report is not None:
                report.drop(line, dropped)
            continue
        if report is not None:
            report.add(example)
        yield number, example


NEEDS = {
    Kind.SUPERVISED: "answers",
    Kind.PREFERENCE: "pairs of a preferred and a rejected answer",
    Kind.RANKED: "ranked lists of answers",
    Kind.LABELLED: "answers with a label, good or bad",
}


def survey(file: IO[bytes], mapping: Mapping | None = None) -> Report:
    """Read all of `file`. What cannot be understood is the report's `error`."""
    report = Report()
    try:
        for _example in examples(file, mapping, report):
            pass
        if report.rows == 0:
            raise DatasetError(1, None, "the file has no rows")
    except DatasetError as error:
        report.error = {"line": error.line, "field": error.field, "reason": error.reason, "message": str(error)}
    return report


def require(report: Report, need: Kind) -> None:
    """Raise `DatasetError` where the file of `report` cannot be trained on by a method that needs `need`."""
    if report.error is not None:
        raise DatasetError(report.error["line"], report.error["field"], report.error["reason"])
    if not report.kind.serves(need):
        raise DatasetError(1, None, f"the method needs {NEEDS[need]}; this is {report.format} ({report.kind})")
    if report.kept == 0:
        raise DatasetError(1, None, f"no row is left to train on: {report.summary()}")


def check(file: IO[bytes], need: Kind, mapping: Mapping | None = None) -> Report:
    """Read all of `file`, whose examples must serve `need`.

    Raises `DatasetError` for a file that cannot be trained on.
    """
    report = survey(file, mapping)
    require(report, need)
    return report

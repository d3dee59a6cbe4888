"""Check a whole file: what it holds, what is useless, and whether it can be trained on."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import IO, Any

from app.datasets.example import Example, Kind
from app.datasets.formats import Dropped, Format, detect
from app.datasets.reader import DatasetError, records

MAX_ISSUES = 1000


@dataclass
class Report:
    """What a file holds. `issues` names the first rows that were dropped, with line and reason."""

    format: str = ""
    kind: Kind = Kind.SUPERVISED
    rows: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    issues: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> str:
        """One sentence for people."""
        text = f"{self.kept} of {self.rows} rows kept ({self.format})"
        if self.dropped:
            text += ", dropped: " + ", ".join(f"{n} {reason}" for reason, n in sorted(self.dropped.items()))
        return text


def examples(file: IO[bytes], report: Report) -> Iterator[Example]:
    """The usable examples of `file`, in order; `report` is filled in as they go by.

    Raises `DatasetError` at the first row that cannot be understood.
    """
    format: Format | None = None
    for line, record in records(file):
        if format is None:
            format = detect(record, line)
            report.format, report.kind = format.name, format.kind
        elif not format.needs <= record.keys():
            missing = sorted(format.needs - record.keys())[0]
            raise DatasetError(line, missing, f"is missing (the file's format is {format.name})")
        report.rows += 1
        try:
            example = format.read(record, line)
        except Dropped as dropped:
            report.dropped[dropped.reason] = report.dropped.get(dropped.reason, 0) + 1
            if len(report.issues) < MAX_ISSUES:
                report.issues.append({"line": line, "field": dropped.field, "reason": dropped.reason})
            continue
        report.kept += 1
        yield example


NEEDS = {
    Kind.PREFERENCE: "pairs of a preferred and a rejected answer",
    Kind.RANKED: "ranked lists of answers",
    Kind.LABELLED: "answers with a label, good or bad",
}


def check(file: IO[bytes], need: Kind) -> Report:
    """Read all of `file`, whose examples must serve `need`.

    Raises `DatasetError` for a file that cannot be trained on.
    """
    report = Report()
    for _example in examples(file, report):
        pass
    if report.rows == 0:
        raise DatasetError(1, None, "the file has no rows")
    if not report.kind.serves(need):
        raise DatasetError(1, None, f"the method needs {NEEDS[need]}; this is {report.format} ({report.kind})")
    if report.kept == 0:
        raise DatasetError(1, None, f"no row is left to train on: {report.summary()}")
    return report

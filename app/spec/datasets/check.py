"""Read a whole file and say what it holds, what is useless in it, and whether it can be trained on."""

from collections.abc import Iterator
from itertools import chain
from typing import IO, Any

from app.spec.datasets import labels, limits, proposals
from app.spec.datasets.columns import Columns, renamed
from app.spec.datasets.conversations import Turns
from app.spec.datasets.errors import DatasetError, Dropped
from app.spec.datasets.example import Example, Kind
from app.spec.datasets.formats import FORMATS, Compared, Format, Reading, Record, compared, judged
from app.spec.datasets.labels import Scheme
from app.spec.datasets.mapping import Mapping
from app.spec.datasets.reader import records
from app.spec.datasets.report import Report

HEAD = 256
"""Rows by which the format is recognised, as far as they are not too large together."""


def examples(file: IO[bytes], mapping: Mapping | None = None, report: Report | None = None) -> Iterator[Example]:
    """The usable examples of `file`, in order; `report` is filled in as they go by.

    Raises `DatasetError` at the first row that cannot be understood.
    """
    return (example for _, example in numbered_examples(file, mapping, report))


def numbered_examples(
    file: IO[bytes], mapping: Mapping | None = None, report: Report | None = None
) -> Iterator[tuple[int, Example]]:
    """The same, each with the number of its row, from 0 on: those that are left out are counted too."""
    rows = _mapped(records(file), mapping)
    head, failed = _head(rows)
    if not head:
        if failed is not None:
            raise failed
        return
    names = {} if mapping is not None else renamed(name for _, record in head for name in record)
    reading = _reading([(line, _rename(record, names)) for line, record in head], mapping)
    format = reading.format
    if report is not None:
        report.format, report.kind = format.name, format.kind
    if format.label is not None and reading.scheme is None:
        reading.scheme = _scheme(file, mapping, names, reading, head)
        rows = _mapped(records(file), mapping)  # the file was read for the values of the label
        head, failed = _head(rows)
    columns = Columns()
    if report is not None:
        report.scheme, report.unread = reading.scheme, reading.turns.unread
    try:
        for number, (line, record) in enumerate(chain(head, rows if failed is None else _raise(failed))):
            record = _rename(record, names)
            if report is not None:
                columns.count(record)
            if not format.needs <= record.keys():
                missing = sorted(format.needs - record.keys())[0]
                raise DatasetError(line, missing, f"is missing (the file's format is {format.name})")
            try:
                example = reading.example(record, line)
            except Dropped as dropped:
                if report is not None:
                    report.drop(line, dropped)
                continue
            if report is not None:
                report.add(example)
            yield number, example
    finally:
        if report is not None and not (mapping and mapping.sources):
            columns.leave(format.reads)
            report.unread.update(columns.unread)


def _mapped(rows: Iterator[tuple[int, Record]], mapping: Mapping | None) -> Iterator[tuple[int, Record]]:
    return rows if mapping is None else ((line, mapping.apply(record, line)) for line, record in rows)


def _rename(record: Record, names: dict[str, str]) -> Record:
    return {names.get(name, name): value for name, value in record.items()} if names else record


def _raise(error: DatasetError) -> Iterator[tuple[int, Record]]:
    raise error
    yield


def _head(rows: Iterator[tuple[int, Record]]) -> tuple[list[tuple[int, Record]], DatasetError | None]:
    """The first rows, and what is wrong with the one behind them."""
    found: list[tuple[int, Record]] = []
    size = 0
    try:
        for line, record in rows:
            found.append((line, record))
            size += sum(len(value) if isinstance(value, str) else 1000 for value in record.values())
            if len(found) == HEAD or size > limits.MAX_RECORD_BYTES:
                break
    except DatasetError as error:
        # Without the frames that it came through, which hold what was read, and would do so as long as it is kept.
        return found, DatasetError(error.line, error.field, error.reason, error.mapping)
    return found, None


def _reading(head: list[tuple[int, Record]], mapping: Mapping | None) -> Reading:
    """How a file that begins with `head` is read. Raises `DatasetError` where no format fits."""
    there = [record for _, record in head]
    columns = frozenset(name for record in there for name in record)
    filled = frozenset(name for record in there for name, value in record.items() if value not in (None, ""))
    turns = Turns((mapping and mapping.roles) or {})
    scheme = mapping.scheme if mapping is not None else None
    where = compared(columns)
    if where is not None and not {"chosen", "rejected"} <= columns:
        if scheme is None and where.known is not None and where.verdict is not None:
            scheme = Scheme(where.verdict, dict(where.known))
        return Reading(judged(where), turns, scheme)
    for names in (filled, columns):  # a column that is empty in all of the first rows is better than none
        for candidate in FORMATS:
            if candidate.needs <= names and candidate.fits(there):
                if mapping is not None and "label" in mapping.sources and candidate.label is None:
                    continue  # a label that is named is not left aside
                return Reading(candidate, turns, scheme)
    line = head[0][0]
    have = ", ".join(sorted(map(repr, columns)))[:300] or "none"
    if mapping is not None and mapping.sources:
        reason = f"no format has just these fields: {have}. A pair has 'prompt', 'chosen' and 'rejected'; a label goes "
        reason += "with 'prompt' and 'completion', with 'messages', or with 'input', 'output_1' and 'output_2'"
        raise DatasetError(line, None, reason)
    nearest = proposals.nearest(there)
    reason = f"no known format has these fields: {have}. "
    if nearest is None:
        known = "; ".join(dict.fromkeys(" + ".join(sorted(format.needs)) for format in FORMATS))
        reason += f"A row has one of: {known}. Or a mapping says which column holds what"
    else:
        reason += f"If this is what they are, give the file this mapping: {proposals.command(nearest)}"
    raise DatasetError(line, None, reason, nearest)


def _scheme(
    file: IO[bytes], mapping: Mapping | None, names: dict[str, str], reading: Reading, head: list[tuple[int, Record]]
) -> Scheme:
    """What the values of the column of verdicts or labels mean, decided on all of the file."""
    column = reading.format.label
    assert column is not None

    def values() -> Iterator[object]:
        try:
            for _, record in _mapped(records(file), mapping):
                yield _rename(record, names).get(column)
        except DatasetError:
            return  # the reading itself says it, at its row

    source = column if mapping is None or not isinstance(mapping.label, str) else mapping.label
    where = compared(frozenset(name for _, record in head for name in _rename(record, names)))
    try:
        if reading.format.name != "judged":
            return labels.labels(source, values())
        assert where is not None
        answers = where.answers
        if mapping is not None and isinstance(mapping.output_1, str) and isinstance(mapping.output_2, str):
            answers = (mapping.output_1, mapping.output_2)
        return labels.verdicts(source, values(), answers)
    except labels.Ambiguous as ambiguous:
        proposed = _with_label(mapping, reading.format, where, ambiguous.label)
        reason = f"{ambiguous.reason}: {proposals.command(proposed)}"
        raise DatasetError(head[0][0], source, reason, proposed) from ambiguous


def _with_label(
    mapping: Mapping | None, format: Format, where: Compared | None, label: dict[str, Any]
) -> dict[str, Any]:
    """The mapping that the file has, or that stands for its own columns, with what it has to say of the label."""
    if mapping is not None and mapping.sources:
        return mapping.model_dump(mode="json", exclude_none=True) | {"label": label}
    if where is not None and format.name == "judged":
        fields = {"input": where.prompt, "output_1": where.answers[0], "output_2": where.answers[1]}
        return {**fields, "label": label}
    target = {"instruction": "prompt", "output": "completion"}
    fields = {target.get(name, name): name for name in sorted(format.needs) if name != format.label}
    return {**fields, "label": label}


NEEDS = {
    Kind.SUPERVISED: "answers",
    Kind.PREFERENCE: "pairs of a preferred and a rejected answer",
    Kind.RANKED: "ranked lists of answers",
    Kind.LABELLED: "answers with a label, good or bad",
}


def survey(file: IO[bytes], mapping: Mapping | None = None, *, asked: bool = False) -> Report:
    """Read all of `file`. What cannot be understood is the report's `error`. `asked`: note what each row asks."""
    report = Report(keeps_asked=asked)
    try:
        for _example in examples(file, mapping, report):
            pass
        if report.rows == 0:
            raise DatasetError(1, None, "the file has no rows")
    except DatasetError as error:
        report.fail(error)
    return report


def require(report: Report, need: Kind) -> None:
    """Raise `DatasetError` where the file of `report` cannot be trained on by a method that needs `need`."""
    if report.error is not None:
        raise DatasetError(report.error["line"], report.error["field"], report.error["reason"])
    if not report.kind.serves(need):
        raise DatasetError(1, None, f"the method needs {NEEDS[need]}; this is {report.format} ({report.kind})")
    if report.kept == 0:
        raise DatasetError(1, None, f"no row is left to train on: {report.summary()}")


def check(file: IO[bytes], need: Kind, mapping: Mapping | None = None, *, asked: bool = False) -> Report:
    """Read all of `file`, whose examples must serve `need`. `asked`: note what each row asks.

    Raises `DatasetError` for a file that cannot be trained on.
    """
    report = survey(file, mapping, asked=asked)
    require(report, need)
    return report

"""Read a whole file and report what it holds, which rows are useless, and whether it can be trained on."""

from collections.abc import Iterator
from itertools import chain
from typing import IO

from app.spec.datasets import labels, limits, proposals
from app.spec.datasets.columns import ColumnCounter, canonical_names
from app.spec.datasets.conversations import MessageReader
from app.spec.datasets.errors import DatasetError, Dropped
from app.spec.datasets.example import Example, Kind
from app.spec.datasets.formats import (
    FORMATS,
    Format,
    Reading,
    Record,
    VerdictColumns,
    argilla_format,
    find_verdict_columns,
    ranked_fields,
    verdict_format,
)
from app.spec.datasets.labels import LabelScheme
from app.spec.datasets.mapping import Mapping
from app.spec.datasets.reader import records
from app.spec.datasets.report import Report
from app.spec.json_types import JsonObject

HEAD = 256
"""Maximum number of first rows by which the format is recognised. It is lower if these rows are large."""


def examples(file: IO[bytes], mapping: Mapping | None = None, report: Report | None = None) -> Iterator[Example]:
    """The usable examples of `file`, in order. `report` is filled in while they are read.

    Raises `DatasetError` at the first row that cannot be understood.
    """
    return (example for _, example in numbered_examples(file, mapping, report))


def numbered_examples(
    file: IO[bytes], mapping: Mapping | None = None, report: Report | None = None
) -> Iterator[tuple[int, Example]]:
    """The same examples, each with the number of its row. Numbers count from 0 and include rows that are left out."""
    rows = _mapped(records(file), mapping)
    head, head_error = _head(rows)
    if not head:
        if head_error is not None:
            raise head_error
        return
    new_names = {} if mapping is not None else canonical_names(name for _, record in head for name in record)
    reading = _reading([(line, _rename(record, new_names)) for line, record in head], mapping)
    format = reading.format
    if report is not None:
        report.format, report.kind = format.name, format.kind
    if format.label is not None and reading.scheme is None:
        reading.scheme = _scheme(file, mapping, new_names, reading, head)
        rows = _mapped(records(file), mapping)  # `_scheme` has read the file: start again
        head, head_error = _head(rows)
    columns = ColumnCounter()
    if report is not None:
        report.scheme, report.unread = reading.scheme, reading.messages.unread
    try:
        for number, (line, record) in enumerate(chain(head, rows if head_error is None else _raise(head_error))):
            record = _rename(record, new_names)
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
            example.number = number
            if report is not None:
                report.add(example)
            yield number, example
    finally:
        if report is not None and not (mapping and mapping.sources):
            columns.count_unread(format.reads)
            report.unread.update(columns.unread)


def _mapped(rows: Iterator[tuple[int, Record]], mapping: Mapping | None) -> Iterator[tuple[int, Record]]:
    return rows if mapping is None else ((line, mapping.apply(record, line)) for line, record in rows)


def _rename(record: Record, new_names: dict[str, str]) -> Record:
    return {new_names.get(name, name): value for name, value in record.items()} if new_names else record


def _raise(error: DatasetError) -> Iterator[tuple[int, Record]]:
    raise error
    yield


def _head(rows: Iterator[tuple[int, Record]]) -> tuple[list[tuple[int, Record]], DatasetError | None]:
    """The first rows, and the error of the row after them, if it has one."""
    head: list[tuple[int, Record]] = []
    size = 0
    try:
        for line, record in rows:
            head.append((line, record))
            size += sum(len(value) if isinstance(value, str) else 1000 for value in record.values())
            if len(head) == HEAD or size > limits.MAX_RECORD_BYTES:
                break
    except DatasetError as error:
        # A copy without a traceback, whose frames would keep the rows in memory.
        return head, DatasetError(error.line, error.field, error.reason, error.mapping)
    return head, None


def _reading(head: list[tuple[int, Record]], mapping: Mapping | None) -> Reading:
    """How to read a file that begins with `head`. Raises `DatasetError` if no format fits."""
    first_records = [record for _, record in head]
    columns = frozenset(name for record in first_records for name in record)
    filled = frozenset(name for record in first_records for name, value in record.items() if value not in (None, ""))
    messages = MessageReader((mapping and mapping.roles) or {})
    scheme = mapping.scheme if mapping is not None else None
    verdict_columns = find_verdict_columns(columns)
    if verdict_columns is not None and not {"chosen", "rejected"} <= columns:
        if scheme is None and verdict_columns.known_meanings is not None and verdict_columns.verdict is not None:
            scheme = LabelScheme(verdict_columns.verdict, dict(verdict_columns.known_meanings))
        return Reading(verdict_format(verdict_columns), messages, scheme)
    ranked = ranked_fields(first_records)
    if ranked is not None and {"prompt", *ranked} <= columns and not {"chosen", "rejected"} <= columns:
        return Reading(argilla_format(ranked), messages, scheme)
    for names in (filled, columns):  # columns that are empty in all first rows count only if no format fits without
        for candidate in FORMATS:
            if candidate.needs <= names and candidate.fits(first_records):
                if mapping is not None and "label" in mapping.sources and candidate.label is None:
                    continue  # this format would ignore the label that the mapping names
                return Reading(candidate, messages, scheme)
    line = head[0][0]
    column_list = ", ".join(sorted(map(repr, columns)))[:300] or "none"
    if mapping is not None and mapping.sources:
        reason = f"no format has just these fields: {column_list}. A pair has 'prompt', 'chosen' and 'rejected'; "
        reason += (
            "a label goes with 'prompt' and 'completion', with 'messages', or with 'input', 'output_1' and 'output_2'"
        )
        raise DatasetError(line, None, reason)
    nearest = proposals.nearest(first_records)
    reason = f"no known format has these fields: {column_list}. "
    if nearest is None:
        field_sets = "; ".join(dict.fromkeys(" + ".join(sorted(format.needs)) for format in FORMATS))
        reason += f"A row has one of: {field_sets}. Or a mapping says which column holds what"
    else:
        reason += f"If this is right, give the file this mapping: {proposals.command(nearest)}"
    raise DatasetError(line, None, reason, nearest)


def _scheme(
    file: IO[bytes],
    mapping: Mapping | None,
    new_names: dict[str, str],
    reading: Reading,
    head: list[tuple[int, Record]],
) -> LabelScheme:
    """The meanings of the values in the verdict or label column, decided on the whole file."""
    column = reading.format.label
    assert column is not None

    def values() -> Iterator[object]:
        try:
            for _, record in _mapped(records(file), mapping):
                yield _rename(record, new_names).get(column)
        except DatasetError:
            return  # the caller reads the file again and raises it at its row

    source = column if mapping is None or not isinstance(mapping.label, str) else mapping.label
    verdict_columns = find_verdict_columns(frozenset(name for _, record in head for name in _rename(record, new_names)))
    try:
        if reading.format.name != "judged":
            return labels.label_scheme(source, values())
        assert verdict_columns is not None
        answers = verdict_columns.answers
        if mapping is not None and isinstance(mapping.output_1, str) and isinstance(mapping.output_2, str):
            answers = (mapping.output_1, mapping.output_2)
        return labels.verdict_scheme(source, values(), answers)
    except labels.AmbiguousValues as ambiguous:
        proposed = _with_label(mapping, reading.format, verdict_columns, ambiguous.label)
        reason = f"{ambiguous.reason}: {proposals.command(proposed)}"
        raise DatasetError(head[0][0], source, reason, proposed) from ambiguous


def _with_label(
    mapping: Mapping | None, format: Format, verdict_columns: VerdictColumns | None, label: JsonObject
) -> JsonObject:
    """The file's mapping, or else one that names its own columns, completed with `label`."""
    if mapping is not None and mapping.sources:
        return mapping.model_dump(mode="json", exclude_none=True) | {"label": label}
    if verdict_columns is not None and format.name == "judged":
        first, second = verdict_columns.answers
        fields = {"input": verdict_columns.prompt, "output_1": first, "output_2": second}
        return {**fields, "label": label}
    field_of = {"instruction": "prompt", "output": "completion"}
    fields = {field_of.get(name, name): name for name in sorted(format.needs) if name != format.label}
    return {**fields, "label": label}


NEEDED_DATA = {
    Kind.SUPERVISED: "answers",
    Kind.PREFERENCE: "pairs of a preferred and a rejected answer",
    Kind.RANKED: "ranked lists of answers",
    Kind.LABELLED: "answers with a label, good or bad",
}
"""The data that a method needs, in the words of error messages."""


def survey(file: IO[bytes], mapping: Mapping | None = None, *, count_prompts: bool = False) -> Report:
    """Read all of `file`. A row that cannot be understood becomes the report's `error`.

    `count_prompts`: also fill the report's `prompt_counts`.
    """
    report = Report(count_prompts=count_prompts)
    try:
        for _example in examples(file, mapping, report):
            pass
        if report.rows == 0:
            raise DatasetError(1, None, "the file has no rows")
    except DatasetError as error:
        report.fail(error)
    return report


def require(report: Report, need: Kind) -> None:
    """Raise `DatasetError` if a method that needs `need` cannot train on the file of `report`."""
    if report.error is not None:
        raise DatasetError(report.error["line"], report.error["field"], report.error["reason"])
    if not report.kind.serves(need):
        raise DatasetError(1, None, f"the method needs {NEEDED_DATA[need]}; this is {report.format} ({report.kind})")
    if report.kept == 0:
        raise DatasetError(1, None, f"no row is left to train on: {report.summary()}")


def check(file: IO[bytes], need: Kind, mapping: Mapping | None = None, *, count_prompts: bool = False) -> Report:
    """Read all of `file`, whose examples must serve `need`. `count_prompts`: also fill the report's `prompt_counts`.

    Raises `DatasetError` for a file that cannot be trained on.
    """
    report = survey(file, mapping, count_prompts=count_prompts)
    require(report, need)
    return report

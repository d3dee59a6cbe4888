"""Token rows in flat arrays, in memory or in a file.

A file is written chunk by chunk, so memory does not grow with the number of rows. It is mapped when it is read: the
processes of a machine that read it share its pages, and the system may drop those that nobody needs.
"""

import json
import os
import secrets
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy
from numpy.typing import NDArray

from worker.trainer.data import Row

Integers = NDArray[numpy.int64]
SMALL_BYTES = 1 << 20
"""Arrays up to this size are read, not mapped."""


@dataclass(frozen=True)
class Arrays:
    """All rows of some files. A row has segments: its prompt and its responses. A segment has tokens.

    Shapes: `lines`, `files`, `records`, `desirable`, `groups` [rows]; `segments` [rows + 1], the first segment of each
    row; `tokens` [segments + 1], the first token of each segment; `ids` [tokens] int32; `scored` [tokens] bool. The
    last entries of `segments` and `tokens` are the totals.
    """

    lines: Integers
    desirable: NDArray[numpy.bool_]
    groups: Integers
    files: Integers
    records: Integers
    segments: Integers
    tokens: Integers
    ids: NDArray[numpy.int32]
    scored: NDArray[numpy.bool_]

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "Arrays":
        """The arrays of `rows`. Prompt tokens are never scored."""
        lines, groups, files, records, desirable = array("q"), array("q"), array("q"), array("q"), bytearray()
        segments, tokens = array("q", [0]), array("q", [0])
        ids, scored = array("i"), bytearray()
        for row in rows:
            lines.append(row.line)
            desirable.append(row.desirable)
            groups.append(row.group)
            files.append(row.file)
            records.append(row.number)
            for part, flags in (
                (row.prompt, (False,) * len(row.prompt)),
                *((response.ids, response.scored) for response in row.responses),
            ):
                ids.extend(part)
                scored.extend(flags)
                tokens.append(len(ids))
            segments.append(len(tokens) - 1)
        return cls(
            numpy.array(lines, dtype=numpy.int64),
            numpy.frombuffer(desirable, dtype=bool),
            numpy.array(groups, dtype=numpy.int64),
            numpy.array(files, dtype=numpy.int64),
            numpy.array(records, dtype=numpy.int64),
            numpy.array(segments, dtype=numpy.int64),
            numpy.array(tokens, dtype=numpy.int64),
            numpy.array(ids, dtype=numpy.int32),
            numpy.frombuffer(scored, dtype=bool),
        )

    @classmethod
    def mapped(cls, path: Path) -> "Arrays":
        """The arrays in the file `path`, which a `Writer` has written, mapped into memory."""
        from safetensors.torch import load_file  # not above: the processes that tokenise do not need torch

        return cls(**{name: tensor.numpy() for name, tensor in load_file(path).items()})


KINDS: dict[str, type[numpy.generic]] = {
    "lines": numpy.int64,
    "groups": numpy.int64,
    "files": numpy.int64,
    "records": numpy.int64,
    "segments": numpy.int64,
    "tokens": numpy.int64,
    "ids": numpy.int32,
    "desirable": numpy.bool_,
    "scored": numpy.bool_,
}
"""The type of each array, the widest first: safetensors wants its tensors aligned."""
NAMES = {numpy.int64: "I64", numpy.int32: "I32", numpy.bool_: "BOOL"}
"""The names of the types in safetensors files."""


class Writer:
    """Writes the arrays of many rows into a safetensors file, some rows at a time.

    As a context it leaves nothing behind if its block fails.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, 0
        self._segments = self._tokens = 0  # so far
        with ExitStack() as stack:
            # Without a buffer, closing them cannot fail for want of space and leave the others open.
            self._parts = {name: stack.enter_context(self._part(name).open("wb", buffering=0)) for name in KINDS}
            self._stack = stack.pop_all()
        for name in ("segments", "tokens"):  # they begin with the offset 0
            _write(self._parts[name], numpy.zeros(1, dtype=numpy.int64))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            with suppress(OSError):  # a full disk takes no more
                self._stack.close()
            for path in (self.path, *map(self._part, KINDS)):
                path.unlink(missing_ok=True)

    def _part(self, name: str) -> Path:
        return self.path.with_name(f"{self.path.name}.{name}")

    def add(self, chunk: Arrays) -> None:
        """Append the rows of `chunk`. Its offsets count from the end of the rows before it."""
        moved = {"segments": chunk.segments[1:] + self._segments, "tokens": chunk.tokens[1:] + self._tokens}
        for name, kind in KINDS.items():
            values = moved.get(name, getattr(chunk, name))
            _write(self._parts[name], numpy.ascontiguousarray(values, dtype=kind))
        self.rows += len(chunk.lines)
        self._segments, self._tokens = self._segments + int(chunk.segments[-1]), self._tokens + int(chunk.tokens[-1])

    def close(self, metadata: dict[str, str] | None = None) -> None:
        """Complete the file."""
        self._stack.close()
        header: dict[str, Any] = {"__metadata__": metadata or {}}
        begin = 0
        for name, kind in KINDS.items():
            size = self._part(name).stat().st_size
            shape = [size // numpy.dtype(kind).itemsize]
            header[name] = {"dtype": NAMES[kind], "shape": shape, "data_offsets": [begin, begin + size]}
            begin += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with self.path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in KINDS:
                with self._part(name).open("rb") as part:
                    shutil.copyfileobj(part, file, 1 << 24)
                self._part(name).unlink()


def _write(file: FileIO, values: NDArray[Any]) -> None:
    """Write all of `values`. One call may write a part of them only."""
    rest = values.view(numpy.uint8).data
    while rest:
        rest = rest[file.write(rest) :]


@dataclass(frozen=True)
class Shelf:
    """Arrays in files of a folder, which the ranks of a machine share. Without a folder they are in memory."""

    folder: Path | None = None
    name: str = ""
    """The owner of the arrays, such as a stage."""

    def of(self, name: str) -> "Shelf":
        """The shelf for the arrays of `name`."""
        return Shelf(self.folder, f"{self.name}{name}-")

    def keep(self, name: str, make: Callable[[], Integers]) -> Integers:
        """The array `name`, made by `make` unless another rank has made it."""
        path = self._path(f"{name}.npy")
        if path is None:
            return make()
        if not path.exists():
            with self._new(path) as partial, partial.open("wb") as file:
                numpy.save(file, make())
        values: Integers = numpy.load(path, mmap_mode="r" if path.stat().st_size > SMALL_BYTES else None)
        return values

    def keep_rows(self, name: str, chunks: Callable[[], Iterable[Arrays]]) -> Arrays:
        """The rows `name` of all `chunks`, made unless another rank has made them."""
        path = self._path(f"{name}.safetensors")
        if path is None:
            with TemporaryDirectory() as folder:
                return Shelf(Path(folder)).keep_rows(name, chunks)
        if not path.exists():
            with self._new(path) as partial, Writer(partial) as writer:
                for chunk in chunks():
                    writer.add(chunk)
                writer.close()
        return Arrays.mapped(path)

    def drop(self, name: str) -> None:
        """Remove the array `name`. Who has mapped it keeps it."""
        if (path := self._path(f"{name}.npy")) is not None:
            path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{self.name}{name}"

    @contextmanager
    def _new(self, path: Path) -> Iterator[Path]:
        """Yields where to write `path`, which is complete as soon as it exists.

        If several ranks write it at the same time, the first one counts.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
        try:
            yield partial
            with suppress(FileExistsError):
                os.link(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def ranges(starts: Integers, stops: Integers) -> Integers:
    """The numbers of all ranges `starts[k]` … `stops[k] − 1`, concatenated."""
    sizes = stops - starts
    ends = numpy.cumsum(sizes)
    numbers: Integers = numpy.arange(ends[-1] if len(ends) else 0) + numpy.repeat(starts - (ends - sizes), sizes)
    return numbers

"""Token rows of a whole file: in flat arrays, tokenised by several processes, cached by content hash."""

import hashlib
import json
import multiprocessing
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy
from numpy.typing import NDArray
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase as Tokenizer

from app.spec.datasets.check import examples
from app.spec.datasets.example import Example
from app.spec.datasets.rendering import Rendering
from worker.machine import usable_processes
from worker.trainer import data
from worker.trainer.arrays import Arrays, Integers, Shelf, Writer, ranges
from worker.trainer.cache import Cache
from worker.trainer.data import Recipe, Response, Row, Tally
from worker.trainer.errors import UserError
from worker.trainer.rendering import Renderer

if TYPE_CHECKING:  # at run time it would load torch, which the tokenising processes do not need
    from transformers import PretrainedConfig

VERSION = 5
"""Version of the conversion from examples to rows. It is part of every cache key."""
PARALLEL_BYTES = 16 * 1024 * 1024
"""Larger files are tokenised by several processes. Each process takes seconds to start."""
CHUNK = 1024
"""Number of examples that a process tokenises at a time."""
HASHED_TOGETHER = 16_384
"""Number of rows whose tokens are hashed at a time."""
COUNTED_TOGETHER = 1 << 14
"""Number of segments whose scored tokens are counted at a time."""


class Rows(Sequence[Row]):
    """Some rows of a file. `Row` objects are created on access.

    The arrays take 5 bytes a token, where Python objects would take far more. `numbers` selects rows of the arrays.
    The `shelf` holds results for all rows.
    """

    def __init__(self, arrays: Arrays, numbers: Integers | None = None, shelf: Shelf | None = None) -> None:
        self._arrays, self._shelf = arrays, shelf or Shelf()
        self._numbers = numpy.arange(len(arrays.lines)) if numbers is None else numbers

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "Rows":
        return cls(Arrays.of(rows))

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> "Rows": ...
    def __getitem__(self, index: int | slice) -> "Row | Rows":
        if isinstance(index, slice):
            return Rows(self._arrays, self._numbers[index])
        arrays, number = self._arrays, self._numbers[index]
        first, last = arrays.segments[number : number + 2]
        bounds = arrays.tokens[first : last + 1].tolist()  # where each segment of the row begins, and the row's end
        start, stop = bounds[0], bounds[-1]
        ids, scored = arrays.ids[start:stop].tolist(), arrays.scored[start:stop].tolist()
        parts = [(tuple(ids[i - start : j - start]), tuple(scored[i - start : j - start])) for i, j in pairwise(bounds)]
        responses = tuple(Response(part, flags) for part, flags in parts[1:])
        desirable, group, file = bool(arrays.desirable[number]), int(arrays.groups[number]), int(arrays.files[number])
        record = int(arrays.records[number])
        return Row(int(arrays.lines[number]), parts[0][0], responses, desirable, group, file, record)

    @cached_property
    def _sizes(self) -> Integers:
        """Number of tokens of each row, [rows]: its prompt, once, and all its responses."""
        arrays, numbers = self._arrays, self._numbers
        return self._shelf.keep(
            "sizes", lambda: arrays.tokens[arrays.segments[numbers + 1]] - arrays.tokens[arrays.segments[numbers]]
        )

    @cached_property
    def longest(self) -> int:
        """Number of tokens of the largest row."""
        return int(self._sizes.max()) if len(self) else 0

    @cached_property
    def all_tokens(self) -> int:
        """Number of tokens of all rows together."""
        return int(self._sizes.sum())

    def tokens(self, numbers: Sequence[int]) -> int:
        """Number of tokens of the rows `numbers` together, each prompt counted once."""
        return int(self._sizes[numbers].sum())

    def responses(self, number: int) -> int:
        """Number of responses of the row `number`."""
        first, last = self._arrays.segments[self._numbers[number] : self._numbers[number] + 2]
        return int(last - first) - 1

    @property
    def response_counts(self) -> Integers:
        """Number of responses of each row, [rows]."""
        arrays, numbers = self._arrays, self._numbers
        counts: Integers = arrays.segments[numbers + 1] - arrays.segments[numbers] - 1
        return counts

    def desirable(self, numbers: Sequence[int]) -> list[bool]:
        """Whether the response of each labelled row is desirable."""
        return list(self._arrays.desirable[self._numbers[numbers]].tolist())

    def scored_tokens(self, numbers: Sequence[int]) -> list[list[int]]:
        """For each of the rows `numbers`, the number of scored and predicted tokens of each response."""
        arrays, rows = self._arrays, self._numbers[numbers]
        return [self._scored[arrays.segments[row] + 1 : arrays.segments[row + 1]].tolist() for row in rows]

    @cached_property
    def _scored(self) -> Integers:
        """Number of scored tokens of each segment that have a prediction, [segments]."""
        return self._shelf.keep("scored", self._count_scored)

    def _count_scored(self) -> Integers:
        arrays = self._arrays
        counts = numpy.zeros(len(arrays.tokens) - 1, dtype=numpy.int64)
        for first in range(0, len(counts), COUNTED_TOGETHER):
            bounds = arrays.tokens[first : first + COUNTED_TOGETHER + 1]  # [segments of this part + 1]
            scored = numpy.append(arrays.scored[bounds[0] : bounds[-1]], False)
            part = numpy.add.reduceat(scored, bounds[:-1] - bounds[0], dtype=numpy.int64)
            part[numpy.diff(bounds) == 0] = 0  # for an empty segment reduceat gives the next token
            counts[first : first + COUNTED_TOGETHER] = part
        # The first token of a row without a prompt has no prediction.
        sizes, segments_per_row = numpy.diff(arrays.tokens), numpy.diff(arrays.segments)
        no_prompt = numpy.repeat(sizes[arrays.segments[:-1]] == 0, segments_per_row) & (sizes > 0)
        counts[no_prompt] -= arrays.scored[arrays.tokens[:-1][no_prompt]]
        return counts

    @cached_property
    def vocabulary(self) -> list[int]:
        """The distinct token ids of the file, ascending."""
        ids = self._arrays.ids
        parts = [numpy.unique(ids[first : first + (1 << 22)]) for first in range(0, len(ids), 1 << 22)]
        return [int(token) for token in numpy.unique(numpy.concatenate(parts))] if parts else []

    @property
    def lines(self) -> list[int]:
        """The line of each row in its file, [rows]."""
        return list(self._arrays.lines[self._numbers].tolist())

    @property
    def files(self) -> list[int]:
        """The number of each row's file, [rows]."""
        return list(self._arrays.files[self._numbers].tolist())

    @property
    def places(self) -> Integers:
        """A number for the line of each row, [rows]: equal for rows of one line. A line can have several rows."""
        return self._arrays.lines[self._numbers] + (self._arrays.files[self._numbers] << 40)

    @classmethod
    def together(cls, files: Sequence["Rows"], shelf: Shelf) -> "Rows":
        """All rows of several files. Each row gets the number of its file."""
        if len(files) == 1:
            return files[0]

        def chunks() -> Iterator[Arrays]:
            for k, rows in enumerate(files):
                yield replace(rows._arrays, files=numpy.full(len(rows), k))

        return cls(shelf.keep_rows("rows", chunks))

    @classmethod
    def kept(cls, shelf: Shelf, name: str, rows: Callable[[], Iterable[Row]]) -> "Rows":
        """The rows that `rows` makes, on the `shelf`."""
        return cls(shelf.keep_rows(name, lambda: map(Arrays.of, data.batched(rows(), CHUNK))))

    @property
    def groups(self) -> Integers:
        """The group of each row, [rows]: equal for rows with the same prompt."""
        return self._arrays.groups[self._numbers]

    def where(self, keep: Sequence[bool] | NDArray[numpy.bool_]) -> "Rows":
        """The rows for which `keep` is true."""
        return Rows(self._arrays, self._numbers[numpy.asarray(keep, dtype=bool)])

    def on(self, shelf: Shelf) -> "Rows":
        """The same rows, whose results go to the `shelf`."""
        return Rows(self._arrays, shelf.keep("numbers", lambda: self._numbers), shelf)

    def prepare(self) -> None:
        """Compute the sizes of all rows."""
        self._sizes, self._scored  # noqa: B018 - they stay

    def digest(self) -> str:
        """A hash of the rows' tokens and of their scored flags."""
        arrays = self._arrays
        digest = hashlib.sha256(str(len(self)).encode())
        for start in range(0, len(self), HASHED_TOGETHER):
            rows = self._numbers[start : start + HASHED_TOGETHER]
            # The indices of all segments and tokens of these rows.
            segments = ranges(arrays.segments[rows], arrays.segments[rows + 1])
            tokens = ranges(arrays.tokens[arrays.segments[rows]], arrays.tokens[arrays.segments[rows + 1]])
            digest.update((arrays.segments[rows + 1] - arrays.segments[rows]).tobytes())
            digest.update((arrays.tokens[segments + 1] - arrays.tokens[segments]).tobytes())
            digest.update(arrays.ids[tokens].tobytes())
            digest.update(arrays.scored[tokens].tobytes())
        return digest.hexdigest()

    def prompts(self) -> Integers:
        """A hash for each row, [rows]: equal for rows with the same prompt. A row without a prompt has its own."""
        arrays, keys = self._arrays, numpy.zeros(len(self), dtype=numpy.int64)
        for position, number in enumerate(self._numbers):
            start, stop = arrays.tokens[arrays.segments[number] : arrays.segments[number] + 2]
            prompt = arrays.ids[start:stop].tobytes() if stop > start else f"row {position}".encode()
            keys[position] = int.from_bytes(hashlib.blake2b(prompt, digest_size=8).digest(), "little", signed=True)
        return keys


@dataclass(frozen=True)
class Groups:
    """Row numbers in groups that shuffling keeps together.

    `rows` [rows] has one group after the other. `starts` [groups + 1] has the first place of each, and the end.
    """

    rows: Integers
    starts: Integers

    @classmethod
    def alone(cls, count: int) -> "Groups":
        """Each of `count` rows by itself."""
        return cls(numpy.arange(count), numpy.arange(count + 1))

    @classmethod
    def of(cls, keys: Integers, largest: int) -> "Groups":
        """Rows with equal `keys` [rows] together, at most `largest` in a group, in the order of their first rows."""
        order = numpy.argsort(keys, kind="stable")  # the rows by key, those of one key in order
        new_key = numpy.append(True, numpy.diff(keys[order]) != 0)[: len(keys)]
        place = numpy.arange(len(keys)) - numpy.flatnonzero(new_key)[numpy.cumsum(new_key) - 1]  # within its key
        starts = numpy.flatnonzero(place % largest == 0)
        stops = numpy.append(starts[1:], len(keys))
        by_first = numpy.argsort(order[starts], kind="stable")
        sizes = (stops - starts)[by_first]
        return cls(order[ranges(starts[by_first], stops[by_first])], numpy.append(0, numpy.cumsum(sizes)))

    def ordered(self, order: Integers) -> Integers:
        """The row numbers of the groups `order`, [rows of these groups]."""
        return self.rows[ranges(self.starts[order], self.starts[order + 1])]


def require_embedded(rows: Rows, tokenizer: Tokenizer, config: "PretrainedConfig", model: str) -> None:
    """Refuse rows with a token id beyond the embedding of the model of `config`."""
    size, largest = config.get_text_config().vocab_size, max(rows.vocabulary, default=0)
    if largest >= size:
        token = tokenizer.convert_ids_to_tokens(largest)
        message = (
            f"The tokenizer of '{model}' writes '{token}' as token {largest}, but the model has only {size} tokens. "
            "Its embedding was not enlarged together with its tokenizer."
        )
        raise UserError("unsupported_model", message, "model")


def load(
    path: Path, tokenizer: Tokenizer, recipe: Recipe, cache: Cache, report: Callable[[int], None] = lambda rows: None
) -> tuple[Rows, Tally]:
    """The rows of the file `path`, and the tally of its tokenisation. Uses the cache if it can.

    `report` is called with the number of rows so far, a few times.

    Raises `DatasetError` for a file that cannot be read, `UserError` for one that the chat template refuses.
    """
    key = _key(path, tokenizer, recipe)
    cached = cache.get(key, _read)
    if cached is not None:
        return cached
    tally = Tally()
    with cache.put(key) as cache_path, Writer(cache_path) as writer:
        for arrays in _tokenise(path, tokenizer, recipe, tally):
            writer.add(arrays)
            report(writer.rows)
        writer.close({"tally": json.dumps(asdict(tally) | {"refused": dict(tally.refused)})})
    return _read(cache.folder / key)


def _read(path: Path) -> tuple[Rows, Tally]:
    with safe_open(path, framework="np") as file:
        counts = json.loads(file.metadata()["tally"])
    return Rows(Arrays.mapped(path)), Tally(**counts | {"refused": Counter(counts["refused"])})


def _key(path: Path, tokenizer: Tokenizer, recipe: Recipe) -> str:
    """The cache key of the file's rows: hashes of the content, and of all that changes its tokens."""
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    if not Renderer(tokenizer, recipe.rendering).dated:  # the rows do not depend on the date, and neither must the key
        recipe = replace(recipe, rendering=replace(recipe.rendering, date=Rendering.date))
    parts = (VERSION, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.eos_token, recipe)
    return f"tokens/{content}/{hashlib.sha256(repr(parts).encode()).hexdigest()}"


def _tokenise(path: Path, tokenizer: Tokenizer, recipe: Recipe, tally: Tally) -> Iterator[Arrays]:
    """The rows of the file `path`, some at a time. Their counts are added to `tally`."""
    with path.open("rb") as file:
        groups = data.batched(examples(file, recipe.mapping), CHUNK)
        processes = usable_processes() if path.stat().st_size > PARALLEL_BYTES and _has_semaphores() else 1
        results = (
            (_tokenise_chunk(group, tokenizer, recipe) for group in groups)
            if processes == 1
            else _in_processes(groups, tokenizer, recipe, processes)
        )
        for arrays, chunk_tally in results:
            tally.add(chunk_tally)
            yield arrays


def _has_semaphores() -> bool:
    """Whether processes can share a queue. It needs a lock in `/dev/shm`, which some containers lack or forbid."""
    try:
        multiprocessing.get_context("spawn").Lock()
    except (ImportError, OSError):
        return False
    return True


def _tokenise_chunk(group: list[Example], tokenizer: Tokenizer, recipe: Recipe) -> tuple[Arrays, Tally]:
    tally = Tally()
    return Arrays.of(data.rows(group, tokenizer, recipe, tally)), tally


_tokenizer: Tokenizer | None = None
"""The tokenizer, in a process that tokenises."""


def _start_process(tokenizer: Tokenizer) -> None:
    """In a new process: keep the tokenizer, and end the process as soon as the trainer ends for any reason."""
    global _tokenizer
    _tokenizer = tokenizer
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def _tokenise_here(group: list[Example], recipe: Recipe) -> tuple[Arrays, Tally]:
    return _tokenise_chunk(group, _tokenizer, recipe)


def _in_processes(
    groups: Iterator[list[Example]], tokenizer: Tokenizer, recipe: Recipe, processes: int
) -> Iterator[tuple[Arrays, Tally]]:
    """The arrays of the groups, in order. A few groups are tokenised ahead.

    The processes are spawned, because a fork of a process with threads may hang.
    """
    context = multiprocessing.get_context("spawn")
    waiting: deque[Future[tuple[Arrays, Tally]]] = deque()
    with ProcessPoolExecutor(processes, context, _start_process, (tokenizer,)) as pool:
        for group in groups:
            waiting.append(pool.submit(_tokenise_here, group, recipe))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

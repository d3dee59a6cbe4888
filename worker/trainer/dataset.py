"""Token rows of a whole file: in flat arrays, tokenised by several processes, cached by content hash."""

import hashlib
import json
import multiprocessing
import os
import threading
from array import array
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
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase as Tokenizer

from app.spec.datasets.check import examples
from app.spec.datasets.example import Example
from app.spec.datasets.rendering import Rendering
from worker.machine import usable_processes
from worker.trainer import data
from worker.trainer.cache import Cache
from worker.trainer.data import Recipe, Response, Row, Tally
from worker.trainer.errors import UserError
from worker.trainer.rendering import Renderer

if TYPE_CHECKING:  # at run time it would load torch, which the tokenising processes do not need
    from transformers import PretrainedConfig

VERSION = 4
"""Version of the conversion from examples to rows. It is part of every cache key."""
PARALLEL_BYTES = 16 * 1024 * 1024
"""Larger files are tokenised by several processes. Each process takes seconds to start."""
CHUNK = 1024
"""Number of examples that a process tokenises at a time."""
HASHED_TOGETHER = 16_384
"""Number of rows whose tokens are hashed at a time."""

Integers = NDArray[numpy.int64]


@dataclass(frozen=True)
class Arrays:
    """All rows of some files. A row has segments: its prompt and its responses. A segment has tokens.

    Shapes: `lines`, `files`, `desirable`, `groups` [rows]; `segments` [rows + 1], the first segment of each row;
    `tokens` [segments + 1], the first token of each segment; `ids` [tokens] int32; `scored` [tokens] bool. The last
    entries of `segments` and `tokens` are the totals.
    """

    lines: Integers
    desirable: NDArray[numpy.bool_]
    groups: Integers
    files: Integers
    segments: Integers
    tokens: Integers
    ids: NDArray[numpy.int32]
    scored: NDArray[numpy.bool_]

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "Arrays":
        """The arrays of `rows`. Prompt tokens are never scored."""
        lines, groups, files, desirable = array("q"), array("q"), array("q"), bytearray()
        segments, tokens = array("q", [0]), array("q", [0])
        ids, scored = array("i"), bytearray()
        for row in rows:
            lines.append(row.line)
            desirable.append(row.desirable)
            groups.append(row.group)
            files.append(row.file)
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
            numpy.array(segments, dtype=numpy.int64),
            numpy.array(tokens, dtype=numpy.int64),
            numpy.array(ids, dtype=numpy.int32),
            numpy.frombuffer(scored, dtype=bool),
        )

    @classmethod
    def joined(cls, chunks: Sequence["Arrays"]) -> "Arrays":
        """All rows of `chunks`, in order."""
        if len(chunks) == 1:
            return chunks[0]
        segments, tokens = [numpy.zeros(1, dtype=numpy.int64)], [numpy.zeros(1, dtype=numpy.int64)]
        first_segment = first_token = 0
        for chunk in chunks:
            # The offsets of a chunk count from the end of the chunks before it.
            segments.append(chunk.segments[1:] + first_segment)
            tokens.append(chunk.tokens[1:] + first_token)
            first_segment, first_token = first_segment + chunk.segments[-1], first_token + chunk.tokens[-1]
        flat = {name: numpy.concatenate([getattr(chunk, name) for chunk in chunks]) for name in cls.FLAT}
        return cls(segments=numpy.concatenate(segments), tokens=numpy.concatenate(tokens), **flat)

    FLAT = ("lines", "desirable", "groups", "files", "ids", "scored")
    """Arrays without offsets: `joined` only has to concatenate them."""


class Rows(Sequence[Row]):
    """Some rows of a file. `Row` objects are created on access.

    The arrays take 5 bytes a token, where Python objects would take far more. `numbers` selects rows of the arrays.
    """

    def __init__(self, arrays: Arrays, numbers: Integers | None = None) -> None:
        self._arrays = arrays
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
        return Row(int(arrays.lines[number]), parts[0][0], responses, desirable, group, file)

    @cached_property
    def _sizes(self) -> Integers:
        """Number of tokens of each row, [rows]: its prompt, once, and all its responses."""
        arrays, numbers = self._arrays, self._numbers
        sizes: Integers = arrays.tokens[arrays.segments[numbers + 1]] - arrays.tokens[arrays.segments[numbers]]
        return sizes

    @cached_property
    def longest(self) -> int:
        """Number of tokens of the largest row."""
        return int(self._sizes.max()) if len(self) else 0

    def tokens(self, numbers: Sequence[int]) -> int:
        """Number of tokens of the rows `numbers` together, each prompt counted once."""
        return int(self._sizes[numbers].sum())

    def responses(self, number: int) -> int:
        """Number of responses of the row `number`."""
        first, last = self._arrays.segments[self._numbers[number] : self._numbers[number] + 2]
        return int(last - first) - 1

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
        arrays = self._arrays
        sizes = numpy.diff(arrays.tokens)
        counts = numpy.add.reduceat(numpy.append(arrays.scored, False), arrays.tokens[:-1], dtype=numpy.int64)
        counts[sizes == 0] = 0  # for an empty segment reduceat gives the next token
        # The first token of a row without a prompt has no prediction.
        segments_per_row = numpy.diff(arrays.segments)
        no_prompt = numpy.repeat(sizes[arrays.segments[:-1]] == 0, segments_per_row) & (sizes > 0)
        counts[no_prompt] -= arrays.scored[arrays.tokens[:-1][no_prompt]]
        return counts

    @cached_property
    def vocabulary(self) -> list[int]:
        """The distinct token ids of the file, ascending."""
        return [int(token) for token in numpy.unique(self._arrays.ids)]

    @property
    def lines(self) -> list[int]:
        """The line of each row in its file, [rows]."""
        return list(self._arrays.lines[self._numbers].tolist())

    @property
    def files(self) -> list[int]:
        """The number of each row's file, [rows]."""
        return list(self._arrays.files[self._numbers].tolist())

    @classmethod
    def together(cls, files: Sequence["Rows"]) -> "Rows":
        """All rows of several files. Each row gets the number of its file."""
        if len(files) == 1:
            return files[0]
        numbered = [replace(rows._arrays, files=numpy.full(len(rows), k)) for k, rows in enumerate(files)]
        return cls(Arrays.joined(numbered))

    @property
    def groups(self) -> Integers:
        """The group of each row, [rows]: equal for rows with the same prompt."""
        return self._arrays.groups[self._numbers]

    def where(self, keep: Sequence[bool] | NDArray[numpy.bool_]) -> "Rows":
        """The rows for which `keep` is true."""
        return Rows(self._arrays, self._numbers[numpy.asarray(keep, dtype=bool)])

    def digest(self) -> str:
        """A hash of the rows' tokens and of their scored flags."""
        arrays = self._arrays
        digest = hashlib.sha256(str(len(self)).encode())
        for start in range(0, len(self), HASHED_TOGETHER):
            rows = self._numbers[start : start + HASHED_TOGETHER]
            # The indices of all segments and tokens of these rows.
            segments = _ranges(arrays.segments[rows], arrays.segments[rows + 1])
            tokens = _ranges(arrays.tokens[arrays.segments[rows]], arrays.tokens[arrays.segments[rows + 1]])
            digest.update((arrays.segments[rows + 1] - arrays.segments[rows]).tobytes())
            digest.update((arrays.tokens[segments + 1] - arrays.tokens[segments]).tobytes())
            digest.update(arrays.ids[tokens].tobytes())
            digest.update(arrays.scored[tokens].tobytes())
        return digest.hexdigest()

    def prompts(self) -> list[bytes]:
        """A key for each row. Rows with the same prompt share a key; a row without a prompt has its own."""
        arrays, keys = self._arrays, []
        for position, number in enumerate(self._numbers):
            start, stop = arrays.tokens[arrays.segments[number] : arrays.segments[number] + 2]
            keys.append(arrays.ids[start:stop].tobytes() if stop > start else f"row {position}".encode())
        return keys


def _ranges(starts: Integers, stops: Integers) -> Integers:
    """The numbers of all ranges `starts[k]` … `stops[k] − 1`, concatenated."""
    sizes = stops - starts
    ends = numpy.cumsum(sizes)
    numbers: Integers = numpy.arange(ends[-1] if len(ends) else 0) + numpy.repeat(starts - (ends - sizes), sizes)
    return numbers


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
    arrays, tally = _tokenise(path, tokenizer, recipe, report)
    with cache.put(key) as cache_path:
        save_file(vars(arrays), cache_path, metadata={"tally": json.dumps(asdict(tally))})
    return Rows(arrays), tally


def _read(path: Path) -> tuple[Rows, Tally]:
    with safe_open(path, framework="np") as file:
        arrays = Arrays(**{name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        counts = json.loads(file.metadata()["tally"])
        return Rows(arrays), Tally(**counts | {"refused": Counter(counts["refused"])})


def _key(path: Path, tokenizer: Tokenizer, recipe: Recipe) -> str:
    """The cache key of the file's rows: hashes of the content, and of all that changes its tokens."""
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    if not Renderer(tokenizer, recipe.rendering).dated:  # the rows do not depend on the date, and neither must the key
        recipe = replace(recipe, rendering=replace(recipe.rendering, date=Rendering.date))
    parts = (VERSION, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.eos_token, recipe)
    return f"tokens/{content}/{hashlib.sha256(repr(parts).encode()).hexdigest()}"


def _tokenise(
    path: Path, tokenizer: Tokenizer, recipe: Recipe, report: Callable[[int], None] = lambda rows: None
) -> tuple[Arrays, Tally]:
    tally, chunks, rows = Tally(), [], 0
    with path.open("rb") as file:
        groups = data.batched(examples(file, recipe.mapping), CHUNK)
        processes = usable_processes() if path.stat().st_size > PARALLEL_BYTES and _has_semaphores() else 1
        results = (
            (_tokenise_chunk(group, tokenizer, recipe) for group in groups)
            if processes == 1
            else _in_processes(groups, tokenizer, recipe, processes)
        )
        for arrays, chunk_tally in results:
            chunks.append(arrays)
            tally.add(chunk_tally)
            rows += len(arrays.lines)
            report(rows)
    return Arrays.joined(chunks or [Arrays.of([])]), tally


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

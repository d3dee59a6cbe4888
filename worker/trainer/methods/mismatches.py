"""Mismatched answers for KTO: each row gets an answer to another prompt."""

from collections.abc import Iterator
from dataclasses import replace

import numpy

from worker.trainer.arrays import Shelf
from worker.trainer.data import Response, Row
from worker.trainer.dataset import Rows


def with_mismatches(rows: Rows, max_length: int, shelf: Shelf) -> Rows:
    """The rows with a second response each: the answer of the next row that has another prompt.

    KTO estimates the KL divergence from the reference on such mismatched answers (Ethayarajh et al. 2024,
    arXiv:2402.01306, Sec. 4.1). If all rows have the same prompt, it is the answer of the next row. It is cut
    to at most `max_length` tokens together with the prompt.
    """
    return Rows.kept(shelf, "mismatched", lambda: _mismatched(rows, max_length))


def _mismatched(rows: Rows, max_length: int) -> Iterator[Row]:
    prompts, count = rows.prompts(), len(rows)
    following = numpy.arange(1, count + 1)  # for each row, the next row with another prompt; after the last, the first
    # Two rounds from the back: the second one completes the rows at the end, which continue at the front.
    for step in reversed(range(2 * count)):
        current, after = step % count, (step + 1) % count
        following[current] = after if prompts[after] != prompts[current] else following[after]
    for number, row in enumerate(rows):
        candidate = int(following[number]) % count
        source = candidate if prompts[candidate] != prompts[number] else (number + 1) % count
        answer = rows[source].responses[0]
        room = max(1, max_length - len(row.prompt))
        ids, scored = answer.ids[:room], answer.scored[:room]
        # If the cut leaves no scored token, all tokens are scored: an estimate needs at least one.
        yield replace(row, responses=(row.responses[0], Response(ids, scored if any(scored) else (True,) * len(ids))))

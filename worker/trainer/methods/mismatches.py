"""Rows of labelled answers, each with an answer to another prompt beside it."""

from dataclasses import replace

from worker.trainer.data import Response, Row
from worker.trainer.dataset import Rows


def with_mismatches(rows: Rows, max_length: int) -> Rows:
    """The same rows, each with the answer of the next row of another prompt behind its own.

    KTO estimates how far the policy is from its reference on answers that have nothing to do with the prompt
    (arXiv:2402.01306, Sec. 4.1). Where all rows have one prompt, it is the answer of the next row.
    """
    keys, count = rows.prompts(), len(rows)
    following = list(range(1, count + 1))  # the next row of another prompt, going round
    for number in reversed(range(2 * count)):
        this, after = number % count, (number + 1) % count
        following[this] = after if keys[after] != keys[this] else following[after]

    def mismatched(number: int, row: Row) -> Row:
        nearby = following[number] % count
        other = rows[nearby if keys[nearby] != keys[number] else (number + 1) % count].responses[0]
        room = max(1, max_length - len(row.prompt))
        ids, scored = other.ids[:room], other.scored[:room]
        return replace(row, responses=(row.responses[0], Response(ids, scored if any(scored) else (True,) * len(ids))))

    return Rows.of(mismatched(number, row) for number, row in enumerate(rows))

"""How much of a file may be in memory at a time."""

MAX_RECORD_BYTES = 16 * 1024 * 1024
"""A record larger than this is refused before it is in memory."""
MAX_VALUES = 200_000
"""Of a record, at all depths: a value takes far more memory than bytes."""
MAX_ANSWERS = 64
"""Of a row: K answers are K (K − 1) / 2 pairs."""
CHUNK = 1024 * 1024
"""Bytes that are read at a time."""

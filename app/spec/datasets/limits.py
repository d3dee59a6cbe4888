"""Limits on how much of a file is in memory at a time."""

MAX_RECORD_BYTES = 16 * 1024 * 1024
"""Maximum size of a record. A larger one is refused before it is in memory."""
MAX_VALUES = 200_000
"""Maximum number of values in a record, at all depths. A parsed value takes far more memory than its bytes."""
MAX_ANSWERS = 64
"""Maximum number of answers in a row: K answers make K (K − 1) / 2 pairs."""
MAX_PLACES = 64
"""Maximum number of columns that a template of a mapping names."""
CHUNK = 1024 * 1024
"""Number of bytes to read at a time."""

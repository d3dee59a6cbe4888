"""Preference pairs that a tiny model learns in a few steps."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

WORDS = ["sun", "moon", "star", "rain", "snow", "wind", "leaf", "tree", "bird", "fish"]


def pairs(count: int, seed: int) -> list[dict[str, str]]:
    """Preference pairs in which the answer that repeats the question's word is preferred."""
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        word, other = generator.sample(WORDS, 2)
        rows.append({"prompt": f"say {word}: ", "chosen": f"{word} it is", "rejected": f"no {other} at all"})
    return rows


def write(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path

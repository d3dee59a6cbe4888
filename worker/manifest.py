"""The manifest of a folder: the hashes of its files. It is written with the folder and checked before use."""

import hashlib
import json
from pathlib import Path

NAME = "manifest.json"


def write(folder: Path) -> None:
    """Write the SHA-256 of every file below `folder` to its manifest."""
    (folder / NAME).write_text(json.dumps(_hashes(folder), indent=1))


def hashes_below(folder: Path, name: str) -> dict[str, str]:
    """The SHA-256 of the files below the subfolder `name`, by their path in it. The manifest of `folder` has them."""
    expected: dict[str, str] = json.loads((folder / NAME).read_text())
    return {path.removeprefix(f"{name}/"): value for path, value in expected.items() if path.startswith(f"{name}/")}


def damage(folder: Path) -> str | None:
    """The first difference between `folder` and its manifest, as a message; None if there is none."""
    try:
        expected = json.loads((folder / NAME).read_text())
    except FileNotFoundError:
        return f"{NAME} is missing"
    except ValueError:
        return f"{NAME} is damaged"
    if not isinstance(expected, dict):
        return f"{NAME} is damaged"
    actual = _hashes(folder)
    if missing := sorted(expected.keys() - actual.keys()):
        return f"{missing[0]} is missing"
    if extra := sorted(actual.keys() - expected.keys()):
        return f"{extra[0]} is not in {NAME}"
    if different := sorted(name for name in expected if expected[name] != actual[name]):
        return f"{different[0]} is damaged"
    return None


def _hashes(folder: Path) -> dict[str, str]:
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / NAME:
            with path.open("rb") as file:
                hashes[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes

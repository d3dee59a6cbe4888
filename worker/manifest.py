"""What a folder holds, by hash: written when it is made, looked at before it is used."""

import hashlib
import json
from pathlib import Path

NAME = "manifest.json"


def write(folder: Path) -> None:
    """Write the SHA-256 of every file below `folder` into it."""
    (folder / NAME).write_text(json.dumps(_hashes(folder), indent=1))


def damage(folder: Path) -> str | None:
    """What differs from the manifest of `folder`, in words; None where all is as it was written."""
    try:
        expected = json.loads((folder / NAME).read_text())
    except FileNotFoundError:
        return f"{NAME} is missing"
    except ValueError:
        return f"{NAME} is damaged"
    if not isinstance(expected, dict):
        return f"{NAME} is damaged"
    found = _hashes(folder)
    if missing := sorted(expected.keys() - found.keys()):
        return f"{missing[0]} is missing"
    if more := sorted(found.keys() - expected.keys()):
        return f"{more[0]} does not belong to it"
    if different := sorted(name for name in expected if expected[name] != found[name]):
        return f"{different[0]} is damaged"
    return None


def _hashes(folder: Path) -> dict[str, str]:
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / NAME:
            with path.open("rb") as file:
                hashes[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes

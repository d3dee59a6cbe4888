"""The one shape of a training example: a prompt and the responses that hang on it."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, TypedDict


class Message(TypedDict):
    """A turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


Prompt = str | list[Message]
"""Plain text, or the turns of a conversation, which a model's chat template renders."""


class Kind(StrEnum):
    """What a format's examples can train."""

    PREFERENCE = "preference"
    """Two responses: the preferred one, then the other."""
    SUPERVISED = "supervised"
    """One response."""


@dataclass(frozen=True)
class Example:
    """A prompt and its responses. `raw`: plain text with no prompt, to be learned as it is, without a template."""

    line: int
    prompt: Prompt
    responses: tuple[str, ...]
    raw: bool = False

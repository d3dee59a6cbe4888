"""Control tokens: those that a model reads as structure. What data says is text, whatever it looks like.

A user who writes `<|im_end|>` or `<s>` must not end a turn or begin a text. Templates and this engine write control
tokens; data never does. So where data holds the text of one, its characters are moved to a private plane of Unicode
before the template sees them. They stay as many, and come back after it. What the template wrote is then told from what
only looks so, and both are tokenised in one piece: tokens merge as ever, and offsets hold.
"""

import json
import re
from functools import cached_property
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

Tokenizer = Any
Encoding = tuple[list[int], list[tuple[int, int]]]
"""Token ids, and the characters that each holds."""

_PLANE = 0x100000
"""Every character of Unicode's basic plane has a place here, in its private plane 16."""
_MARK, _FILL = 0xF0000, chr(0xFFFFD)
"""Private plane 15: what stands for a control token while it is told from text."""
_MOVED = re.compile(f"[{chr(_PLANE)}-{chr(0x10FFFF)}]")


class ControlTokens:
    """The control tokens of a tokenizer: those it calls special, and those that end a turn."""

    def __init__(self, tokenizer: Tokenizer, ends: tuple[int, ...] = ()) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        ids = {number for number, token in added.items() if token.special} | set(ends) | set(tokenizer.all_special_ids)
        self._tokens = {added[number].content: (number, added[number]) for number in sorted(ids) if number in added}
        longest = sorted(self._tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest)) or "(?!)")

    def inside(self, value: Any) -> bool:
        """Whether a text, or any in lists and objects, holds what would be read as a control token."""
        if isinstance(value, str):
            return self._pattern.search(value) is not None
        if isinstance(value, dict):
            return any(map(self.inside, value.values())) or any(map(self.inside, value))
        return isinstance(value, list | tuple) and any(map(self.inside, value))

    def moved(self, value: Any) -> Any:
        """`value` with the characters of control tokens out of the way. Raises `ValueError` for text that is there."""
        if isinstance(value, str):
            if _MOVED.search(value):
                raise ValueError("private characters beside the text of a control token")
            return self._pattern.sub(lambda match: "".join(chr(_PLANE + ord(c)) for c in match[0]), value)
        if isinstance(value, dict):
            return {self.moved(name): self.moved(item) for name, item in value.items()}
        return [self.moved(item) for item in value] if isinstance(value, list | tuple) else value

    def encode(self, texts: list[str]) -> list[Encoding]:
        """The tokens of texts as they are: what looks like a control token is one."""
        if not texts:
            return []
        encoded = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))

    def encode_moved(self, text: str) -> Encoding:
        """The tokens of a text in which data's control tokens were moved: they come back as text, and the others are
        control tokens. Raises `ValueError` where the vocabulary has no other tokens for such a text.
        """
        marked = self._pattern.sub(lambda match: self._marks[match[0]], text)
        back = _MOVED.sub(lambda match: chr(ord(match[0]) - _PLANE), marked)
        found = self._as_text.encode(back, add_special_tokens=False)
        control = {number for number, _ in self._tokens.values()}
        if not control.isdisjoint(found.ids):
            raise ValueError("the tokenizer makes a control token of plain text")
        return [self._meant.get(number, number) for number in found.ids], found.offsets

    @cached_property
    def _marks(self) -> dict[str, str]:
        """What stands for each control token: as many characters as it has, which no text has."""
        return {text: chr(_MARK + place) + _FILL * (len(text) - 1) for place, text in enumerate(self._tokens)}

    @cached_property
    def _as_text(self) -> Backend:
        """The tokenizer without its control tokens, and with a token for each of their marks."""
        described = json.loads(self._tokenizer.backend_tokenizer.to_str())
        for token in described["added_tokens"]:
            token["special"] = token["special"] or token["content"] in self._tokens
        backend = Backend.from_str(json.dumps(described))
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        backend.add_tokens(
            [
                AddedToken(
                    self._marks[text], lstrip=token.lstrip, rstrip=token.rstrip, single_word=token.single_word,
                    normalized=False,
                )
                for text, (_, token) in self._tokens.items()
            ]
        )  # fmt: skip
        return backend

    @cached_property
    def _meant(self) -> dict[int, int]:
        """The control token that each mark's token stands for."""
        found = {text: self._as_text.token_to_id(mark) for text, mark in self._marks.items()}
        return {place: self._tokens[text][0] for text, place in found.items() if place is not None}

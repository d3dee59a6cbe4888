"""Control tokens: the tokens that a model reads as structure. Data is always text, even if it looks like one.

A user who writes `<|im_end|>` or `<s>` must not end a turn or begin a text. Only templates and this engine write
control tokens. If data holds the text of one, its characters move to a private plane of Unicode before the template
sees them. Their number stays the same, and they move back afterwards. That tells the template's control tokens from
text that looks the same. The text is still tokenised in one piece, so tokens merge as usual and offsets stay valid.
"""

import json
import re
from functools import cached_property
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerBase as Tokenizer

Encoding = tuple[list[int], list[tuple[int, int]]]
"""Token ids [T], and the character span (begin, end) of each token [T]."""

_PLANE = 0x100000
"""Start of Unicode's private plane 16. Each character of the basic plane has a counterpart here."""
_MARK, _FILL = 0xF0000, chr(0xFFFFD)
"""Private plane 15: stand-ins for control tokens during tokenisation."""
_MOVED = re.compile(f"[{chr(_PLANE)}-{chr(0x10FFFF)}]")
"""A character that was moved to plane 16."""


class ControlTokens:
    """The control tokens of a tokenizer: its special tokens and the tokens `ends`, which end a turn."""

    def __init__(self, tokenizer: Tokenizer, ends: tuple[int, ...] = ()) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        ids = {number for number, token in added.items() if token.special} | set(ends) | set(tokenizer.all_special_ids)
        # By text: (id, token).
        self._tokens = {added[number].content: (number, added[number]) for number in sorted(ids) if number in added}
        longest = sorted(self._tokens, key=len, reverse=True)
        # Longest first, so that no token hides a longer one. "(?!)" never matches.
        self._pattern = re.compile("|".join(map(re.escape, longest)) or "(?!)")

    def inside(self, value: object) -> bool:
        """Whether `value` contains the text of a control token. Searches the texts in lists and objects too."""
        if isinstance(value, str):
            return self._pattern.search(value) is not None
        if isinstance(value, dict):
            return any(map(self.inside, value.values())) or any(map(self.inside, value))
        return isinstance(value, list | tuple) and any(map(self.inside, value))

    def moved(self, value: Any) -> Any:
        """`value` with the characters of control tokens moved to plane 16.

        Raises `ValueError` for text that already uses plane 16.
        """
        if isinstance(value, str):
            if _MOVED.search(value):
                raise ValueError("the row has private Unicode characters beside the text of a control token")
            return self._pattern.sub(lambda match: "".join(chr(_PLANE + ord(char)) for char in match[0]), value)
        if isinstance(value, dict):
            return {self.moved(name): self.moved(item) for name, item in value.items()}
        return [self.moved(item) for item in value] if isinstance(value, list | tuple) else value

    def encode(self, texts: list[str]) -> list[Encoding]:
        """The tokens of `texts` as they are. The text of a control token becomes that token."""
        if not texts:
            return []
        encoded = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))

    def encode_moved(self, text: str) -> Encoding:
        """The tokens of a text in which data's control tokens were moved.

        Moved ones come back as plain text; the others become control tokens. Raises `ValueError` if the vocabulary
        cannot write the plain text without control tokens.
        """
        # 1. Replace the template's control tokens by marks. 2. Move data's characters back. 3. Tokenise without
        # control tokens. 4. Replace the tokens of the marks by the control tokens.
        marked = self._pattern.sub(lambda match: self._marks[match[0]], text)
        restored = _MOVED.sub(lambda match: chr(ord(match[0]) - _PLANE), marked)
        encoding = self._as_text.encode(restored, add_special_tokens=False)
        control_ids = {number for number, _ in self._tokens.values()}
        if not control_ids.isdisjoint(encoding.ids):
            raise ValueError("the tokenizer makes a control token of plain text")
        return [self._control_by_mark.get(number, number) for number in encoding.ids], encoding.offsets

    @cached_property
    def _marks(self) -> dict[str, str]:
        """A mark for each control token, by its text. It has the same length and appears in no text."""
        return {text: chr(_MARK + place) + _FILL * (len(text) - 1) for place, text in enumerate(self._tokens)}

    @cached_property
    def _as_text(self) -> Backend:
        """The tokenizer with control tokens read as plain text, and with one token for each mark."""
        settings = json.loads(self._tokenizer.backend_tokenizer.to_str())
        for token in settings["added_tokens"]:
            token["special"] = token["special"] or token["content"] in self._tokens
        backend = Backend.from_str(json.dumps(settings))
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
    def _control_by_mark(self) -> dict[int, int]:
        """The id of the control token that each mark's token stands for."""
        mark_ids = {text: self._as_text.token_to_id(mark) for text, mark in self._marks.items()}
        return {mark_id: self._tokens[text][0] for text, mark_id in mark_ids.items() if mark_id is not None}

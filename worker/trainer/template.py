"""A model's chat template, as a function of the conversation and of one day that does not pass."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any

from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from app.spec.datasets.example import Message

Tokenizer = Any
Tools = Sequence[dict[str, Any]]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_THINKING = re.compile(r"<think>\s*(</think>\s*)?$")
_ASKED, _SAID, _THOUGHT = "Qzxq asked?", "Vwkv said.", "Jbtj thought."
"""Texts that no template has, to see what it writes around them."""


class Template:
    """The chat template of a tokenizer. Whatever it asks of the world has one answer: `day` is today."""

    def __init__(self, tokenizer: Tokenizer, day: str) -> None:
        self._tokenizer, self._day = tokenizer, date.fromisoformat(day)
        self._parts = False

    def write(self, messages: Sequence[Message], tools: Tools = (), *, generation: bool = False) -> str:
        """The text of a conversation; with `generation`, up to where the assistant goes on.

        Raises whatever the template raises.
        """
        self._probe  # whether it takes text in parts  # noqa: B018
        return self._write(messages, tools, generation=generation)

    def _write(self, messages: Sequence[Message], tools: Tools = (), *, generation: bool = False) -> str:
        self._hold_still(tools)
        text: str = self._tokenizer.apply_chat_template(
            list(map(self._message, messages)), tools=list(tools) or None, tokenize=False,
            add_generation_prompt=generation,
        )  # fmt: skip
        return text

    def without_ends(self, text: str) -> str:
        """`text` with a null character for each token that begins a text or ends one."""
        for token in (self._tokenizer.bos_token, self._tokenizer.eos_token):
            text = text.replace(token, "\0") if token else text
        return text

    def marked(self, messages: Sequence[Message], tools: Tools) -> list[tuple[int, int]] | None:
        """Where the template itself says that the assistant speaks, in characters, turn by turn: `{% generation %}`.

        None where it does not say it.
        """
        source = self._tokenizer.get_chat_template(tools=list(tools) or None)
        if not _GENERATION.search(source):
            return None
        self._hold_still(tools)
        _, spans = render_jinja_template(
            conversations=[list(map(self._message, messages))], tools=list(tools) or None, chat_template=source,
            return_assistant_tokens_mask=True, **self._tokenizer.special_tokens_map,
        )  # fmt: skip
        return list(spans[0])

    def _hold_still(self, tools: Tools) -> None:
        """What a template could read from outside is the same on every day: the date, and what is drawn at random."""
        source = self._tokenizer.get_chat_template(tools=list(tools) or None)
        environment = _compile_jinja_template(source).environment
        environment.globals["strftime_now"] = self._day.strftime
        environment.globals.pop("lipsum", None)
        environment.filters["random"] = lambda *given: next(iter(given[-1]))  # behind what Jinja gives it

    @cached_property
    def dated(self) -> bool:
        """Whether the text may depend on the day."""
        templates = self._tokenizer.chat_template
        return any(
            "strftime_now" in one for one in (templates.values() if isinstance(templates, dict) else [templates])
        )

    @cached_property
    def ending(self) -> str:
        """What the template writes behind an answer; empty where it writes nothing, or cannot be seen."""
        return self._probe.ending

    def wrote(self, text: str) -> bool:
        """Whether a prompt that is text was written by this template already, up to where the answer begins."""
        probe, begun = self._probe, self.without_ends(text).lstrip("\0 \n")
        user, closing = probe.user.strip(), _THINKING.sub("", probe.closing).strip()
        opens = any(begun.startswith(one) for one in (user, probe.opening.strip(), *self._special) if one)
        return bool(opens and closing) and _THINKING.sub("", text).rstrip().endswith(closing)

    @cached_property
    def _special(self) -> tuple[str, ...]:
        return tuple(token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special)

    @cached_property
    def header(self) -> str:
        """What the template writes where the assistant is to answer; empty where it cannot be seen."""
        return self._probe.assistant

    @cached_property
    def reads_reasoning(self) -> bool:
        """Whether the template writes what an answer's `reasoning` says."""
        thought: Message = {"role": "assistant", "content": _SAID, "reasoning": _THOUGHT}
        try:
            return _THOUGHT in self.write([{"role": "user", "content": _ASKED}, thought])
        except Exception:  # a template may raise anything
            return False

    @cached_property
    def _probe(self) -> "_Probe":
        """What stands around two texts that no template has. Templates of models that see take text in parts alone."""
        for parts in (False, True):
            self._parts = parts
            try:
                found = _Probe.of(self)
            except Exception:  # a template may raise anything, and may know no plain conversation  # noqa: S112
                continue
            if found is not None:
                return found
        self._parts = False
        return _Probe("", "", "", "", "")

    def _message(self, message: Message) -> dict[str, Any]:
        """A message under the names that templates read."""
        found: dict[str, Any] = {name: value for name, value in message.items() if name != "reasoning"}
        if "reasoning" in message:
            found |= {"reasoning_content": message["reasoning"], "thinking": message["reasoning"]}
        if self._parts:
            found["content"] = [{"type": "text", "text": message["content"]}]
        return found


@dataclass(frozen=True)
class _Probe:
    """What a template writes first, before a user's text, behind it, before an answer, and behind one."""

    opening: str
    user: str
    closing: str
    assistant: str
    ending: str

    @classmethod
    def of(cls, template: Template) -> "_Probe | None":
        """None where the template leaves texts out."""
        asked: Message = {"role": "user", "content": _ASKED}
        said: Message = {"role": "assistant", "content": _SAID}
        text = template._write([asked, said])
        if _ASKED not in text or _SAID not in text:
            return None
        base, begun = template._write([asked]), template._write([asked], generation=True)
        header = begun.removeprefix(base) if begun.startswith(base) else begun.rpartition(_ASKED)[2]
        try:
            later = template._write([asked, said, asked])
        except Exception:  # one turn is all that it knows
            later = base
        # What both have before the user's text, but for the tokens that begin a text or end a turn.
        first, last = (
            template.without_ends(one.rpartition(_ASKED)[0].rpartition(_SAID)[2] or one.partition(_ASKED)[0])
            for one in (base, later)
        )
        shared = 0
        while shared < min(len(first), len(last)) and first[-1 - shared] == last[-1 - shared]:
            shared += 1
        user = first[len(first) - shared :].lstrip("\0")
        ending = text.rpartition(_SAID)[2]
        opening = template.without_ends(base.partition(_ASKED)[0]).lstrip("\0 \n").removesuffix(user)
        return cls(opening, user.removeprefix(ending.strip()).lstrip(), begun.rpartition(_ASKED)[2], header, ending)


def ends_of(tokenizer: Tokenizer, template: Template | None) -> tuple[int, ...]:
    """The tokens that end a turn: the one that the template writes behind an answer, and the tokenizer's own end."""
    found = []
    if template is not None:
        added = tokenizer.added_tokens_decoder
        behind = tokenizer(template.ending, add_special_tokens=False).input_ids if template.ending else []
        found = [token for token in behind if token in added and not added[token].content.isspace()][:1]
    return tuple(dict.fromkeys([*found, tokenizer.eos_token_id]))

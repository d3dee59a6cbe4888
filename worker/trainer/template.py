"""A model's chat template, as a function of the conversation and of a fixed date."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property

from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from app.spec.datasets.example import Message
from app.spec.json_types import JsonObject

Tools = Sequence[JsonObject]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_THINKING = re.compile(r"<think>\s*(</think>\s*)?$")
_ASKED, _SAID, _THOUGHT = "Qzxq asked?", "Vwkv said.", "Jbtj thought."
"""Texts that no template contains. They show what a template writes around texts."""


class Template:
    """The chat template of a tokenizer. Its output is reproducible: `day` stands for today's date."""

    def __init__(self, tokenizer: Tokenizer, day: str) -> None:
        self._tokenizer, self._day = tokenizer, date.fromisoformat(day)
        self._text_as_parts = False

    def write(self, messages: Sequence[Message], tools: Tools = (), *, generation: bool = False) -> str:
        """The text of a conversation. With `generation`, it ends where the assistant's answer begins.

        Raises whatever the template raises.
        """
        self._probe  # finds out whether the template needs text in parts  # noqa: B018
        return self._write(messages, tools, generation=generation)

    def _write(self, messages: Sequence[Message], tools: Tools = (), *, generation: bool = False) -> str:
        self._freeze_environment(tools)
        text: str = self._tokenizer.apply_chat_template(
            list(map(self._message, messages)), tools=list(tools) or None, tokenize=False,
            add_generation_prompt=generation,
        )  # fmt: skip
        return text

    def without_ends(self, text: str) -> str:
        """`text` with each BOS and EOS token replaced by a null character."""
        for token in (self._tokenizer.bos_token, self._tokenizer.eos_token):
            text = text.replace(token, "\0") if token else text
        return text

    def marked(self, messages: Sequence[Message], tools: Tools) -> list[tuple[int, int]] | None:
        """The character span of each assistant turn, as the template marks it with `{% generation %}`.

        None if the template has no such marks.
        """
        source = self._tokenizer.get_chat_template(tools=list(tools) or None)
        if not _GENERATION.search(source):
            return None
        self._freeze_environment(tools)
        _, spans = render_jinja_template(
            conversations=[list(map(self._message, messages))], tools=list(tools) or None, chat_template=source,
            return_assistant_tokens_mask=True, **self._tokenizer.special_tokens_map,
        )  # fmt: skip
        return list(spans[0])

    def _freeze_environment(self, tools: Tools) -> None:
        """Make what a template reads from outside reproducible: the date, and random choices."""
        source = self._tokenizer.get_chat_template(tools=list(tools) or None)
        environment = _compile_jinja_template(source).environment
        environment.globals["strftime_now"] = self._day.strftime
        environment.globals.pop("lipsum", None)
        # The value comes after Jinja's own arguments.
        environment.filters["random"] = lambda *arguments: next(iter(arguments[-1]))

    @cached_property
    def dated(self) -> bool:
        """Whether the text may depend on the date."""
        templates = self._tokenizer.chat_template
        return any(
            "strftime_now" in source for source in (templates.values() if isinstance(templates, dict) else [templates])
        )

    @cached_property
    def ending(self) -> str:
        """The text that the template writes after an answer; empty if it writes nothing or cannot be probed."""
        return self._probe.ending

    def wrote(self, text: str) -> bool:
        """Whether the prompt `text` already has the form of this template, up to where the answer begins."""
        probe, start = self._probe, self.without_ends(text).lstrip("\0 \n")
        user, closing = probe.user.strip(), _THINKING.sub("", probe.closing).strip()
        opens = any(
            start.startswith(beginning) for beginning in (user, probe.opening.strip(), *self._special) if beginning
        )
        return bool(opens and closing) and _THINKING.sub("", text).rstrip().endswith(closing)

    @cached_property
    def _special(self) -> tuple[str, ...]:
        """The texts of the tokenizer's special tokens."""
        return tuple(token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special)

    @cached_property
    def header(self) -> str:
        """The text that the template writes to introduce an answer; empty if it cannot be probed."""
        return self._probe.assistant

    @cached_property
    def reads_reasoning(self) -> bool:
        """Whether the template writes the `reasoning` of an answer."""
        thought: Message = {"role": "assistant", "content": _SAID, "reasoning": _THOUGHT}
        try:
            return _THOUGHT in self.write([{"role": "user", "content": _ASKED}, thought])
        except Exception:  # a template may raise anything
            return False

    @cached_property
    def _probe(self) -> "_Probe":
        """The texts that the template writes around a question and an answer.

        Templates of vision models may take text only in parts, so both forms are tried.
        """
        for parts in (False, True):
            self._text_as_parts = parts
            try:
                probe = _Probe.of(self)
            except Exception:  # a template may raise anything, for plain conversations too  # noqa: S112
                continue
            if probe is not None:
                return probe
        self._text_as_parts = False
        return _Probe("", "", "", "", "")

    def _message(self, message: Message) -> JsonObject:
        """A message with the field names that templates read."""
        fields: JsonObject = {name: value for name, value in message.items() if name != "reasoning"}
        if "reasoning" in message:
            fields |= {"reasoning_content": message["reasoning"], "thinking": message["reasoning"]}
        if self._text_as_parts:
            fields["content"] = [{"type": "text", "text": message["content"]}]
        return fields


@dataclass(frozen=True)
class _Probe:
    """The texts that a template writes around messages.

    `opening` begins the conversation. `user` comes before a user's text, `closing` after it, up to the answer.
    `assistant` introduces an answer and `ending` follows it.
    """

    opening: str
    user: str
    closing: str
    assistant: str
    ending: str

    @classmethod
    def of(cls, template: Template) -> "_Probe | None":
        """The probe of `template`; None if the template leaves texts out."""
        asked: Message = {"role": "user", "content": _ASKED}
        said: Message = {"role": "assistant", "content": _SAID}
        # 1. Let the template write the probe conversations.
        text = template._write([asked, said])
        if _ASKED not in text or _SAID not in text:
            return None
        base, prompted = template._write([asked]), template._write([asked], generation=True)
        header = prompted.removeprefix(base) if prompted.startswith(base) else prompted.rpartition(_ASKED)[2]
        try:
            continued = template._write([asked, said, asked])
        except Exception:  # the template takes a single turn only
            continued = base
        # 2. `user` is the common end of the texts before the first and the last question, without BOS and EOS tokens.
        first, last = (
            template.without_ends(
                conversation.rpartition(_ASKED)[0].rpartition(_SAID)[2] or conversation.partition(_ASKED)[0]
            )
            for conversation in (base, continued)
        )
        shared = 0
        while shared < min(len(first), len(last)) and first[-1 - shared] == last[-1 - shared]:
            shared += 1
        user = first[len(first) - shared :].lstrip("\0")
        # 3. `ending` follows the answer. `opening` is the rest of the text before the first question.
        ending = text.rpartition(_SAID)[2]
        opening = template.without_ends(base.partition(_ASKED)[0]).lstrip("\0 \n").removesuffix(user)
        return cls(opening, user.removeprefix(ending.strip()).lstrip(), prompted.rpartition(_ASKED)[2], header, ending)


def ends_of(tokenizer: Tokenizer, template: Template | None) -> tuple[int, ...]:
    """The tokens that end a turn: the one that the template writes after an answer, and the tokenizer's EOS token."""
    end_ids = []
    if template is not None:
        added = tokenizer.added_tokens_decoder
        ending_ids = tokenizer(template.ending, add_special_tokens=False).input_ids if template.ending else []
        end_ids = [token for token in ending_ids if token in added and not added[token].content.isspace()][:1]
    return tuple(dict.fromkeys([*end_ids, tokenizer.eos_token_id]))

"""Read conversations: OpenAI messages, ShareGPT turns, transcripts and similar forms become lists of `Message`."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeGuard

from app.spec.datasets import json_text
from app.spec.datasets.errors import DatasetError, Dropped
from app.spec.datasets.example import Message, ResponseContent, Role
from app.spec.json_types import JsonObject

TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")
ROLES: dict[str, Role] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "bot": "assistant", "chatbot": "assistant", "ai": "assistant", "function_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool", "tool_response": "tool",
}  # fmt: skip
"""The role that each name of a speaker means."""
_PLAIN_ROLES = ("user", "assistant", "system")
_SPEAKER_KEYS, _CONTENT_KEYS = ("role", "from", "speaker"), ("content", "value", "text", "parts")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_LEARN_KEYS = ("weight", "train", "loss", "train_on_turn")
"""Keys that say whether a message is trained on."""
_CALL_KEYS = ("tool_calls", "function_call", "tool_call_id", "name")
_READ_KEYS = frozenset((*_SPEAKER_KEYS, *_CONTENT_KEYS, *_REASONING_KEYS, *_LEARN_KEYS, *_CALL_KEYS))


@dataclass
class MessageReader:
    """Reads the messages of one file. `roles` are role names of this file only. `unread` counts ignored keys."""

    roles: Mapping[str, Role] = field(default_factory=dict)
    unread: Counter[str] = field(default_factory=Counter)

    @staticmethod
    def is_message(value: JsonObject) -> bool:
        """Whether an object names a speaker."""
        return any(name in value for name in _SPEAKER_KEYS)

    def read(self, value: object, field: str, line: int) -> list[Message]:
        """Read a list of messages, or a single one: OpenAI's (`role`, `content`) or ShareGPT's (`from`, `value`).

        Raises `DatasetError` for a malformed message, and `Dropped` for one without content, unless it is an answer.
        """
        if isinstance(value, dict) and self.is_message(value):
            value = [value]
        if not isinstance(value, list) or not value:
            raise DatasetError(line, field, "must be a list of messages that is not empty")
        return [self.read_message(item, f"{field}[{index}]", line) for index, item in enumerate(value)]

    def read_message(self, item: object, path: str, line: int) -> Message:
        """Read one message. `path` names it in errors, like `messages[0]`."""
        if _is_plain(item) and item["role"] not in self.roles:
            return item  # fast path: nearly all messages have this form already
        if not isinstance(item, dict):
            raise DatasetError(line, path, "must be an object with 'role' and 'content', or 'from' and 'value'")
        speaker_key = next((name for name in _SPEAKER_KEYS if name in item), None)
        if speaker_key is None:
            raise DatasetError(line, path, "must be an object with 'role' and 'content', or 'from' and 'value'")
        speaker = item[speaker_key]
        role = self.roles.get(speaker) or ROLES.get(speaker.strip().lower()) if isinstance(speaker, str) else None
        if role is None:
            known = ", ".join(sorted(ROLES))
            reason = f"must be one of {known}; a mapping's 'roles' says what other names mean"
            raise DatasetError(line, f"{path}.{speaker_key}", reason)
        if not item.keys() <= _READ_KEYS:
            for name in item.keys() - _READ_KEYS:
                if item[name] is not None:
                    self.unread[f"messages[].{name}"] += 1
        return self._full_message(item, role, speaker, path, line)

    def _full_message(self, item: JsonObject, role: Role, speaker: str, path: str, line: int) -> Message:
        """Read a message that may have content parts, reasoning or tool calls."""
        content_key = next((name for name in _CONTENT_KEYS if item.get(name) is not None), None)
        content = "" if content_key is None else item[content_key]
        calls = item.get("tool_calls") or []
        if item.get("function_call"):  # the older form, with one call a message
            calls = [{"function": item["function_call"]}]
        if speaker == "function_call" and content_key is not None:
            calls, content = _calls_from_json(content, f"{path}.{content_key}", line), ""
        reasoning = next((item[name] for name in _REASONING_KEYS if item.get(name)), "")
        if type(content) is not str:
            content, part_reasoning = _join_parts(content, f"{path}.{content_key}", line)
            reasoning = reasoning or part_reasoning
        elif content_key is None and not calls and not reasoning and role != "tool":
            if not item.keys() <= _READ_KEYS:
                raise DatasetError(line, f"{path}.content", "is missing")
            if role != "assistant":  # a null answer is dropped later, by the reader of answers
                raise Dropped("empty_turn", f"{path}.content")
        message: Message = {"role": role, "content": content}
        if reasoning:
            if not isinstance(reasoning, str):
                raise DatasetError(line, f"{path}.reasoning_content", "must be a string")
            if role == "assistant":
                message["reasoning"] = reasoning
            else:
                self.unread[f"messages[].reasoning_content of the {role}"] += 1
        if calls:
            if role != "assistant" or not isinstance(calls, list):
                raise DatasetError(line, f"{path}.tool_calls", "must be a list, in a message of the assistant")
            message["tool_calls"] = [_tool_call(call, f"{path}.tool_calls[{k}]", line) for k, call in enumerate(calls)]
        for name in ("tool_call_id", "name"):
            if role == "tool" and isinstance(item.get(name), str):
                message[name] = item[name]
        return message

    def transcript(self, value: object, field: str, line: int) -> list[Message]:
        """Read an Anthropic HH transcript, "\\n\\nHuman: …\\n\\nAssistant: …", or a list of messages."""
        if isinstance(value, list):
            return self.read(value, field, line)
        if not isinstance(value, str):
            raise DatasetError(line, field, "must be a transcript or a list of messages")
        before, *parts = TRANSCRIPT.split(value)
        if not parts or before.strip():
            reason = "must be a transcript that starts with '\\n\\nHuman:', or come with a 'prompt'"
            raise DatasetError(line, field, reason)
        return [
            {"role": "user" if speaker == "Human" else "assistant", "content": text.strip()}
            for speaker, text in zip(parts[::2], parts[1::2], strict=True)
        ]

    def answer(self, value: object, field: str, line: int) -> str | list[Message]:
        """Read an answer: text, or messages. The messages may begin with the prompt."""
        return value if isinstance(value, str) else self.read(value, field, line)


def _is_plain(item: object) -> TypeGuard[Message]:
    """Whether an object is a valid `Message` of a text role, with no other keys."""
    return (
        type(item) is dict and len(item) == 2 and item.get("role") in _PLAIN_ROLES and type(item.get("content")) is str
    )


def learn_flag(item: object, path: str, line: int) -> bool | None:
    """The flag of a message that says whether it is trained on: OpenAI's `weight`, or `train` and the like.

    None if it has no flag. Raises `DatasetError` for a flag that is neither a boolean nor 0 or 1.
    """
    if not isinstance(item, dict) or len(item) < 3:
        return None
    for name in _LEARN_KEYS:
        value = item.get(name)
        if value is None:
            continue
        if isinstance(value, bool) and name != "weight":
            return value
        if value in (0, 1) and not isinstance(value, bool):
            return bool(value)
        raise DatasetError(line, f"{path}.{name}", "must be 0 or 1" if name == "weight" else "must be true or false")
    return None


def _join_parts(value: object, field: str, line: int) -> tuple[str, str]:
    """(text, reasoning) of a list of content parts in the form of OpenAI, Anthropic or Gemini."""
    texts, reasoning = [], []
    for part in value if isinstance(value, list) else [None]:
        if not isinstance(part, dict):
            part = {}
        kind = "text" if part.keys() == {"text"} else part.get("type")  # Gemini parts have no type
        if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("thinking", "reasoning") and isinstance(part.get(kind), str):
            reasoning.append(part[kind])
        elif kind in ("text", "input_text", "output_text"):
            raise DatasetError(line, f"{field}.text", "must be a string")
        else:
            raise DatasetError(line, field, "must be a string; images and other parts cannot be trained on")
    return "".join(texts), "\n".join(reasoning)


def _calls_from_json(value: object, path: str, line: int) -> list[JsonObject]:
    """The tool calls in the JSON text of a ShareGPT `function_call` message."""
    try:
        calls = json_text.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise DatasetError(line, path, f"is not valid JSON: {error}") from error
    return [{"function": call} for call in (calls if isinstance(calls, list) else [calls])]


def _tool_call(call: object, path: str, line: int) -> JsonObject:
    """A tool call in OpenAI's form, with its arguments as an object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DatasetError(line, path, "must be an object with 'function': {'name', 'arguments'}")
    arguments = function.get("arguments")
    arguments = {} if arguments is None else arguments
    if isinstance(arguments, str):
        try:
            arguments = json_text.loads(arguments or "{}")
        except ValueError as error:
            raise DatasetError(line, f"{path}.function.arguments", f"is not valid JSON: {error}") from error
    else:
        arguments = without_nulls(arguments)
    if not isinstance(arguments, dict):
        raise DatasetError(line, f"{path}.function.arguments", "must be a JSON object")
    parsed: JsonObject = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if isinstance(call, dict) and isinstance(call.get("id"), str):
        parsed["id"] = call["id"]
    return parsed


def without_nulls(value: object) -> object:
    """`value` without its null members, at all depths.

    In a table, and in JSON exported from one, every row has the members of all rows. The missing ones are null.
    """
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def same_turns(ours: list[Message], theirs: list[Message]) -> bool:
    """Whether two histories are equal, apart from white space."""
    return len(ours) == len(theirs) and all(map(same_turn, ours, theirs))


def same_turn(ours: Message, theirs: Message) -> bool:
    """Whether two messages have equal roles, texts and tool calls, apart from white space in the text."""
    return ours is theirs or (
        ours["role"] == theirs["role"]
        and (ours["content"] == theirs["content"] or ours["content"].split() == theirs["content"].split())
        and _tool_calls(ours) == _tool_calls(theirs)
    )


def _tool_calls(turn: Message) -> list[tuple[str, object]]:
    return [(call["function"]["name"], call["function"]["arguments"]) for call in turn.get("tool_calls", [])]


def without_system(turns: list[Message]) -> list[Message]:
    """The turns without the system prompt."""
    return [turn for turn in turns if turn["role"] != "system"] if has_system(turns) else turns


def has_system(turns: list[Message]) -> bool:
    return any(turn["role"] == "system" for turn in turns)


def system_prompt(turns: list[Message]) -> str:
    """The system prompt of a conversation; empty if it has none."""
    return "\n\n".join(turn["content"] for turn in turns if turn["role"] == "system" and turn["content"].strip())


def as_response(turns: list[Message], field: str) -> ResponseContent:
    """The turns of an answer. A single plain message becomes text.

    Raises `Dropped` unless the first and the last turn are the assistant's.
    """
    if not turns or turns[-1]["role"] != "assistant":
        raise Dropped("ends_without_an_answer", field)
    if turns[0]["role"] != "assistant":
        raise Dropped("answers_another_prompt", field)
    only = turns[0]
    plain = len(turns) == 1 and "tool_calls" not in only and "reasoning" not in only
    return only["content"] if plain else turns


def is_empty(response: ResponseContent) -> bool:
    """Whether a response has neither text nor tool calls of the assistant."""
    if isinstance(response, str):
        return not response or response.isspace()
    return not any(
        turn["role"] == "assistant" and (turn["content"].strip() or turn.get("tool_calls")) for turn in response
    )


def parse_tools(value: object, field: str, line: int) -> tuple[JsonObject, ...]:
    """The tools of an example: OpenAI's list, or the same as JSON text.

    Raises `DatasetError` for anything else.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = json_text.loads(value)
        except ValueError as error:
            raise DatasetError(line, field, f"is not valid JSON: {error}") from error
    else:
        value = without_nulls(value)
    if not value:
        return ()
    if not isinstance(value, list):
        raise DatasetError(line, field, "must be a list of tools")
    tools = []
    for number, tool in enumerate(value):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DatasetError(line, f"{field}[{number}]", "must be an object with 'function': {'name', …}")
        tools.append({"type": "function", "function": function})
    return tuple(tools)

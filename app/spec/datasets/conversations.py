"""The turns of a conversation, in each of the ways people write them down."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard, cast

from app.spec.datasets import json_text
from app.spec.datasets.errors import DatasetError, Dropped
from app.spec.datasets.example import Message, Response, Role

TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")
ROLES: dict[str, Role] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "bot": "assistant", "chatbot": "assistant", "ai": "assistant", "function_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool", "tool_response": "tool",
}  # fmt: skip
"""What people call the roles."""
_PLAIN_ROLES = ("user", "assistant", "system")
_SPEAKER, _SAID = ("role", "from", "speaker"), ("content", "value", "text", "parts")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_LEARNED = ("weight", "train", "loss", "train_on_turn")
"""What says of a message whether it is learned."""
_READ = frozenset((*_SPEAKER, *_SAID, *_REASONING, *_LEARNED, "tool_calls", "function_call", "tool_call_id", "name"))


@dataclass
class Turns:
    """Reads messages. `roles` are names of roles that only this file has; `unread` counts what is left aside."""

    roles: Mapping[str, Role] = field(default_factory=dict)
    unread: Counter[str] = field(default_factory=Counter)

    @staticmethod
    def is_message(value: dict[str, Any]) -> bool:
        """Whether an object says who speaks."""
        return any(name in value for name in _SPEAKER)

    def messages(self, value: object, field: str, line: int) -> list[Message]:
        """A list of messages, or one: OpenAI's (`role`, `content`, tool calls) or ShareGPT's (`from`, `value`)."""
        if isinstance(value, dict) and self.is_message(value):
            value = [value]
        if not isinstance(value, list) or not value:
            raise DatasetError(line, field, "must be a list of messages that is not empty")
        return [self.message(item, f"{field}[{index}]", line) for index, item in enumerate(value)]

    def message(self, item: object, where: str, line: int) -> Message:
        """One message."""
        if _is_plain(item) and item["role"] not in self.roles:
            return item  # as nearly all are: nothing of it has to be read otherwise
        if not isinstance(item, dict):
            raise DatasetError(line, where, "must be an object with 'role' and 'content', or 'from' and 'value'")
        speaker = next((name for name in _SPEAKER if name in item), None)
        if speaker is None:
            raise DatasetError(line, where, "must be an object with 'role' and 'content', or 'from' and 'value'")
        named = item[speaker]
        role = self.roles.get(named) or ROLES.get(named.strip().lower()) if isinstance(named, str) else None
        if role is None:
            known = ", ".join(sorted(ROLES))
            reason = f"must be one of {known}; a mapping's 'roles' says what other names mean"
            raise DatasetError(line, f"{where}.{speaker}", reason)
        if not item.keys() <= _READ:
            for name in item.keys() - _READ:
                if item[name] is not None:
                    self.unread[f"messages[].{name}"] += 1
        return self._message(item, role, named, where, line)

    def _message(self, item: dict[str, Any], role: Role, named: str, where: str, line: int) -> Message:
        said = next((name for name in _SAID if item.get(name) is not None), None)
        content = "" if said is None else item[said]
        calls = item.get("tool_calls") or []
        if item.get("function_call"):  # what tool calls were before there could be several
            calls = [{"function": item["function_call"]}]
        if named == "function_call" and said is not None:
            calls, content = _written_calls(content, f"{where}.{said}", line), ""
        reasoning = next((item[name] for name in _REASONING if item.get(name)), "")
        if type(content) is not str:
            content, thought = _parts(content, f"{where}.{said}", line)
            reasoning = reasoning or thought
        elif said is None and not calls and not reasoning and role != "tool":
            if not item.keys() <= _READ:
                raise DatasetError(line, f"{where}.content", "is missing")
            if role != "assistant":  # an answer that is null is left out where it is an answer
                raise Dropped("empty_turn", f"{where}.content")
        found: Message = {"role": role, "content": content}
        if reasoning:
            if not isinstance(reasoning, str):
                raise DatasetError(line, f"{where}.reasoning_content", "must be a string")
            if role == "assistant":
                found["reasoning"] = reasoning
            else:
                self.unread[f"messages[].reasoning_content of the {role}"] += 1
        if calls:
            if role != "assistant" or not isinstance(calls, list):
                raise DatasetError(line, f"{where}.tool_calls", "must be a list, in a message of the assistant")
            found["tool_calls"] = [_call(call, f"{where}.tool_calls[{k}]", line) for k, call in enumerate(calls)]
        for name in ("tool_call_id", "name"):
            if role == "tool" and isinstance(item.get(name), str):
                found[name] = item[name]
        return found

    def transcript(self, value: object, field: str, line: int) -> list[Message]:
        """The turns of an Anthropic HH transcript, "\\n\\nHuman: …\\n\\nAssistant: …", or of a message list."""
        if isinstance(value, list):
            return self.messages(value, field, line)
        if not isinstance(value, str):
            raise DatasetError(line, field, "must be a transcript or a list of messages")
        before, *parts = TRANSCRIPT.split(value)
        if not parts or before.strip():
            reason = "must be a transcript that starts with '\\n\\nHuman:', or come with a 'prompt'"
            raise DatasetError(line, field, reason)
        return [
            {"role": "user" if speaker == "Human" else "assistant", "content": said.strip()}
            for speaker, said in zip(parts[::2], parts[1::2], strict=True)
        ]

    def side(self, value: object, field: str, line: int) -> str | list[Message]:
        """What a row gives as an answer: text; or messages, with or without those that they answer."""
        return value if isinstance(value, str) else self.messages(value, field, line)


def _is_plain(item: object) -> TypeGuard[Message]:
    """Whether an object is a message as it stands, of the plainest kind."""
    return (
        type(item) is dict and len(item) == 2 and item.get("role") in _PLAIN_ROLES and type(item.get("content")) is str
    )


def learned(item: object, where: str, line: int) -> bool | None:
    """Whether a message is to be learned, where it says so itself: OpenAI's `weight`, and what others call it."""
    if not isinstance(item, dict) or len(item) < 3:
        return None
    for name in _LEARNED:
        value = item.get(name)
        if value is None:
            continue
        if isinstance(value, bool) and name != "weight":
            return value
        if value in (0, 1) and not isinstance(value, bool):
            return bool(value)
        raise DatasetError(line, f"{where}.{name}", "must be 0 or 1" if name == "weight" else "must be true or false")
    return None


def _parts(value: object, field: str, line: int) -> tuple[str, str]:
    """(text, reasoning) of a list of content parts, as OpenAI, Anthropic and Gemini write them."""
    said, thought = [], []
    for part in value if isinstance(value, list) else [None]:
        if not isinstance(part, dict):
            part = {}
        kind = "text" if part.keys() == {"text"} else part.get("type")  # Gemini's have no type
        if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            said.append(part["text"])
        elif kind in ("thinking", "reasoning") and isinstance(part.get(kind), str):
            thought.append(part[kind])
        elif kind in ("text", "input_text", "output_text"):
            raise DatasetError(line, f"{field}.text", "must be a string")
        else:
            raise DatasetError(line, field, "must be a string; images and other parts cannot be trained on")
    return "".join(said), "\n".join(thought)


def _written_calls(value: object, where: str, line: int) -> list[dict[str, Any]]:
    """Calls that a ShareGPT message has as JSON text."""
    try:
        function = json_text.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise DatasetError(line, where, f"is not valid JSON: {error}") from error
    return [{"function": call} for call in (function if isinstance(function, list) else [function])]


def _call(call: object, where: str, line: int) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DatasetError(line, where, "must be an object with 'function': {'name', 'arguments'}")
    arguments = function.get("arguments")
    arguments = {} if arguments is None else arguments
    if isinstance(arguments, str):
        try:
            arguments = json_text.loads(arguments or "{}")
        except ValueError as error:
            raise DatasetError(line, f"{where}.function.arguments", f"is not valid JSON: {error}") from error
    else:
        arguments = without_nulls(arguments)
    if not isinstance(arguments, dict):
        raise DatasetError(line, f"{where}.function.arguments", "must be a JSON object")
    found: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if isinstance(cast(dict[str, Any], call).get("id"), str):
        found["id"] = cast(dict[str, Any], call)["id"]
    return found


def without_nulls(value: Any) -> Any:
    """`value` without the members that are null. Tables, and JSON that was written from one, give every row the members
    that any row has: what is null there was never said.
    """
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def same_turns(ours: list[Message], theirs: list[Message]) -> bool:
    """Whether two histories say the same, but for white space."""
    return len(ours) == len(theirs) and all(map(same_turn, ours, theirs))


def same_turn(ours: Message, theirs: Message) -> bool:
    """Whether two messages say the same, but for white space."""
    return ours is theirs or (
        ours["role"] == theirs["role"]
        and (ours["content"] == theirs["content"] or ours["content"].split() == theirs["content"].split())
        and _called(ours) == _called(theirs)
    )


def _called(turn: Message) -> list[tuple[str, Any]]:
    return [(call["function"]["name"], call["function"]["arguments"]) for call in turn.get("tool_calls", [])]


def spoken(turns: list[Message]) -> list[Message]:
    """The turns without the system prompt, which some forms repeat and others do not."""
    return [turn for turn in turns if turn["role"] != "system"] if any_system(turns) else turns


def any_system(turns: list[Message]) -> bool:
    return any(turn["role"] == "system" for turn in turns)


def system_of(turns: list[Message]) -> str:
    """The system prompt of a conversation; empty where there is none."""
    return "\n\n".join(turn["content"] for turn in turns if turn["role"] == "system" and turn["content"].strip())


def response_of(turns: list[Message], field: str) -> Response:
    """The turns of an answer, as text where they are one plain message. Raises `Dropped` where none answers."""
    if not turns or turns[-1]["role"] != "assistant":
        raise Dropped("ends_without_an_answer", field)
    if turns[0]["role"] != "assistant":
        raise Dropped("answers_another_prompt", field)
    only = turns[0]
    plain = len(turns) == 1 and "tool_calls" not in only and "reasoning" not in only
    return only["content"] if plain else turns


def empty(response: Response) -> bool:
    """Whether there is nothing in it to learn."""
    if isinstance(response, str):
        return not response or response.isspace()
    return not any(
        turn["role"] == "assistant" and (turn["content"].strip() or turn.get("tool_calls")) for turn in response
    )


def tools(value: object, field: str, line: int) -> tuple[dict[str, Any], ...]:
    """The tools of an example: OpenAI's list, also as JSON text."""
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
    found = []
    for number, tool in enumerate(value):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DatasetError(line, f"{field}[{number}]", "must be an object with 'function': {'name', …}")
        found.append({"type": "function", "function": function})
    return tuple(found)

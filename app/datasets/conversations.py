"""The turns of a conversation, in each of the ways people write them down."""

import re
from typing import Any, cast

import orjson

from app.datasets.example import Message, Prompt, Response
from app.datasets.reader import DatasetError

Record = dict[str, object]
_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool",
    "function": "tool",
}  # fmt: skip
_SHAREGPT = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant", "tool": "tool",
    "observation": "tool", "function_call": "call",
}  # fmt: skip


class Dropped(Exception):
    """A row that is well-formed but teaches nothing; it is counted under `reason` and left out."""

    def __init__(self, reason: str, field: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.field = reason, field


def text(record: Record, field: str, line: int) -> str:
    """The string in `field`."""
    value = record.get(field)
    if not isinstance(value, str):
        problem = "is missing" if field not in record else "must be a string"
        raise DatasetError(line, field, problem)
    return value


def messages(value: object, field: str, line: int) -> list[Message]:
    """A list of messages: OpenAI's (`role`, `content`, tool calls) or ShareGPT's (`from`, `value`)."""
    if not isinstance(value, list) or not value:
        raise DatasetError(line, field, "must be a list of messages that is not empty")
    return [message(item, f"{field}[{index}]", line) for index, item in enumerate(value)]


def message(item: object, where: str, line: int) -> Message:
    """One message."""
    if isinstance(item, dict) and "role" in item:
        return _openai_message(item, where, line)
    if isinstance(item, dict) and "from" in item:
        return _sharegpt_message(item, where, line)
    raise DatasetError(line, where, "must be an object with 'role' and 'content', or 'from' and 'value'")


def _openai_message(item: dict[str, Any], where: str, line: int) -> Message:
    role = _ROLES.get(item["role"]) if isinstance(item["role"], str) else None
    if role is None:
        raise DatasetError(line, f"{where}.role", f"must be one of {', '.join(sorted(_ROLES))}")
    calls = item.get("tool_calls") or []
    if item.get("function_call"):  # what tool calls were before there could be several
        calls = [{"type": "function", "function": item["function_call"]}]
    content = item.get("content")
    if type(content) is not str:  # a subclass cannot come from JSON
        content = "" if content is None and (calls or role == "tool") else _parts(content, f"{where}.content", line)
    found: Message = {"role": role, "content": content}  # type: ignore[typeddict-item]
    if calls:
        if role != "assistant" or not isinstance(calls, list):
            raise DatasetError(line, f"{where}.tool_calls", "must be a list, in a message of the assistant")
        found["tool_calls"] = [_call(call, f"{where}.tool_calls[{number}]", line) for number, call in enumerate(calls)]
    for name in ("tool_call_id", "name"):
        if role == "tool" and isinstance(item.get(name), str):
            found[name] = item[name]
    return found


def _parts(value: object, field: str, line: int) -> str:
    """OpenAI's list of text parts."""
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        return "".join(text(part, "text", line) for part in value)
    raise DatasetError(line, field, "must be a string; images and other parts cannot be trained on")


def _call(call: object, where: str, line: int) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DatasetError(line, where, "must be an object with 'function': {'name', 'arguments'}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = orjson.loads(arguments or "{}")
        except orjson.JSONDecodeError as error:
            raise DatasetError(line, f"{where}.function.arguments", f"is not valid JSON: {error.msg}") from error
    if not isinstance(arguments, dict):
        raise DatasetError(line, f"{where}.function.arguments", "must be a JSON object")
    found: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if isinstance(cast(dict[str, Any], call).get("id"), str):
        found["id"] = cast(dict[str, Any], call)["id"]
    return found


def _sharegpt_message(item: dict[str, Any], where: str, line: int) -> Message:
    role = _SHAREGPT.get(item["from"]) if isinstance(item["from"], str) else None
    if role is None:
        raise DatasetError(line, f"{where}.from", f"must be one of {', '.join(sorted(_SHAREGPT))}")
    value = text(item, "value", line) if "value" in item else ""
    if role != "call":
        return {"role": role, "content": value}  # type: ignore[typeddict-item]
    try:
        function = orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise DatasetError(line, f"{where}.value", f"is not valid JSON: {error.msg}") from error
    calls = function if isinstance(function, list) else [function]
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [_call({"function": call}, where, line) for call in calls],
    }


def transcript(value: object, field: str, line: int) -> list[Message]:
    """The turns of an Anthropic HH transcript, "\\n\\nHuman: …\\n\\nAssistant: …", or of a message list."""
    if isinstance(value, list):
        return messages(value, field, line)
    if not isinstance(value, str):
        raise DatasetError(line, field, "must be a transcript or a list of messages")
    before, *parts = _TRANSCRIPT.split(value)
    if not parts or before.strip():
        raise DatasetError(line, field, "must be a transcript that starts with '\\n\\nHuman:', or come with a 'prompt'")
    return [
        {"role": "user" if speaker == "Human" else "assistant", "content": said.strip()}
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def prompt(record: Record, field: str, line: int) -> Prompt:
    """The prompt in `field`, text or messages, behind the system prompt in `system` where there is one."""
    given = record[field]
    found: Prompt = given if isinstance(given, str) else messages(given, field, line)
    system = record.get("system") or record.get("system_prompt")
    if system is None or not isinstance(system, str) or not system.strip():
        return found
    turns: list[Message] = [{"role": "user", "content": found}] if isinstance(found, str) else found
    if turns[0]["role"] == "system":
        return turns
    return [{"role": "system", "content": system}, *turns]


def answer(value: object, field: str, line: int, before: Prompt = "") -> Response:
    """What the assistant says: a string, a message, or a list of one; or of the prompt's messages and one."""
    if isinstance(value, str):
        return value
    turns = [message(value, field, line)] if isinstance(value, dict) else messages(value, field, line)
    history: list[Message] = [{"role": "user", "content": before}] if isinstance(before, str) else before
    if turns[-1]["role"] != "assistant":
        raise Dropped("ends_without_an_answer", field)
    if len(turns) > 1 and _spoken(turns[:-1]) != _spoken(history):
        raise DatasetError(line, field, "must be one message of the assistant, or the prompt and one")
    return turns[-1] if "tool_calls" in turns[-1] else turns[-1]["content"]


def _spoken(turns: list[Message]) -> list[Message]:
    """The turns without the system prompt, which some forms repeat and others do not."""
    return [turn for turn in turns if turn["role"] != "system"]


def empty(response: Response) -> bool:
    """Whether there is nothing in it to learn."""
    if isinstance(response, str):
        return not response or response.isspace()
    return not response["content"].strip() and not response.get("tool_calls")


def tools(value: object, field: str, line: int) -> tuple[dict[str, Any], ...]:
    """The tools of an example: OpenAI's list, also as JSON text."""
    if isinstance(value, str) and value.strip():
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise DatasetError(line, field, f"is not valid JSON: {error.msg}") from error
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

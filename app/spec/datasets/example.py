"""The form of every training example: a prompt and its responses."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NotRequired, TypedDict

from app.spec.json_types import JsonObject

Role = Literal["system", "user", "assistant", "tool"]


class Message(TypedDict):
    """A turn of a conversation. `tool_calls` and `reasoning` belong to an assistant's turn.

    The arguments of a tool call are an object or JSON text. `reasoning` is the assistant's thinking before its answer.
    """

    role: Role
    content: str
    reasoning: NotRequired[str]
    tool_calls: NotRequired[list[JsonObject]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


PromptContent = str | list[Message]
"""Plain text, or the turns of a conversation. A model's chat template renders turns."""
ResponseContent = str | list[Message]
"""The assistant's answer: text, or turns with tool calls, results and reasoning. The first and last are its own."""


class Kind(StrEnum):
    """The kind of examples that a format holds or a method needs."""

    SUPERVISED = "supervised"
    """One response."""
    PREFERENCE = "preference"
    """Two responses: the preferred one, then the other."""
    RANKED = "ranked"
    """K ≥ 2 responses, the best first."""
    LABELLED = "labelled"
    """One response, and whether it is desirable."""
    PROMPTS = "prompts"
    """No response: a prompt to be answered."""

    @property
    def compares(self) -> bool:
        """Whether a row has a better and a worse answer."""
        return self in (Kind.PREFERENCE, Kind.RANKED)

    def serves(self, need: "Kind") -> bool:
        """Whether examples of this kind can be used for a method that needs `need`.

        SFT can use the best response of any kind. A ranked list can be used as pairs, and a pair as a list of two. A
        pair can also be used as one desirable and one undesirable response. All kinds have prompts.
        """
        if Kind.PROMPTS in (self, need):
            return need == Kind.PROMPTS
        return need in (self, Kind.SUPERVISED) or (self, need) in (
            (Kind.RANKED, Kind.PREFERENCE),
            (Kind.PREFERENCE, Kind.RANKED),
            (Kind.PREFERENCE, Kind.LABELLED),
        )


@dataclass(slots=True)
class Example:
    """A prompt and its responses, the best first. A prompt that is yet to be answered has no responses.

    `raw`: plain text without a prompt, trained on as it is, without a template. `desirable`: the label of a labelled
    response. `tools`: the tools that the assistant may call. `turns`: indices of the prompt's messages that are
    trained on besides the response. `system`: the system prompt, if the prompt is plain text.

    Treat it as immutable. It is not frozen because that would double the time to read a file's rows.
    """

    line: int
    prompt: PromptContent
    responses: tuple[ResponseContent, ...]
    raw: bool = False
    desirable: bool = True
    tools: tuple[JsonObject, ...] = ()
    turns: tuple[int, ...] = ()
    system: str = ""
    number: int = 0
    """The number of its record in the file, counted from 0. Several records may be on one line."""
    scores: tuple[float, ...] = ()
    """The scores of ranked responses, higher is better; empty if they have none."""

    def with_responses(self, responses: tuple[ResponseContent, ...], scores: tuple[float, ...] = ()) -> "Example":
        """A copy with other responses, which have these scores."""
        return Example(
            self.line,
            self.prompt,
            responses,
            self.raw,
            self.desirable,
            self.tools,
            self.turns,
            self.system,
            self.number,
            scores,
        )

    @property
    def conversation(self) -> list[Message]:
        """The prompt as turns, including the system prompt."""
        turns: list[Message] = (
            [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else self.prompt
        )
        return [{"role": "system", "content": self.system}, *turns] if self.system else turns

    @property
    def prompt_key(self) -> str:
        """A key that equal prompts share, regardless of white space and case. For raw text it is the text."""
        text = self.system + self.prompt if isinstance(self.prompt, str) else ""
        if not isinstance(self.prompt, str):
            text = "\n".join(f"{turn['role']} {turn['content']} {turn.get('tool_calls', '')}" for turn in self.prompt)
        if self.raw:
            text = "\n".join(map(str, self.responses))
        return " ".join(text.casefold().split())

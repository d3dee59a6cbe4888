"""The one shape of a training example: a prompt and the responses that hang on it."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, NotRequired, TypedDict

Role = Literal["system", "user", "assistant", "tool"]


class Message(TypedDict):
    """A turn of a conversation. `tool_calls` are an assistant's; their arguments are objects, or text that is JSON.

    `reasoning` is what an assistant thought before it answered.
    """

    role: Role
    content: str
    reasoning: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


Prompt = str | list[Message]
"""Plain text, or the turns of a conversation, which a model's chat template renders."""
Response = str | list[Message]
"""What the assistant says: text, or turns with calls, results and reasoning, of which the first and the last are its
own."""


class Kind(StrEnum):
    """What a format's examples hold, and what a method needs."""

    SUPERVISED = "supervised"
    """One response."""
    PREFERENCE = "preference"
    """Two responses: the preferred one, then the other."""
    RANKED = "ranked"
    """K ≥ 2 responses, the best first."""
    LABELLED = "labelled"
    """One response, and whether it is desirable."""
    PROMPTS = "prompts"
    """No response: what is to be answered."""

    @property
    def compares(self) -> bool:
        """Whether a row has a better and a worse answer."""
        return self in (Kind.PREFERENCE, Kind.RANKED)

    def serves(self, need: "Kind") -> bool:
        """Whether examples of this kind can be used where `need` is asked for.

        SFT learns the best response of anything; a ranked list is its pairs, a pair a list of two, and a pair
        is one desirable and one undesirable response. Anything has prompts.
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
    """A prompt and its responses, the best first; none where it is only to be answered. Nobody changes one: it is not
    frozen because that doubles the time that a file's rows take.

    `raw`: plain text with no prompt, to be learned as it is, without a template. `desirable`: of a labelled
    response, whether it is. `tools`: what the assistant may call. `turns`: numbers of the prompt's messages whose
    text is learned too, besides the response. `system`: of a prompt that is plain text, what stands before it.
    """

    line: int
    prompt: Prompt
    responses: tuple[Response, ...]
    raw: bool = False
    desirable: bool = True
    tools: tuple[dict[str, Any], ...] = ()
    turns: tuple[int, ...] = ()
    system: str = ""

    def answered(self, responses: tuple[Response, ...]) -> "Example":
        """The same prompt with `responses`."""
        return Example(self.line, self.prompt, responses, self.raw, self.desirable, self.tools, self.turns, self.system)

    @property
    def conversation(self) -> list[Message]:
        """The prompt as turns, the system prompt among them."""
        turns: list[Message] = (
            [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else self.prompt
        )
        return [{"role": "system", "content": self.system}, *turns] if self.system else turns

    @property
    def asked(self) -> str:
        """The prompt as a key: the same for the same prompt, whatever its white space and case."""
        said = self.system + self.prompt if isinstance(self.prompt, str) else ""
        if not isinstance(self.prompt, str):
            said = "\n".join(f"{turn['role']} {turn['content']} {turn.get('tool_calls', '')}" for turn in self.prompt)
        if self.raw:
            said = "\n".join(map(str, self.responses))
        return " ".join(said.casefold().split())

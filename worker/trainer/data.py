"""From examples to token rows: a prompt and the responses that hang on it.

The text of prompt and answer is tokenised as a whole, so that a token may merge over the boundary. The shared
prompt ends at the longest token prefix that all responses have in common, but never past the prompt's last
character. A token is scored where it holds a character of the answer, by its offsets: a merged token counts as
the answer's, and prompt tokens behind the common prefix are context that is not scored.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from app.datasets.example import Example, Kind, Message, Prompt
from app.datasets.example import Response as Said
from app.datasets.mapping import Mapping
from worker.trainer.events import UserError

Tokenizer = Any
Item = TypeVar("Item")


@dataclass(frozen=True)
class Response:
    """Token ids that follow the prompt, and which of them are scored."""

    ids: tuple[int, ...]
    scored: tuple[bool, ...]


@dataclass(frozen=True)
class Row:
    """A training row: K ≥ 1 responses share one prompt, the best first.

    `line` is where the example was in its file; `desirable` says of a labelled response whether it is.
    """

    line: int
    prompt: tuple[int, ...]
    responses: tuple[Response, ...]
    desirable: bool = True

    @property
    def tokens(self) -> int:
        """Tokens of the prompt, once, and of all responses."""
        return len(self.prompt) + sum(len(response.ids) for response in self.responses)

    @property
    def scored(self) -> int:
        """Scored tokens of the best response. Nothing predicts a row's first token."""
        return sum(self.responses[0].scored[0 if self.prompt else 1 :])

    @property
    def learnable(self) -> bool:
        """Whether each response has a scored token that something predicts."""
        first = 0 if self.prompt else 1
        return all(any(response.scored[first:]) for response in self.responses)


@dataclass
class Truncation:
    """What had to be cut to fit `max_length`."""

    prompts: int = 0
    answers: int = 0
    lost: int = 0
    """Rows left out because nothing was left to learn."""
    rows: int = 0
    """Rows that were cut at all."""

    def add(self, other: "Truncation") -> None:
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)


@dataclass(frozen=True)
class Recipe:
    """How examples become rows.

    `need` is what the method compares; `loss_on` scores the last answer, every assistant turn, or all of the text.
    """

    need: Kind
    max_length: int
    loss_on: Literal["answers", "turns", "text"] = "answers"
    mapping: Mapping | None = None
    """Which columns hold what, where the file does not say it."""


def rows(examples: Iterable[Example], tokenizer: Tokenizer, recipe: Recipe, cut: Truncation) -> Iterator[Row]:
    """Tokenise examples; a row in which nothing is left to learn is counted and left out.

    A row that is too long loses the left end of its prompt, then the right end of its answers; plain text is
    cut into pieces of `max_length`, none of which is lost.
    """
    for group in batched(_wanted(examples, recipe.need), 256):
        rendered = [_render(example, tokenizer, recipe.loss_on) for example in group]
        texts = [text for found in rendered for text in found.texts]
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        encodings = iter(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
        for example, found in zip(group, rendered, strict=True):
            tokens = [next(encodings) for _ in found.texts]
            bos = [] if found.template else _bos(tokenizer)
            if example.raw or recipe.loss_on == "text":
                row = _conversation(example, tokens[0], bos, [(0, len(found.texts[0]))])
            elif recipe.loss_on == "turns" or example.turns:
                row = _conversation(example, tokens[0], bos, found.turns)
            else:
                row = _row(example, len(found.prompt), tokens, bos)
            if example.raw:
                pieces = _pieces(row, recipe.max_length)
            elif recipe.loss_on == "answers" and not example.turns:
                pieces = [_fit(row, recipe.max_length, cut)]
            else:
                pieces = [_fit_conversation(row, recipe.max_length, cut)]
            cut.rows += not example.raw and pieces[0] is not row
            for piece in pieces:
                if piece.learnable:
                    yield piece
                else:
                    cut.lost += 1


def _wanted(examples: Iterable[Example], need: Kind) -> Iterator[Example]:
    """The examples in the form that `need` asks for."""
    for example in examples:
        answers = example.responses
        if need == Kind.SUPERVISED:
            if example.desirable:
                yield replace(example, responses=answers[:1])
        elif need == Kind.PREFERENCE:
            for k, better in enumerate(answers):
                for worse in answers[k + 1 :]:
                    yield replace(example, responses=(better, worse))
        elif need == Kind.LABELLED and len(answers) == 2:
            yield replace(example, responses=answers[:1], desirable=True)
            yield replace(example, responses=answers[1:], desirable=False)
        else:
            yield example


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """`items` in lists of `size`, the last one shorter."""
    group: list[Item] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


@dataclass(frozen=True)
class _Rendered:
    """The prompt, the whole text of each response, and where the assistant's turns are, in characters."""

    prompt: str
    texts: list[str]
    turns: list[tuple[int, int]]
    template: bool


def _render(example: Example, tokenizer: Tokenizer, loss_on: str) -> _Rendered:
    if tokenizer.chat_template is None or example.raw:
        return _render_plain(example, tokenizer)
    turns: list[Message] = (
        [{"role": "user", "content": example.prompt}] if isinstance(example.prompt, str) else example.prompt
    )
    tools = list(example.tools) or None

    def render(messages: list[Message], **options: Any) -> str:
        text: str = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)
        return text

    parts: list[tuple[str, str]] = []
    try:
        prompt = render(turns, add_generation_prompt=True)
        texts = [render([*turns, _message(answer)]) for answer in example.responses]
        scored = _scored_turns(example, turns, loss_on)
        if scored:
            whole = [*turns, _message(example.responses[0])]
            parts = [(render(whole[:k], add_generation_prompt=True), render(whole[: k + 1])) for k in scored]
        ignored = tools and tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == prompt
    except Exception as error:  # a template may raise anything, on purpose too
        message = f"Line {example.line}: the model's chat template refuses the conversation: {error}"
        raise UserError("chat_template_error", message, "training_file") from error
    if ignored or not all(map(_says_its_calls, example.responses, texts)):
        message = (
            f"Line {example.line}: the model's chat template leaves tools out; use a model that was made for them."
        )
        raise UserError("chat_template_error", message, "model")
    if parts and not all(texts[0].startswith(part) for earlier in parts[:-1] for part in earlier):
        message = (
            f"Line {example.line}: the model's chat template writes earlier turns differently once later ones "
            "are there, so that learning them ('loss_on': 'turns', or a 'weight') would train on text the model never "
            "writes; learn the last answer alone ('answers')."
        )
        raise UserError("chat_template_error", message, "loss_on")
    if not all(text.startswith(prompt) for text in texts):
        # Some templates write what stands before an answer differently once the answer is there.
        if not all(isinstance(answer, str) for answer in example.responses):
            message = (
                f"Line {example.line}: the model's chat template writes tool calls in a way that cannot be learned."
            )
            raise UserError("chat_template_error", message, "model")
        texts = [prompt + str(answer).strip() + (tokenizer.eos_token or "") for answer in example.responses]
    return _Rendered(prompt, texts, [(len(before), len(after)) for before, after in parts], True)


def _message(answer: Said) -> Message:
    return {"role": "assistant", "content": answer} if isinstance(answer, str) else answer


def _says_its_calls(answer: Said, text: str) -> bool:
    """Whether the tools that `answer` calls are named in the text that the template made of it."""
    calls = [] if isinstance(answer, str) else answer.get("tool_calls", [])
    return all(call["function"]["name"] in text for call in calls)


def _scored_turns(example: Example, turns: list[Message], loss_on: str) -> list[int]:
    """Numbers of the messages that are learned, the answer last; none where it is the answer alone."""
    if example.turns:
        return [*example.turns, len(turns)]
    if loss_on != "turns":
        return []
    return [*(k for k, turn in enumerate(turns) if turn["role"] == "assistant"), len(turns)]


def _render_plain(example: Example, tokenizer: Tokenizer) -> _Rendered:
    conversation = [] if isinstance(example.prompt, str) else example.prompt
    answers = [answer for answer in example.responses if isinstance(answer, str)]
    with_tools = any(turn["role"] == "tool" or "tool_calls" in turn for turn in conversation)
    if example.tools or with_tools or len(answers) < len(example.responses):
        message = f"Line {example.line}: the model has no chat template, so that tools cannot be written for it."
        raise UserError("chat_template_error", message, "model")
    # The transcript's "Assistant:" is followed by a space, as in the data that made this form common.
    space = " " if isinstance(example.prompt, list) else ""
    end = tokenizer.eos_token or ""
    prompt = plain_prompt(example.prompt)
    texts = [f"{prompt}{space}{answer}{end}" for answer in answers]
    spans = [(len(prompt), len(texts[0]))]
    for k, turn in enumerate(conversation):
        if turn["role"] == "assistant" and (not example.turns or k in example.turns):
            before = plain_prompt(conversation[:k])
            spans.append((len(before), len(before) + 1 + len(turn["content"])))
    return _Rendered(prompt, texts, sorted(spans), False)


def said(answer: Said) -> str:
    """The text of an answer."""
    return answer if isinstance(answer, str) else answer["content"]


def prompt_ids(example: Example, tokenizer: Tokenizer, room: int) -> tuple[int, ...]:
    """The tokens to which a model writes an answer: at most `room`, the first and the last ones; never none."""
    if tokenizer.chat_template is None or example.raw:
        bos, text = _bos(tokenizer), plain_prompt(example.prompt)
    else:
        bos, text = [], _render(replace(example, responses=()), tokenizer, "answers").prompt
    ids = bos + tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if not ids:
        ids = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    return tuple(ids if len(ids) <= room else ids[:1] + ids[len(ids) - room + 1 :])


def plain_prompt(prompt: Prompt) -> str:
    """A prompt for a model without a chat template: plain text as it is, a conversation as an HH transcript."""
    if isinstance(prompt, str):
        return prompt
    names = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": ""}
    return "".join(names[turn["role"]] + turn["content"] for turn in prompt) + "\n\nAssistant:"


def _bos(tokenizer: Tokenizer) -> list[int]:
    """The BOS token, where the tokenizer would add one by itself."""
    alone = tokenizer("a").input_ids
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and alone[0] == tokenizer.bos_token_id else []


Encoding = tuple[list[int], list[tuple[int, int]]]
"""Token ids, and the characters that each holds."""


def _row(example: Example, boundary: int, tokens: list[Encoding], bos: list[int]) -> Row:
    inside = [sum(1 for _, end in offsets if end <= boundary) for _, offsets in tokens]
    shared = 0
    first = tokens[0][0]
    while shared < min(inside) and all(ids[shared] == first[shared] for ids, _ in tokens):
        shared += 1
    responses = tuple(
        Response(tuple(ids[shared:]), tuple(end > boundary for _, end in offsets[shared:])) for ids, offsets in tokens
    )
    prompt = first[:shared]
    return Row(
        example.line, tuple(prompt if prompt[:1] == bos[:1] and bos else bos + prompt), responses, example.desirable
    )


def _conversation(example: Example, tokens: Encoding, bos: list[int], spans: list[tuple[int, int]]) -> Row:
    """All of the text as one response without a prompt, scored where a token holds a character of `spans`."""
    ids, offsets = tokens
    scored = [any(start < end and begin < stop for start, stop in spans) for begin, end in offsets]
    if bos and ids[:1] != bos:
        ids, scored = bos + ids, [False, *scored]
    return Row(example.line, (), (Response(tuple(ids), tuple(scored)),))


def _pieces(row: Row, max_length: int) -> list[Row]:
    (response,) = row.responses
    return [
        replace(row, responses=(Response(response.ids[i : i + max_length], response.scored[i : i + max_length]),))
        for i in range(0, len(response.ids), max_length)
    ]


def _fit_conversation(row: Row, max_length: int, cut: Truncation) -> Row:
    (response,) = row.responses
    if len(response.ids) <= max_length:
        return row
    cut.prompts += 1
    kept = max_length - 1  # the first token stays: it is BOS, or as good as any other
    ids, scored = response.ids, response.scored
    return replace(row, responses=(Response(ids[:1] + ids[-kept:], scored[:1] + scored[-kept:]),))


def _fit(row: Row, max_length: int, cut: Truncation) -> Row:
    longest = max(len(response.ids) for response in row.responses)
    if len(row.prompt) + longest <= max_length:
        return row
    prompt = row.prompt
    if len(prompt) > 1:
        room = max(max_length - longest, 1)
        if len(prompt) > room:
            prompt = prompt[:1] + prompt[len(prompt) - room + 1 :]
            cut.prompts += 1
    room = max_length - len(prompt)
    if longest > room:
        cut.answers += 1
    responses = tuple(Response(response.ids[:room], response.scored[:room]) for response in row.responses)
    return replace(row, prompt=prompt, responses=responses)

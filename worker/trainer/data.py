"""From examples to token rows: a prompt and the responses that hang on it.

The text of prompt and answer is tokenised as a whole, so that a token may merge over the boundary. The shared
prompt ends at the longest token prefix that all responses have in common, but never past the prompt's last
character. A token is scored where it holds a character of the answer, by its offsets: a merged token counts as
the answer's, and prompt tokens behind the common prefix are context that is not scored.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from app.datasets.example import Example, Prompt
from worker.trainer.events import UserError

Tokenizer = Any


@dataclass(frozen=True)
class Response:
    """Token ids that follow the prompt, and which of them are scored."""

    ids: tuple[int, ...]
    scored: tuple[bool, ...]


@dataclass(frozen=True)
class Row:
    """A training row: K ≥ 1 responses share one prompt. `line` is where the example was in its file."""

    line: int
    prompt: tuple[int, ...]
    responses: tuple[Response, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the prompt, once, and of all responses."""
        return len(self.prompt) + sum(len(response.ids) for response in self.responses)

    @property
    def learnable(self) -> bool:
        """Whether each response has a scored token that something predicts: nothing predicts a row's first token."""
        first = 0 if self.prompt else 1
        return all(any(response.scored[first:]) for response in self.responses)


@dataclass
class Truncation:
    """What had to be cut to fit `max_length`."""

    prompts: int = 0
    answers: int = 0
    lost: int = 0
    """Rows left out because nothing was left to learn."""


def rows(
    examples: Iterable[Example], tokenizer: Tokenizer, *, max_length: int, loss_on: str, cut: Truncation
) -> Iterator[Row]:
    """Tokenise examples. `loss_on`: "answers", or "text" to score the prompt as well.

    A row that is too long loses the left end of its prompt, then the right end of its answers; plain text is
    cut into pieces of `max_length`, none of which is lost.
    """
    for group in _batched(examples, 256):
        rendered = [_render(example, tokenizer) for example in group]
        texts = [text for _, texts, _ in rendered for text in texts]
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        encodings = iter(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
        for example, (boundary, responses, template) in zip(group, rendered, strict=True):
            tokens = [next(encodings) for _ in responses]
            row = _row(example.line, boundary, tokens, [] if template else _bos(tokenizer))
            if loss_on == "text" or example.raw:
                row = _whole_text(row)
            yield from _pieces(row, max_length) if example.raw else [_fit(row, max_length, cut)]


def _batched(items: Iterable[Example], size: int) -> Iterator[list[Example]]:
    group: list[Example] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _render(example: Example, tokenizer: Tokenizer) -> tuple[int, list[str], bool]:
    """(characters of the prompt, the whole text of each response, whether a chat template made them)."""
    if tokenizer.chat_template is None or example.raw:
        prompt = plain_prompt(example.prompt)
        # The transcript's "Assistant:" is followed by a space, as in the data that made this form common.
        space = " " if isinstance(example.prompt, list) else ""
        end = tokenizer.eos_token or ""
        return len(prompt), [f"{prompt}{space}{answer}{end}" for answer in example.responses], False
    turns = [{"role": "user", "content": example.prompt}] if isinstance(example.prompt, str) else example.prompt
    try:
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        texts = [
            tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}], tokenize=False)
            for answer in example.responses
        ]
    except Exception as error:  # a template may raise anything, on purpose too
        message = f"Line {example.line}: the model's chat template refuses the conversation: {error}"
        raise UserError("chat_template_error", message, "training_file") from error
    if not all(text.startswith(prompt) for text in texts):
        # Some templates write what stands before an answer differently once the answer is there.
        texts = [prompt + answer.strip() + (tokenizer.eos_token or "") for answer in example.responses]
    return len(prompt), texts, True


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


def _row(line: int, boundary: int, tokens: list[tuple[list[int], list[tuple[int, int]]]], bos: list[int]) -> Row:
    inside = [sum(1 for _, end in offsets if end <= boundary) for _, offsets in tokens]
    shared = 0
    first = tokens[0][0]
    while shared < min(inside) and all(ids[shared] == first[shared] for ids, _ in tokens):
        shared += 1
    responses = tuple(
        Response(tuple(ids[shared:]), tuple(end > boundary for _, end in offsets[shared:])) for ids, offsets in tokens
    )
    prompt = first[:shared]
    return Row(line, tuple(prompt if prompt[:1] == bos[:1] and bos else bos + prompt), responses)


def _whole_text(row: Row) -> Row:
    """The same tokens with the prompt scored too: all of them are the response."""
    (response,) = row.responses
    ids = row.prompt + response.ids
    return replace(row, prompt=(), responses=(Response(ids, (True,) * len(ids)),))


def _pieces(row: Row, max_length: int) -> list[Row]:
    (response,) = row.responses
    return [
        replace(row, responses=(Response(response.ids[i : i + max_length], response.scored[i : i + max_length]),))
        for i in range(0, len(response.ids), max_length)
    ]


def _fit(row: Row, max_length: int, cut: Truncation) -> Row:
    longest = max(len(response.ids) for response in row.responses)
    if len(row.prompt) + longest <= max_length:
        return row
    prompt = row.prompt
    if len(prompt) > 1:
        room = max(max_length - longest, 1)
        if len(prompt) > room:
            # The first token stays: it is BOS, or as good as any other.
            prompt = prompt[:1] + prompt[len(prompt) - room + 1 :]
            cut.prompts += 1
    room = max_length - len(prompt)
    if longest > room:
        cut.answers += 1
    responses = tuple(Response(response.ids[:room], response.scored[:room]) for response in row.responses)
    return replace(row, prompt=prompt, responses=responses)

"""From examples to token rows: a prompt and the responses that share it.

Prompt and answer are tokenised as one text, so a token may merge over the boundary. The shared prompt is the longest
token prefix that all responses have in common. It never goes past the prompt's last character. A token is scored if
its offsets include a character of the answer. A merged token therefore belongs to the answer. Prompt tokens after the
shared prefix are context and are not scored.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Literal, TypeVar

from transformers import PreTrainedTokenizerBase as Tokenizer

from app.spec.datasets.example import Example, Kind, ResponseContent
from app.spec.datasets.mapping import Mapping
from app.spec.datasets.pairs import PairRule
from app.spec.datasets.rendering import Rendering
from worker.trainer.control import Encoding
from worker.trainer.errors import UserError
from worker.trainer.rendering import Rendered, Renderer, RowRefused, Span

Element = TypeVar("Element")


@dataclass(frozen=True)
class Response:
    """Token ids [T] that follow the prompt, and whether each of them is scored [T]."""

    ids: tuple[int, ...]
    scored: tuple[bool, ...]


@dataclass(frozen=True)
class Row:
    """A training row: K ≥ 1 responses that share one prompt, the best response first.

    `line` is the example's line in its file. `desirable` is the label of a labelled response. Rows with the same
    prompt, apart from white space and case, have the same `group`. `file` is the number of the file.
    """

    line: int
    prompt: tuple[int, ...]
    responses: tuple[Response, ...]
    desirable: bool = True
    group: int = 0
    file: int = 0
    number: int = 0
    """The number of its record in the file."""

    @property
    def tokens(self) -> int:
        """Number of tokens of the prompt, counted once, and of all responses."""
        return len(self.prompt) + sum(len(response.ids) for response in self.responses)

    @property
    def scored(self) -> int:
        """Number of scored tokens of the best response. A row's first token has no prediction and does not count."""
        return sum(self.responses[0].scored[0 if self.prompt else 1 :])

    @property
    def learnable(self) -> bool:
        """Whether each response has a scored token other than the row's first, which has no prediction."""
        first = 0 if self.prompt else 1
        return all(any(response.scored[first:]) for response in self.responses)


@dataclass
class Tally:
    """Counts of what happened to the rows of a file during tokenisation."""

    prompts: int = 0
    """Prompts cut to fit `max_length`."""
    answers: int = 0
    """Rows with a cut answer."""
    rows: int = 0
    """Rows with any cut."""
    long: int = 0
    """Rows left out because they are longer than `max_length`, with the truncation `drop`."""
    lost: int = 0
    """Rows left out because they have no scored token after cutting."""
    control_text: int = 0
    """Rows with text that looks like a control token. It is tokenised as text."""
    templated: int = 0
    """Rows whose prompt already has the form of a template. It is used as it is."""
    ended: int = 0
    """Rows with an answer whose text ends with an end-of-sequence token."""
    refused: Counter[str] = field(default_factory=Counter)
    """Rows left out because the chat template would not write all of their text, by reason."""
    details: dict[str, str] = field(default_factory=dict)
    """The first refused row of each reason: its line, and what is wrong."""

    def add(self, other: "Tally") -> None:
        """Add the counts of `other`, which are of later rows."""
        for tally_field in fields(self):
            if tally_field.name == "details":
                self.details = other.details | self.details
            else:
                setattr(self, tally_field.name, getattr(self, tally_field.name) + getattr(other, tally_field.name))

    def refuse(self, line: int, refusal: RowRefused) -> None:
        """Count a row that is refused."""
        self.refused[refusal.reason] += 1
        self.details.setdefault(refusal.reason, f"Line {line}: {refusal.detail}.")


Truncation = Literal["keep_end", "keep_start", "drop"]


@dataclass(frozen=True)
class Recipe:
    """How examples become rows.

    `need` is the form of rows that the method compares. `loss_on` scores the last answer, every assistant turn, or all
    of the text. `truncation` says what happens to a row that is too long.
    """

    need: Kind
    max_length: int
    loss_on: Literal["answers", "turns", "text"] = "answers"
    mapping: Mapping | None = None
    """Which column holds which part of an example, if the file does not say so itself."""
    rendering: Rendering = field(default_factory=Rendering)
    truncation: Truncation = "keep_end"
    pairs: PairRule = field(default_factory=PairRule)
    """Which pairs a row with ranked answers gives."""
    lenient: bool = False
    """Put an answer after its prompt unchanged if the chat template would change it. For scoring a model's own answers,
    not for training."""


def rows(examples: Iterable[Example], tokenizer: Tokenizer, recipe: Recipe, tally: Tally) -> Iterator[Row]:
    """Tokenise examples and cut them to length. Plain text is cut into pieces, and all pieces are kept.

    Refused rows and rows without a scored token are counted in `tally` and left out.
    """
    for whole in whole_rows(examples, Renderer(tokenizer, recipe.rendering), recipe, tally):
        for row in cut(whole, recipe, tally):
            if row.learnable:
                yield row
            else:
                tally.lost += 1


@dataclass(frozen=True)
class Whole:
    """A row before it is cut.

    `header` is the number of tokens at the end of the prompt that introduce the answer. `raw`: the row is plain text
    without prompt and answer. `rest` is the end of the prompt's text that merges with the first token of the answer.
    """

    row: Row
    header: int = 0
    raw: bool = False
    rest: str = ""


def whole_rows(examples: Iterable[Example], renderer: Renderer, recipe: Recipe, tally: Tally) -> Iterator[Whole]:
    """The rows of examples, before cutting."""
    for group in batched(_in_form(examples, recipe), 256):
        # 1. Render all examples of the group.
        renderings = [_render(example, renderer, recipe, tally) for example in group]
        # 2. Encode their texts in one call, which is much faster than one by one.
        plain_texts = [
            text for rendered in renderings if rendered is not None and not rendered.moved for text in rendered.texts
        ]
        encodings = iter(renderer.control.encode(plain_texts))
        # 3. Make the rows.
        for example, rendered in zip(group, renderings, strict=True):
            if rendered is None:
                continue
            try:
                tokens = [
                    renderer.control.encode_moved(text) if rendered.moved else next(encodings)
                    for text in rendered.texts
                ]
            except ValueError as error:
                tally.refuse(example.line, RowRefused("control_text", str(error)))
                continue
            tally.control_text += rendered.moved
            tally.templated += rendered.templated
            tally.ended += rendered.ended
            yield _whole_row(example, rendered, tokens, renderer.bos if rendered.bos else [], recipe.loss_on)


def _render(example: Example, renderer: Renderer, recipe: Recipe, tally: Tally) -> Rendered | None:
    """The text of an example. A refused example is counted and gives None."""
    try:
        return renderer.render(example, turns=recipe.loss_on == "turns", lenient=recipe.lenient)
    except RowRefused as refused:
        tally.refuse(example.line, refused)
        return None


def _whole_row(example: Example, rendered: Rendered, tokens: list[Encoding], bos: list[int], loss_on: str) -> Whole:
    """The row of an example. `tokens` has the encoding of each of its texts."""
    group = _group(example)
    if example.raw or loss_on == "text":
        spans: tuple[Span, ...] = ((0, len(rendered.texts[0])),)
    elif loss_on == "turns" or example.turns:
        spans = rendered.turns
    else:
        row, shared = _row(example, rendered, tokens, bos, group)
        offsets = tokens[0][1][:shared]
        header = sum(begin >= rendered.prompt - rendered.header for begin, _ in offsets) if rendered.header else 0
        return Whole(row, header, rest=rendered.texts[0][offsets[-1][1] if offsets else 0 : rendered.prompt])
    return Whole(_conversation(example, tokens[0], bos, spans, group), raw=example.raw)


def _group(example: Example) -> int:
    """A 64-bit hash of the example's prompt: the row's `group`."""
    return int.from_bytes(hashlib.blake2b(example.prompt_key.encode(), digest_size=8).digest(), signed=True)


def _in_form(examples: Iterable[Example], recipe: Recipe) -> Iterator[Example]:
    """The examples in the form that the recipe needs, for example one pair for each two ranked answers."""
    need = recipe.need
    for example in examples:
        answers = example.responses
        if need == Kind.SUPERVISED:
            if example.desirable:
                yield replace(example, responses=answers[:1])
        elif need == Kind.PREFERENCE:
            yield from recipe.pairs.pairs(example)
        elif need == Kind.PROMPTS:
            if asks(example):
                yield replace(example, responses=PROBES[:1], desirable=True, turns=())
        elif need == Kind.LABELLED and len(answers) == 2:
            yield replace(example, responses=answers[:1], desirable=True)
            yield replace(example, responses=answers[1:], desirable=False)
        else:
            yield example


def asks(example: Example) -> bool:
    """Whether there is something to answer: plain text, an answer without a prompt, and blanks ask nothing."""
    if example.raw or not example.prompt:
        return False
    if isinstance(example.prompt, str):
        return bool(example.prompt.strip())
    return example.prompt[-1]["role"] != "user" or bool(example.prompt[-1]["content"].strip())


def batched(items: Iterable[Element], size: int) -> Iterator[list[Element]]:
    """`items` in lists of `size`, the last one shorter."""
    group: list[Element] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def answer_text(answer: ResponseContent) -> str:
    """The text of an answer. For an answer of several turns, the text of the last turn."""
    return answer if isinstance(answer, str) else answer[-1]["content"]


def prompt_text(example: Example) -> str:
    """A prompt as text for people and other programs: plain text unchanged, a conversation as a transcript."""
    prompt = example.prompt
    if isinstance(prompt, str):
        return f"{example.system}\n\n{prompt}" if example.system else prompt
    names = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": "", "tool": "\n\nTool: "}
    return "".join(names[turn["role"]] + turn["content"] for turn in prompt) + "\n\nAssistant:"


PROBES = ("the", "A", "1")
"""Sample beginnings of answers. They show which tokens of a prompt merge with no answer."""


def prompt_ids(example: Example, renderer: Renderer, recipe: Recipe) -> tuple[tuple[int, ...], str]:
    """The prompt's tokens, to which a model writes an answer, and the rest of the prompt's text.

    The tokens are the same as in training, and there is always at least one. The rest is the text that the first token
    of an answer has to begin with. It is mostly empty, or a space if the prompt ends in one. Raises `UserError` for a
    prompt that cannot be rendered.
    """
    probe = replace(example, responses=example.responses or PROBES, desirable=True, turns=())
    tally = Tally()
    for whole in whole_rows([probe], renderer, replace(recipe, need=Kind.RANKED, loss_on="answers"), tally):
        row = whole.row if not example.raw else replace(whole.row, prompt=())
        room = recipe.max_length
        ids = _cut_prompt(row.prompt, room, recipe.truncation, whole.header)
        return ids or (_first_token(renderer.tokenizer),), whole.rest
    (detail,) = tally.details.values()
    raise UserError("chat_template_error", detail, "data")


def _first_token(tokenizer: Tokenizer) -> int:
    """The token that begins a text without a prompt: BOS, or EOS if there is no BOS."""
    token: int = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return token


def _row(example: Example, rendered: Rendered, tokens: list[Encoding], bos: list[int], group: int) -> tuple[Row, int]:
    """A row, and the number of its text's tokens that are the shared prompt. BOS is not counted."""
    prompt_tokens = [sum(1 for _, end in offsets if end <= rendered.prompt) for _, offsets in tokens]
    shared = 0  # tokens: the longest common prefix that ends within the prompt
    first_ids = tokens[0][0]
    while shared < min(prompt_tokens) and all(ids[shared] == first_ids[shared] for ids, _ in tokens):
        shared += 1
    responses = tuple(
        Response(tuple(ids[shared:]), tuple(_scored(offsets[shared:], spans)))
        for (ids, offsets), spans in zip(tokens, rendered.learned, strict=True)
    )
    prompt = first_ids[:shared]
    prompt_with_bos = prompt if prompt[:1] == bos[:1] and bos else bos + prompt
    return Row(example.line, tuple(prompt_with_bos), responses, example.desirable, group, number=example.number), shared


def _scored(offsets: list[tuple[int, int]], spans: tuple[Span, ...]) -> list[bool]:
    """Whether each token contains a character of `spans`, [T]. `offsets`: the characters of each token, [T]."""
    if len(spans) == 1:  # the usual case: all text after the prompt
        ((start, stop),) = spans
        return [end > start and begin < stop for begin, end in offsets]
    return [any(start < end and begin < stop for start, stop in spans) for begin, end in offsets]


def _conversation(example: Example, tokens: Encoding, bos: list[int], spans: tuple[Span, ...], group: int) -> Row:
    """All of the text as one response without a prompt. A token that contains a character of `spans` is scored."""
    ids, offsets = tokens
    scored = _scored(offsets, spans)
    if bos and ids[:1] != bos:
        ids, scored = bos + ids, [False, *scored]
    return Row(example.line, (), (Response(tuple(ids), tuple(scored)),), group=group, number=example.number)


# -- length -----------------------------------------------------------------------------------------------------


def cut(whole: Whole, recipe: Recipe, tally: Tally) -> list[Row]:
    """`whole`, cut to `max_length` tokens for the prompt and each answer. Plain text becomes several rows."""
    row, max_length = whole.row, recipe.max_length
    if whole.raw:
        (response,) = row.responses
        return [
            replace(row, responses=(Response(response.ids[i : i + max_length], response.scored[i : i + max_length]),))
            for i in range(0, len(response.ids), max_length)
        ]
    if length(row) <= max_length:
        return [row]
    if recipe.truncation == "drop":
        tally.long += 1
        return []
    shortened = fitted(whole, max_length, recipe.truncation)
    tally.rows += 1
    tally.prompts += len(shortened.prompt) < len(row.prompt) or not row.prompt
    tally.answers += bool(row.prompt) and any(
        len(short.ids) < len(full.ids) for short, full in zip(shortened.responses, row.responses, strict=True)
    )
    return [shortened]


def length(row: Row) -> int:
    """Number of tokens of the prompt and the longest answer."""
    return len(row.prompt) + max(len(response.ids) for response in row.responses)


def prompt_room(prompt: int, answer: int, max_length: int) -> int:
    """How many of `prompt` tokens are kept beside an answer of `answer` tokens.

    If one side needs less than half of the room, the other gets the rest. If both need more, each gets half.
    """
    return min(prompt, max(max_length - answer, max_length // 2))


def fitted(whole: Whole, max_length: int, truncation: Truncation) -> Row:
    """A row that is too long, cut to `max_length` tokens.

    The prompt keeps its end or its start, by `truncation`. Answers keep their beginning. The first token of the text
    is always kept, because it may be BOS. The header that introduces the answer is kept too.
    """
    row = whole.row
    if not row.prompt:
        (response,) = row.responses
        positions = [*range(1), *range(len(response.ids) - max_length + 1, len(response.ids))]
        positions = positions if truncation == "keep_end" else list(range(max_length))
        ids, scored = (tuple(values[k] for k in positions) for values in (response.ids, response.scored))
        return replace(row, responses=(Response(ids, scored),))
    longest = max(len(response.ids) for response in row.responses)
    room = max(1, prompt_room(len(row.prompt), longest, max_length))
    prompt = _cut_prompt(row.prompt, room, truncation, whole.header)
    room = max_length - len(prompt)
    responses = tuple(Response(response.ids[:room], response.scored[:room]) for response in row.responses)
    return replace(row, prompt=prompt, responses=responses)


def _cut_prompt(prompt: tuple[int, ...], room: int, truncation: Truncation, header: int) -> tuple[int, ...]:
    """`prompt` in at most `room` tokens. Keeps its first token and its last `header` tokens."""
    if len(prompt) <= room:
        return prompt
    if truncation == "keep_start":
        header = min(header, room - 1)
        return prompt[: room - header] + prompt[len(prompt) - header :]
    return prompt[:1] + prompt[len(prompt) - room + 1 :]

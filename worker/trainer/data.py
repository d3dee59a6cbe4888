"""From examples to token rows: a prompt and the responses that hang on it.

The text of prompt and answer is tokenised as a whole, so that a token may merge over the boundary. The shared
prompt ends at the longest token prefix that all responses have in common, but never past the prompt's last
character. A token is scored where it holds a character of the answer, by its offsets: a merged token counts as
the answer's, and prompt tokens behind the common prefix are context that is not scored.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

from app.spec.datasets.example import Example, Kind
from app.spec.datasets.example import Response as Said
from app.spec.datasets.mapping import Mapping
from app.spec.datasets.rendering import Rendering
from worker.trainer.control import Encoding
from worker.trainer.errors import UserError
from worker.trainer.rendering import Rendered, Renderer, RowRefused, Span

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

    `line` is where the example was in its file; `desirable` says of a labelled response whether it is. `group` is the
    same for rows that ask the same, whatever the white space and case of it. `file` is the number of the file.
    """

    line: int
    prompt: tuple[int, ...]
    responses: tuple[Response, ...]
    desirable: bool = True
    group: int = 0
    file: int = 0

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
class Tally:
    """What happened to the rows of a file on their way to tokens."""

    prompts: int = 0
    """Prompts that were cut to fit `max_length`."""
    answers: int = 0
    """Rows with an answer that was cut."""
    rows: int = 0
    """Rows that were cut at all."""
    long: int = 0
    """Rows left out because they are longer than `max_length`, where the job asks for it."""
    lost: int = 0
    """Rows left out because nothing was left to learn."""
    control_text: int = 0
    """Rows in which text looks like a control token. It is text."""
    templated: int = 0
    """Rows whose prompt a template had written already: it was taken as it is."""
    ended: int = 0
    """Rows with an answer that brought its own end-of-sequence token as text."""
    refused: Counter[str] = field(default_factory=Counter)
    """Rows left out because the chat template would not have written all of them, by reason."""
    details: dict[str, str] = field(default_factory=dict)
    """What is wrong with the first of them, with its line."""

    def add(self, other: "Tally") -> None:
        """Count what `other` counted, of later rows."""
        for one in fields(self):
            if one.name == "details":
                self.details = other.details | self.details
            else:
                setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))

    def refuse(self, line: int, refused: RowRefused) -> None:
        """Count a row that is left out."""
        self.refused[refused.reason] += 1
        self.details.setdefault(refused.reason, f"Line {line}: {refused.detail}.")


Truncation = Literal["keep_end", "keep_start", "drop"]


@dataclass(frozen=True)
class Recipe:
    """How examples become rows.

    `need` is what the method compares; `loss_on` scores the last answer, every assistant turn, or all of the text;
    `truncation` says what becomes of a row that is too long.
    """

    need: Kind
    max_length: int
    loss_on: Literal["answers", "turns", "text"] = "answers"
    mapping: Mapping | None = None
    """Which columns hold what, where the file does not say it."""
    rendering: Rendering = field(default_factory=Rendering)
    truncation: Truncation = "keep_end"
    lenient: bool = False
    """An answer that the chat template would not write as it is stands behind its prompt as it is: what a model has
    written is scored, not trained."""


def rows(examples: Iterable[Example], tokenizer: Tokenizer, recipe: Recipe, tally: Tally) -> Iterator[Row]:
    """Tokenise examples and cut them to length. Plain text is cut into pieces, none of which is lost.

    Rows that are refused, or in which nothing is left to learn, are counted and left out.
    """
    for whole in whole_rows(examples, Renderer(tokenizer, recipe.rendering), recipe, tally):
        for row in cut(whole, recipe, tally):
            if row.learnable:
                yield row
            else:
                tally.lost += 1


@dataclass(frozen=True)
class Whole:
    """A row before it is cut. `header` is how many tokens at the end of its prompt begin the answer; `raw`: it is plain
    text, without prompt and answer; `rest`: the end of the prompt's text that merges with what follows.
    """

    row: Row
    header: int = 0
    raw: bool = False
    rest: str = ""


def whole_rows(examples: Iterable[Example], renderer: Renderer, recipe: Recipe, tally: Tally) -> Iterator[Whole]:
    """The rows of examples, as long as they are."""
    for group in batched(_wanted(examples, recipe.need), 256):
        rendered = [_rendered(example, renderer, recipe, tally) for example in group]
        plain = [text for found in rendered if found is not None and not found.moved for text in found.texts]
        encodings = iter(renderer.control.encode(plain))
        for example, found in zip(group, rendered, strict=True):
            if found is None:
                continue
            try:
                tokens = [
                    renderer.control.encode_moved(text) if found.moved else next(encodings) for text in found.texts
                ]
            except ValueError as error:
                tally.refuse(example.line, RowRefused("control_text", str(error)))
                continue
            tally.control_text += found.moved
            tally.templated += found.templated
            tally.ended += found.ended
            yield _whole(example, found, tokens, renderer.bos if found.bos else [], recipe.loss_on)


def _rendered(example: Example, renderer: Renderer, recipe: Recipe, tally: Tally) -> Rendered | None:
    """The text of an example; None for one that is refused, which is counted."""
    try:
        return renderer.render(example, turns=recipe.loss_on == "turns", lenient=recipe.lenient)
    except RowRefused as refused:
        tally.refuse(example.line, refused)
        return None


def _whole(example: Example, found: Rendered, tokens: list[Encoding], bos: list[int], loss_on: str) -> Whole:
    group = _group(example)
    if example.raw or loss_on == "text":
        spans: tuple[Span, ...] = ((0, len(found.texts[0])),)
    elif loss_on == "turns" or example.turns:
        spans = found.turns
    else:
        row, shared = _row(example, found, tokens, bos, group)
        offsets = tokens[0][1][:shared]
        header = sum(begin >= found.prompt - found.header for begin, _ in offsets) if found.header else 0
        return Whole(row, header, rest=found.texts[0][offsets[-1][1] if offsets else 0 : found.prompt])
    return Whole(_conversation(example, tokens[0], bos, spans, group), raw=example.raw)


def _group(example: Example) -> int:
    """A number for what is asked."""
    return int.from_bytes(hashlib.blake2b(example.asked.encode(), digest_size=8).digest(), signed=True)


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
        elif need == Kind.PROMPTS:
            yield replace(example, responses=answers[:1] or PROBES[:1], desirable=True, turns=())
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


def said(answer: Said) -> str:
    """The text of an answer: of one of several turns, its last."""
    return answer if isinstance(answer, str) else answer[-1]["content"]


def written(example: Example) -> str:
    """A prompt for people and for other programs: plain text as it is, a conversation as a transcript."""
    prompt = example.prompt
    if isinstance(prompt, str):
        return f"{example.system}\n\n{prompt}" if example.system else prompt
    names = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": "", "tool": "\n\nTool: "}
    return "".join(names[turn["role"]] + turn["content"] for turn in prompt) + "\n\nAssistant:"


PROBES = ("the", "A", "1")
"""Beginnings of answers, by which the tokens of a prompt are found that none of them merges with."""


def prompt_ids(example: Example, renderer: Renderer, recipe: Recipe) -> tuple[tuple[int, ...], str]:
    """The tokens to which a model writes an answer, which are those that training calls the prompt; never none.

    And the rest of the prompt's text, of which the first token of an answer has yet to be made: mostly nothing, a space
    where the prompt ends in one. Raises `UserError` for a prompt that cannot be written.
    """
    asked = replace(example, responses=example.responses or PROBES, desirable=True, turns=())
    tally = Tally()
    for whole in whole_rows([asked], renderer, replace(recipe, need=Kind.RANKED, loss_on="answers"), tally):
        row = whole.row if not example.raw else replace(whole.row, prompt=())
        room = recipe.max_length
        ids = _cut_prompt(row.prompt, room, recipe.truncation, whole.header)
        return ids or (_first(renderer.tokenizer),), whole.rest
    (detail,) = tally.details.values()
    raise UserError("chat_template_error", detail, "data")


def _first(tokenizer: Tokenizer) -> int:
    """What a text without a prompt begins with."""
    token: int = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return token


def _row(example: Example, found: Rendered, tokens: list[Encoding], bos: list[int], group: int) -> tuple[Row, int]:
    """A row, and how many tokens of its text are its prompt."""
    inside = [sum(1 for _, end in offsets if end <= found.prompt) for _, offsets in tokens]
    shared = 0
    first = tokens[0][0]
    while shared < min(inside) and all(ids[shared] == first[shared] for ids, _ in tokens):
        shared += 1
    responses = tuple(
        Response(tuple(ids[shared:]), tuple(_scored(offsets[shared:], spans)))
        for (ids, offsets), spans in zip(tokens, found.learned, strict=True)
    )
    prompt = first[:shared]
    whole = prompt if prompt[:1] == bos[:1] and bos else bos + prompt
    return Row(example.line, tuple(whole), responses, example.desirable, group), shared


def _scored(offsets: list[tuple[int, int]], spans: tuple[Span, ...]) -> list[bool]:
    """Whether each token holds a character of `spans`."""
    if len(spans) == 1:  # as nearly all are: all that follows the prompt
        ((start, stop),) = spans
        return [end > start and begin < stop for begin, end in offsets]
    return [any(start < end and begin < stop for start, stop in spans) for begin, end in offsets]


def _conversation(example: Example, tokens: Encoding, bos: list[int], spans: tuple[Span, ...], group: int) -> Row:
    """All of the text as one response without a prompt, scored where a token holds a character of `spans`."""
    ids, offsets = tokens
    scored = _scored(offsets, spans)
    if bos and ids[:1] != bos:
        ids, scored = bos + ids, [False, *scored]
    return Row(example.line, (), (Response(tuple(ids), tuple(scored)),), group=group)


# -- length -----------------------------------------------------------------------------------------------------


def cut(whole: Whole, recipe: Recipe, tally: Tally) -> list[Row]:
    """`whole` in at most `max_length` tokens of a prompt and one answer; as several rows where it is plain text."""
    row, most = whole.row, recipe.max_length
    if whole.raw:
        (response,) = row.responses
        return [
            replace(row, responses=(Response(response.ids[i : i + most], response.scored[i : i + most]),))
            for i in range(0, len(response.ids), most)
        ]
    if length(row) <= most:
        return [row]
    if recipe.truncation == "drop":
        tally.long += 1
        return []
    found = fitted(whole, most, recipe.truncation)
    tally.rows += 1
    tally.prompts += len(found.prompt) < len(row.prompt) or not row.prompt
    tally.answers += bool(row.prompt) and any(
        len(ours.ids) < len(theirs.ids) for ours, theirs in zip(found.responses, row.responses, strict=True)
    )
    return [found]


def length(row: Row) -> int:
    """Tokens of the prompt and the longest answer."""
    return len(row.prompt) + max(len(response.ids) for response in row.responses)


def prompt_room(prompt: int, answer: int, max_length: int) -> int:
    """How many of a prompt's tokens stay beside an answer of `answer` tokens.

    Who needs less than half of the room leaves the rest to the other; where both need more, each has a half.
    """
    return min(prompt, max(max_length - answer, max_length // 2))


def fitted(whole: Whole, max_length: int, truncation: Truncation) -> Row:
    """A row that is too long, cut: of the prompt its end stays, or its start; of answers their beginning.

    The first token of a text stays, which is BOS or as good as any other; and so does what begins the answer.
    """
    row = whole.row
    if not row.prompt:
        (response,) = row.responses
        kept = [*range(1), *range(len(response.ids) - max_length + 1, len(response.ids))]
        kept = kept if truncation == "keep_end" else list(range(max_length))
        ids, scored = (tuple(values[k] for k in kept) for values in (response.ids, response.scored))
        return replace(row, responses=(Response(ids, scored),))
    longest = max(len(response.ids) for response in row.responses)
    room = max(1, prompt_room(len(row.prompt), longest, max_length))
    prompt = _cut_prompt(row.prompt, room, truncation, whole.header)
    room = max_length - len(prompt)
    responses = tuple(Response(response.ids[:room], response.scored[:room]) for response in row.responses)
    return replace(row, prompt=prompt, responses=responses)


def _cut_prompt(prompt: tuple[int, ...], room: int, truncation: Truncation, header: int) -> tuple[int, ...]:
    if len(prompt) <= room:
        return prompt
    if truncation == "keep_start":
        header = min(header, room - 1)
        return prompt[: room - header] + prompt[len(prompt) - header :]
    return prompt[:1] + prompt[len(prompt) - room + 1 :]

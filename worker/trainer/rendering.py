"""From an example to text: what the model's template, or a transcript, makes of it, and which of it is learned.

What is trained is what the template itself writes for the conversation. Where it writes something of the row
otherwise, or not at all, the row is refused by its reason and counted, never trained in part.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from app.spec.datasets.example import Example, Message, Prompt
from app.spec.datasets.example import Response as Said
from app.spec.datasets.rendering import Rendering
from worker.trainer.control import ControlTokens
from worker.trainer.errors import UserError
from worker.trainer.template import Template, ends_of

Tokenizer = Any
Span = tuple[int, int]
"""First character, and the one behind the last."""

FOREIGN = (
    ("<|im_start|>", "<|im_start|>assistant"),
    ("<|start_header_id|>", "<|start_header_id|>assistant<|end_header_id|>"),
    ("<start_of_turn>", "<start_of_turn>model"),
    ("[INST]", "[/INST]"),
    ("Human:", "\n\nAssistant:"),
)
"""How prompts begin and end that some template wrote, whosoever it was."""
_THINK = re.compile(r"</?think>|\s+")
_INLINE = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)


class RowRefused(Exception):
    """A row that cannot be trained as it stands: `reason` is counted, `detail` is for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Rendered:
    """An example as text.

    `prompt` characters are the prompt's in each of `texts`; the last `header` of them begin the answer.
    `learned` are the assistant's own characters in each text, `turns` those of the first, of earlier turns too.
    `bos`: whether the BOS token is still to be put before. `moved`: whether control tokens in data were moved away.
    `templated`: the prompt was text that a template had written.
    """

    prompt: int
    texts: tuple[str, ...]
    learned: tuple[tuple[Span, ...], ...]
    turns: tuple[Span, ...]
    bos: bool
    header: int = 0
    moved: bool = False
    templated: bool = False
    ended: bool = False
    """An answer brought its own end-of-sequence token as text, which was taken for the end that it means."""


class Renderer:
    """Renders the examples of a file for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, rendering: Rendering) -> None:
        self.tokenizer, self._rendering = tokenizer, rendering
        has = tokenizer.chat_template is not None and rendering.chat_template is not False
        self.template = Template(tokenizer, rendering.date) if has else None
        self.ends = ends_of(tokenizer, self.template)
        """The tokens that end an answer."""
        self.control = ControlTokens(tokenizer, self.ends)
        self.bos = _bos(tokenizer)
        """The BOS token, where the tokenizer would add one by itself."""
        self._end_texts: tuple[str, ...] = tuple(tokenizer.convert_ids_to_tokens(token) for token in self.ends)

    @property
    def dated(self) -> bool:
        """Whether the text may depend on the day."""
        return self.template is not None and self.template.dated

    @property
    def never_ends(self) -> bool:
        """Whether the template writes no token by which a model could learn to stop."""
        return self.template is not None and self._rendering.append_eos is not True and not self._writes_end

    @property
    def _writes_end(self) -> bool:
        assert self.template is not None
        return any(end in self.template.ending for end in self._end_texts)

    def render(self, example: Example, *, turns: bool = False, lenient: bool = False) -> Rendered:
        """The text of an example that has responses; with `turns`, every assistant turn is learned. With `lenient`, an
        answer that the template would change stands behind the prompt as it is.

        Raises `Refused` for a row that would lose something, `UserError` for what no row of the file can be.
        """
        if self._rendering.fold_system:
            example = _folded(example)
        if self._is_templated(example):
            return self._as_it_is(example)
        moved, ended = self.control.inside(_texts_of(example)), False
        if moved:
            own = self._without_ends(example)
            example, ended = own, own.responses != example.responses
            try:
                example = self._moved(example)
            except ValueError as error:
                raise RowRefused("private_characters", str(error)) from error
        template = None if example.raw else self.template
        try:
            found = self._plain(example, turns) if template is None else self._chat(example, template, turns)
        except RowRefused:
            if not lenient or template is None or len(self._only_texts(example)) < len(example.responses):
                raise
            prompt = template.write(example.conversation, example.tools, generation=True)
            texts = tuple(f"{prompt}{answer}{template.ending}" for answer in example.responses)
            learned = tuple(((len(prompt), len(text)),) for text in texts)
            found = Rendered(len(prompt), texts, learned, learned[0], bos=False)
        return replace(found, moved=moved, ended=ended)

    def _without_ends(self, example: Example) -> Example:
        """`example` without the tokens that its writer began the text and ended the answers with: that is done here."""

        def unended(response: Said) -> Said:
            said = response.rstrip() if isinstance(response, str) else ""
            end = next((end for end in self._end_texts if said.endswith(end)), "")
            return said.removesuffix(end) if end else response

        bos, responses, prompt = self.tokenizer.bos_token, tuple(map(unended, example.responses)), example.prompt
        if self.bos and isinstance(prompt, str):
            prompt = prompt.removeprefix(bos)
            if example.raw:
                responses = tuple(said.removeprefix(bos) for said in responses if isinstance(said, str))
        return replace(example, prompt=prompt, responses=responses)

    def _moved(self, example: Example) -> Example:
        """`example` with what looks like control tokens in its texts moved away."""
        move = self.control.moved
        return replace(
            example, prompt=move(example.prompt), responses=tuple(map(move, example.responses)),
            system=move(example.system), tools=tuple(move(list(example.tools))),
        )  # fmt: skip

    # -- prompts that a template has written already ------------------------------------------------------------

    def _is_templated(self, example: Example) -> bool:
        prompt = example.prompt
        if not isinstance(prompt, str) or example.raw or example.system or self._rendering.chat_template is True:
            return False
        if self.template is not None and self.template.wrote(prompt):
            return True
        if not any(mark in prompt for _, mark in FOREIGN):
            return False
        begun, ended = prompt.lstrip(), prompt.rstrip()
        if self.tokenizer.bos_token:
            begun = begun.removeprefix(self.tokenizer.bos_token).lstrip()
        return any(begun.startswith(first) and ended.endswith(last) for first, last in FOREIGN)

    def _as_it_is(self, example: Example) -> Rendered:
        """Prompt and answer as text, control tokens and all; the answer ends once."""
        assert isinstance(example.prompt, str)
        prompt, answers = example.prompt, self._only_texts(example)
        texts = tuple(prompt + self._ended(answer) for answer in answers)
        learned = tuple(((len(prompt), len(text)),) for text in texts)
        return Rendered(len(prompt), texts, learned, learned[0] if learned else (), bos=True, templated=True)

    def _ended(self, answer: str) -> str:
        """An answer with the token that ends it, unless it brings one."""
        ending = self.template.ending.rstrip() if self.template is not None else ""
        ending = ending if any(end in ending for end in self._end_texts) else self._end_texts[-1]
        if self._rendering.append_eos is False or answer.rstrip().endswith((ending, *self._end_texts)):
            return answer
        return answer + ending

    def _only_texts(self, example: Example) -> list[str]:
        answers = [answer for answer in example.responses if isinstance(answer, str)]
        if example.tools or len(answers) < len(example.responses):
            message = f"Line {example.line}: tools and answers of several turns need a chat template to write them."
            raise UserError("chat_template_error", message, "model")
        return answers

    # -- without a template -------------------------------------------------------------------------------------

    def _plain(self, example: Example, turns: bool) -> Rendered:
        """Text as it is, conversations as HH transcripts ("\\n\\nHuman: …\\n\\nAssistant: …"), and the EOS token."""
        _require_no_tools(example)
        prompt = example.prompt
        if isinstance(prompt, str):
            text, space, spans = f"{example.system}\n\n{prompt}" if example.system else prompt, "", list[Span]()
        else:
            text, spans = self._transcript(prompt, example.turns, turns)
            text, space = text + "\n\nAssistant:", " "  # as in the data that made this form common
        eos = self.tokenizer.eos_token if self._rendering.append_eos is not False else ""
        whole, learned = [], []
        for response in example.responses:
            if isinstance(response, str):
                answer, own = response, [(len(text), 0)]
            else:  # its first turn has its speaker's name already
                answer, own = self._transcript(response, (), True)
                moved = len(text) + len(space) - len(_SPEAKERS["assistant"])
                answer = answer[len(_SPEAKERS["assistant"]) :]
                own = [(max(len(text), begin + moved), end + moved) for begin, end in own]
            whole.append(f"{text}{space}{answer}{eos}")
            learned.append((*own[:-1], (own[-1][0], len(whole[-1]))))
        header = 0 if isinstance(prompt, str) else len("\n\nAssistant:")
        return Rendered(len(text), tuple(whole), tuple(learned), (*spans, *learned[0]), bos=True, header=header)

    def _transcript(self, turns: Sequence[Message], chosen: Sequence[int], every: bool) -> tuple[str, list[Span]]:
        """The turns as a transcript, and where the assistant's are: those that are `chosen`, or with `every` all."""
        text, spans = "", []
        for number, turn in enumerate(turns):
            if "reasoning" in turn:
                detail = "the model has no chat template that would write the reasoning"
                raise RowRefused("template_drops_reasoning", detail)
            said = _SPEAKERS[turn["role"]] + turn["content"]
            if turn["role"] == "assistant" and (number in chosen or (every and not chosen)):
                spans.append((len(text) + len(_SPEAKERS["assistant"]) - 1, len(text) + len(said)))
            text += said
        return text, spans

    # -- with the model's template ------------------------------------------------------------------------------

    def _chat(self, example: Example, template: Template, every: bool) -> Rendered:
        turns, tools = example.conversation, example.tools
        answers = [_turns_of(answer) for answer in example.responses]
        if template.reads_reasoning:
            answers = [list(map(_with_reasoning, answer)) for answer in answers]
        try:
            prompt = template.write(turns, tools, generation=True)
            texts = [template.write([*turns, *answer], tools) for answer in answers]
            ignored = bool(tools) and template.write(turns, generation=True) == prompt
            goes_on = all(text.startswith(prompt) for text in texts)
            base = prompt if goes_on else template.write(turns, tools)
        except Exception as error:  # a template may raise anything, on purpose too
            raise _template_error(example, error) from error
        if ignored:
            raise _no_tools(example)
        _require_context(turns, prompt)
        boundary, texts = (len(prompt), texts) if goes_on else _boundary(prompt, base, texts, answers)
        learned = []
        for answer, text in zip(answers, texts, strict=True):
            _require_answer(example, answer, text[boundary:])
            spans = [(boundary, len(text))]
            if len(answer) > 1:
                spans = self._own_turns(example, template, answer, text, boundary)
            learned.append(tuple(spans))
        texts = [self._with_end(text) for text in texts]
        learned = [(*spans[:-1], (spans[-1][0], len(text))) for spans, text in zip(learned, texts, strict=True)]
        earlier = self._earlier(example, template, answers[0], texts[0], every)
        header = len(template.header) if texts[0][:boundary].endswith(template.header) else 0
        return Rendered(boundary, tuple(texts), tuple(learned), (*earlier, *learned[0]), bos=False, header=header)

    def _with_end(self, text: str) -> str:
        """`text` with the EOS token where the job asks for one and the template writes no end."""
        eos: str = self.tokenizer.eos_token
        if self._rendering.append_eos is not True or text.rstrip().endswith((eos, *self._end_texts)):
            return text
        return text + eos

    def _own_turns(
        self, example: Example, template: Template, answer: list[Message], text: str, boundary: int
    ) -> list[Span]:
        """Where the assistant speaks in an answer of several turns: what tools and users say there is not learned."""
        whole = [*example.conversation, *answer]
        spans = self._turns_in(text, whole, _assistants(whole, len(whole) - len(answer)), example, template)
        if spans is None:
            detail = "the model's chat template writes the turns of an answer differently once later ones are there"
            raise RowRefused("template_rewrites_history", detail)
        return [(boundary, spans[0][1]), *spans[1:]]

    def _earlier(
        self, example: Example, template: Template, answer: list[Message], text: str, every: bool
    ) -> list[Span]:
        """Where the earlier turns are that are learned besides the answer."""
        turns = example.conversation
        places = list(example.turns) or (_assistants(turns, 0) if every else [])
        if not places:
            return []
        whole = [*turns, *answer]
        spans = self._turns_in(text, whole, [*places, *_assistants(whole, len(turns))], example, template)
        if spans is None:
            message = (
                f"Line {example.line}: the model's chat template writes earlier turns differently once later ones "
                "are there, so that learning them ('loss_on': 'turns', or a 'weight') would train on text the model "
                "never writes; learn the last answer alone ('answers')."
            )
            raise UserError("chat_template_error", message, "loss_on")
        return spans[: len(places)]

    def _turns_in(
        self, text: str, whole: list[Message], places: list[int], example: Example, template: Template
    ) -> list[Span] | None:
        """Where the messages `places` of the conversation `whole` stand in its `text`: between what the template writes
        of it before each, and with it. Where it writes that otherwise later, its own marks say it; None if it has none.
        """
        try:
            end = self.tokenizer.eos_token
            spans = [_grown(text, whole, place, example, template, end) for place in places]
            if None not in spans:
                return [span for span in spans if span is not None]
            marked = template.marked(whole, example.tools)
        except Exception:  # some templates refuse a conversation that ends there
            return None
        speakers = _assistants(whole, 0)
        if marked is None or len(speakers) != len(marked):
            return None
        return [self._to_its_end(marked[speakers.index(place)], text) for place in places]

    def _to_its_end(self, span: Span, text: str) -> Span:
        """A turn as the template marks it, with the token that ends it: the model needs it to stop."""
        begin, end = span
        if text[begin:end].rstrip().endswith(self._end_texts):
            return span
        return begin, end + next((len(one) for one in self._end_texts if text.startswith(one, end)), 0)


def _bos(tokenizer: Tokenizer) -> list[int]:
    alone = tokenizer("a").input_ids
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and alone[0] == tokenizer.bos_token_id else []


_ALIKE = 8
"""Characters before an answer by which its header is recognised."""
_SPEAKERS = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": ""}
"""How a transcript names who speaks."""


def _assistants(turns: list[Message], first: int) -> list[int]:
    """The numbers of the assistant's turns from the turn `first` on."""
    return [place for place in range(first, len(turns)) if turns[place]["role"] == "assistant"]


def _grown(text: str, whole: list[Message], place: int, example: Example, template: Template, end: str) -> Span | None:
    """Where the message `place` stands in `text`, as the conversation grows by it; None where it does not so. `end` is
    the end-of-sequence token.
    """
    before = template.write(whole[:place], example.tools, generation=True)
    base = template.write(whole[:place], example.tools)
    after = template.write(whole[: place + 1], example.tools)
    last, shared = place == len(whole) - 1, _common(before, text)
    if not last and not text.startswith(after):  # some end a conversation once more, after its last turn
        after = after.rstrip().removesuffix(end)
    if shared < len(base.rstrip()) or not (last or text.startswith(after)):
        return None
    return min(shared, _begin([whole[place]], text, len(base.rstrip()))), len(text) if last else len(after)


def _turns_of(answer: Said) -> list[Message]:
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer


def _with_reasoning(turn: Message) -> Message:
    """A turn with the thoughts that its text begins with under their own name: the template writes their tags."""
    thought = _INLINE.match(turn["content"])
    if thought is None or "reasoning" in turn or turn["role"] != "assistant":
        return turn
    return {**turn, "reasoning": thought[1].strip("\n"), "content": turn["content"][thought.end() :].lstrip("\n")}


def _texts_of(example: Example) -> list[Any]:
    """All that comes from data and reaches the text."""
    return [example.prompt, example.system, list(example.responses), list(example.tools)]


def _folded(example: Example) -> Example:
    """`example` with its system prompt in its first user turn."""
    if isinstance(example.prompt, str):
        prompt: Prompt = f"{example.system}\n\n{example.prompt}" if example.system else example.prompt
        return replace(example, prompt=prompt, system="")
    said = [turn["content"] for turn in example.prompt if turn["role"] == "system" and turn["content"]]
    first = next((place for place, turn in enumerate(example.prompt) if turn["role"] == "user"), None)
    if not said or first is None:
        return example
    turns: list[Message] = []
    learned = []
    for place, turn in enumerate(example.prompt):
        if place in example.turns:
            learned.append(len(turns))
        if place == first:
            turns.append({**turn, "content": "\n\n".join([*said, turn["content"]])})
        elif turn["role"] != "system":
            turns.append(turn)
    return replace(example, prompt=turns, turns=tuple(learned))


def _require_no_tools(example: Example) -> None:
    """Without a template nothing says how calls and results are written."""
    turns = [*example.conversation, *(turn for answer in example.responses for turn in _turns_of(answer))]
    if example.tools or any(turn["role"] == "tool" or "tool_calls" in turn for turn in turns):
        message = f"Line {example.line}: the model has no chat template, so that tools cannot be written for it."
        raise UserError("chat_template_error", message, "model")


def _template_error(example: Example, error: Exception) -> UserError:
    message = f"Line {example.line}: the model's chat template refuses the conversation: {error}"
    system = example.system or any(turn["role"] == "system" for turn in example.conversation)
    if system and "system" in str(error).lower():
        message += ". The option 'fold_system' writes the system prompt into the first user turn"
    return UserError("chat_template_error", message, "training_file")


def _no_tools(example: Example) -> UserError:
    """The model was not made for tools."""
    message = f"Line {example.line}: the model's chat template leaves tools out; use a model that was made for them."
    return UserError("chat_template_error", message, "model")


def _require_context(turns: list[Message], prompt: str) -> None:
    """What users and the system say stands in the prompt."""
    for turn in turns:
        if turn["role"] in ("user", "system") and not _holds(prompt, turn["content"]):
            detail = f"the model's chat template leaves out what the {turn['role']} says"
            if turn["role"] == "system":
                detail += "; 'fold_system' writes it into the first user turn"
            raise RowRefused(f"template_drops_{turn['role']}", detail)


def _require_answer(example: Example, answer: list[Message], text: str) -> None:
    """What the assistant says, thinks and calls stands in the text that is learned."""
    for turn in answer:
        if turn["role"] != "assistant":
            continue
        if not all(call["function"]["name"] in text for call in turn.get("tool_calls", [])):
            raise _no_tools(example)
        if not _holds(text, turn.get("reasoning", "")):
            detail = (
                "the model's chat template leaves the reasoning of answers out; give data without it, or another model"
            )
            raise RowRefused("template_drops_reasoning", detail)
        if not _holds(text, turn["content"]):
            detail = "the model's chat template leaves a part of the answer out, such as what stands before '</think>'"
            raise RowRefused("template_drops_answer", detail)


def _holds(text: str, said: str) -> bool:
    """Whether `text` has all that was said, white space and the tags of thinking apart."""
    if said.strip() in text:
        return True
    return _THINK.sub("", said) in _THINK.sub("", text)


def _boundary(prompt: str, base: str, texts: list[str], answers: list[list[Message]]) -> tuple[int, list[str]]:
    """Where the prompt ends in texts that do not all begin with it; and the texts, each as the prompt goes on.

    Templates of models that think open a block where the answer is to be, which an answer without thoughts does not
    have: then the prompt ends where both are still alike, as in TRL. Others write the last question in another way once
    it is answered, a system prompt in it for instance: then what the template writes for the answer stands behind the
    prompt, which is what a server sends.
    """
    shared = min(_common(prompt, text) for text in texts)
    if shared >= len(base.rstrip()):
        starts = [_begin(answer, text, len(base.rstrip())) for answer, text in zip(answers, texts, strict=True)]
        return min(shared, *starts), texts
    moved = []
    for answer, text in zip(answers, texts, strict=True):
        said = answer[0]["content"].strip() if len(answer) == 1 and "tool_calls" not in answer[0] else ""
        place = len(text[: text.rfind(said)].rstrip()) if said else -1
        ending = text[max(0, place - _ALIKE) : place] if place > 0 else ""
        if not ending or "reasoning" in answer[0] or not prompt.rstrip().endswith(ending):
            detail = "the model's chat template writes earlier turns differently once the answer is there"
            raise RowRefused("template_rewrites_history", detail)
        moved.append(prompt.rstrip() + text[place:])
    boundary = len(prompt) if all(text.startswith(prompt) for text in moved) else len(prompt.rstrip())
    return boundary, moved


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    if other.startswith(one):
        return len(one)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _begin(answer: list[Message], text: str, start: int) -> int:
    """Where what the assistant says itself begins in `text`, not before `start`; its end where that is not seen."""
    first = answer[0]
    said = (first.get("reasoning") or first["content"]).strip()
    place = text.find(said, start) if said else -1
    return place if place >= 0 else len(text)

"""From an example to text, written by the model's template or as a transcript, and which parts of it are learned.

Training uses the text that the template itself writes for the conversation. If the template changes or drops a part of
the row, the row is refused and counted by reason. No row is trained in part.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from transformers import PreTrainedTokenizerBase as Tokenizer

from app.spec.datasets.example import Example, Message, PromptContent, ResponseContent
from app.spec.datasets.rendering import Rendering
from worker.trainer.control import ControlTokens
from worker.trainer.errors import UserError
from worker.trainer.template import Template, ends_of

Span = tuple[int, int]
"""The first character of a part of a text, and the character after its last."""

FOREIGN = (
    ("<|im_start|>", "<|im_start|>assistant"),
    ("<|start_header_id|>", "<|start_header_id|>assistant<|end_header_id|>"),
    ("<start_of_turn>", "<start_of_turn>model"),
    ("[INST]", "[/INST]"),
    ("Human:", "\n\nAssistant:"),
)
"""Beginnings and ends of prompts that were written by a template of any model."""
_THINK = re.compile(r"</?think>|\s+")
"""Tags of thinking, and white space."""
_INLINE_THOUGHTS = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)
"""Thoughts at the beginning of an answer's text."""


class RowRefused(Exception):
    """A row that cannot be trained unchanged. `reason` is a code that is counted; `detail` is for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Rendered:
    """An example as text.

    The first `prompt` characters of each of `texts` are the prompt. The last `header` of these introduce the answer.
    `learned` has the learned spans of each text. `turns` has those of the first text, with earlier turns.
    `bos`: whether the BOS token is still missing. `moved`: whether text of control tokens in the data was moved.
    `templated`: whether the prompt was already written by a template.
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
    """Whether an answer's text ended with an end-of-sequence token. It was taken as the answer's end."""


class Renderer:
    """Renders examples as text for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, rendering: Rendering) -> None:
        self.tokenizer, self._rendering = tokenizer, rendering
        has_template = tokenizer.chat_template is not None and rendering.chat_template is not False
        self.template = Template(tokenizer, rendering.date) if has_template else None
        self.ends = ends_of(tokenizer, self.template)
        """The tokens that end an answer."""
        self.control = ControlTokens(tokenizer, self.ends)
        self.bos = _bos(tokenizer)
        """The BOS token in a list; empty if the tokenizer does not add one by itself."""
        self._end_texts: tuple[str, ...] = tuple(tokenizer.convert_ids_to_tokens(token) for token in self.ends)

    @property
    def dated(self) -> bool:
        """Whether the text may depend on the date."""
        return self.template is not None and self.template.dated

    @property
    def never_ends(self) -> bool:
        """Whether the texts have no token from which a model could learn to stop."""
        return self.template is not None and self._rendering.append_eos is not True and not self._writes_end

    @property
    def _writes_end(self) -> bool:
        """Whether the template writes an end token after an answer."""
        assert self.template is not None
        return any(end in self.template.ending for end in self._end_texts)

    def render(self, example: Example, *, turns: bool = False, lenient: bool = False) -> Rendered:
        """The text of an example with responses.

        With `turns`, every assistant turn is learned. With `lenient`, an answer that the template would change follows
        the prompt unchanged.

        Raises `RowRefused` for a row that would lose a part, and `UserError` for an error that affects the whole file.
        """
        if self._rendering.fold_system:
            example = _with_folded_system(example)
        if self._is_templated(example):
            return self._templated(example)
        has_control_text, ended = self.control.inside(_texts_of(example)), False
        if has_control_text:
            unended = self._without_ends(example)
            example, ended = unended, unended.responses != example.responses
            try:
                example = self._with_moved_control_text(example)
            except ValueError as error:
                raise RowRefused("private_characters", str(error)) from error
        template = None if example.raw else self.template
        try:
            rendered = self._plain(example, turns) if template is None else self._chat(example, template, turns)
        except RowRefused:
            if not lenient or template is None or len(self._only_texts(example)) < len(example.responses):
                raise
            prompt = template.write(example.conversation, example.tools, generation=True)
            texts = tuple(f"{prompt}{answer}{template.ending}" for answer in example.responses)
            learned = tuple(((len(prompt), len(text)),) for text in texts)
            rendered = Rendered(len(prompt), texts, learned, learned[0], bos=False)
        return replace(rendered, moved=has_control_text, ended=ended)

    def _without_ends(self, example: Example) -> Example:
        """`example` without its own BOS and end tokens, which the renderer adds itself."""

        def unended(response: ResponseContent) -> ResponseContent:
            said = response.rstrip() if isinstance(response, str) else ""
            end = next((end for end in self._end_texts if said.endswith(end)), "")
            return said.removesuffix(end) if end else response

        bos, responses, prompt = self.tokenizer.bos_token, tuple(map(unended, example.responses)), example.prompt
        if self.bos and isinstance(prompt, str):
            prompt = prompt.removeprefix(bos)
            if example.raw:
                responses = tuple(said.removeprefix(bos) for said in responses if isinstance(said, str))
        return replace(example, prompt=prompt, responses=responses)

    def _with_moved_control_text(self, example: Example) -> Example:
        """`example` with the text of control tokens moved to private characters (see `control`)."""
        move = self.control.moved
        return replace(
            example, prompt=move(example.prompt), responses=tuple(map(move, example.responses)),
            system=move(example.system), tools=tuple(move(list(example.tools))),
        )  # fmt: skip

    # -- prompts that a template has already written ------------------------------------------------------------

    def _is_templated(self, example: Example) -> bool:
        """Whether the prompt is text that a template has already written, of this model or of another."""
        prompt = example.prompt
        if not isinstance(prompt, str) or example.raw or example.system or self._rendering.chat_template is True:
            return False
        if self.template is not None and self.template.wrote(prompt):
            return True
        if not any(mark in prompt for _, mark in FOREIGN):
            return False
        start, stripped = prompt.lstrip(), prompt.rstrip()
        if self.tokenizer.bos_token:
            start = start.removeprefix(self.tokenizer.bos_token).lstrip()
        return any(start.startswith(beginning) and stripped.endswith(ending) for beginning, ending in FOREIGN)

    def _templated(self, example: Example) -> Rendered:
        """Prompt and answers as text, unchanged. Each answer gets an end token unless it has one."""
        assert isinstance(example.prompt, str)
        prompt, answers = example.prompt, self._only_texts(example)
        texts = tuple(prompt + self._with_end_token(answer) for answer in answers)
        learned = tuple(((len(prompt), len(text)),) for text in texts)
        return Rendered(len(prompt), texts, learned, learned[0] if learned else (), bos=True, templated=True)

    def _with_end_token(self, answer: str) -> str:
        """`answer` with the token that ends it, unless it has one."""
        ending = self.template.ending.rstrip() if self.template is not None else ""
        ending = ending if any(end in ending for end in self._end_texts) else self._end_texts[-1]
        if self._rendering.append_eos is False or answer.rstrip().endswith((ending, *self._end_texts)):
            return answer
        return answer + ending

    def _only_texts(self, example: Example) -> list[str]:
        """The answers as texts. Raises `UserError` if the example has tools or answers of several turns."""
        answers = [answer for answer in example.responses if isinstance(answer, str)]
        if example.tools or len(answers) < len(example.responses):
            message = f"Line {example.line}: tools and answers of several turns need a chat template to write them."
            raise UserError("chat_template_error", message, "model")
        return answers

    # -- without a template -------------------------------------------------------------------------------------

    def _plain(self, example: Example, turns: bool) -> Rendered:
        """The example without a template, with the EOS token at the end.

        Text stays unchanged. Conversations become HH transcripts ("\\n\\nHuman: …\\n\\nAssistant: …").
        """
        _require_no_tools(example)
        prompt = example.prompt
        if isinstance(prompt, str):
            prompt_text, space, spans = f"{example.system}\n\n{prompt}" if example.system else prompt, "", list[Span]()
        else:
            prompt_text, spans = self._transcript(prompt, example.turns, turns)
            # The form of the HH data set, which made it common.
            prompt_text, space = prompt_text + "\n\nAssistant:", " "
        eos = self.tokenizer.eos_token if self._rendering.append_eos is not False else ""
        whole_texts, learned = [], []
        for response in example.responses:
            if isinstance(response, str):
                answer, own_spans = response, [(len(prompt_text), 0)]  # the end of the last span is set below
            else:  # the prompt already ends with the speaker's name, so the first turn's own is removed
                answer, own_spans = self._transcript(response, (), True)
                shift = len(prompt_text) + len(space) - len(_SPEAKERS["assistant"])
                answer = answer[len(_SPEAKERS["assistant"]) :]
                own_spans = [(max(len(prompt_text), begin + shift), end + shift) for begin, end in own_spans]
            whole_texts.append(f"{prompt_text}{space}{answer}{eos}")
            learned.append((*own_spans[:-1], (own_spans[-1][0], len(whole_texts[-1]))))
        header = 0 if isinstance(prompt, str) else len("\n\nAssistant:")
        return Rendered(
            len(prompt_text), tuple(whole_texts), tuple(learned), (*spans, *learned[0]), bos=True, header=header
        )

    def _transcript(self, turns: Sequence[Message], chosen: Sequence[int], every: bool) -> tuple[str, list[Span]]:
        """The turns as a transcript, and the spans of assistant turns: the `chosen` ones; else, with `every`, all."""
        text, spans = "", []
        for number, turn in enumerate(turns):
            if "reasoning" in turn:
                detail = "the model has no chat template to write the reasoning"
                raise RowRefused("template_drops_reasoning", detail)
            said = _SPEAKERS[turn["role"]] + turn["content"]
            if turn["role"] == "assistant" and (number in chosen or (every and not chosen)):
                spans.append((len(text) + len(_SPEAKERS["assistant"]) - 1, len(text) + len(said)))
            text += said
        return text, spans

    # -- with the model's template ------------------------------------------------------------------------------

    def _chat(self, example: Example, template: Template, every: bool) -> Rendered:
        """The example as the model's template writes it. With `every`, earlier assistant turns are learned too."""
        turns, tools = example.conversation, example.tools
        answers = [_turns_of(answer) for answer in example.responses]
        if template.reads_reasoning:
            answers = [list(map(_with_reasoning, answer)) for answer in answers]
        # 1. The template's text of the prompt, and of the conversation with each answer.
        try:
            prompt = template.write(turns, tools, generation=True)
            texts = [template.write([*turns, *answer], tools) for answer in answers]
            tools_ignored = bool(tools) and template.write(turns, generation=True) == prompt
            extends_prompt = all(text.startswith(prompt) for text in texts)
            base = prompt if extends_prompt else template.write(turns, tools)
        except Exception as error:  # a template may raise anything, on purpose too
            raise _template_error(example, error) from error
        if tools_ignored:
            raise _no_tools(example)
        _require_context(turns, prompt)
        # 2. Where the prompt ends, in characters.
        boundary, texts = (len(prompt), texts) if extends_prompt else _boundary(prompt, base, texts, answers)
        # 3. The learned spans of each answer, up to its end token.
        learned = []
        for answer, text in zip(answers, texts, strict=True):
            _require_answer(example, answer, text[boundary:])
            spans = [(boundary, len(text))]
            if len(answer) > 1:
                spans = self._answer_spans(example, template, answer, text, boundary)
            learned.append(tuple(spans))
        texts = [self._with_end(text) for text in texts]
        learned = [(*spans[:-1], (spans[-1][0], len(text))) for spans, text in zip(learned, texts, strict=True)]
        # 4. The learned spans of earlier turns.
        earlier = self._earlier_spans(example, template, answers[0], texts[0], every)
        header = len(template.header) if texts[0][:boundary].endswith(template.header) else 0
        return Rendered(boundary, tuple(texts), tuple(learned), (*earlier, *learned[0]), bos=False, header=header)

    def _with_end(self, text: str) -> str:
        """`text` with the EOS token, if the job asks for one and the template writes no end token."""
        eos: str = self.tokenizer.eos_token
        if self._rendering.append_eos is not True or text.rstrip().endswith((eos, *self._end_texts)):
            return text
        return text + eos

    def _answer_spans(
        self, example: Example, template: Template, answer: list[Message], text: str, boundary: int
    ) -> list[Span]:
        """The assistant's spans in an answer of several turns. The turns of tools and users are not learned."""
        whole = [*example.conversation, *answer]
        spans = self._message_spans(text, whole, _assistants(whole, len(whole) - len(answer)), example, template)
        if spans is None:
            detail = "the model's chat template writes the turns of an answer differently when later turns follow"
            raise RowRefused("template_rewrites_history", detail)
        return [(boundary, spans[0][1]), *spans[1:]]

    def _earlier_spans(
        self, example: Example, template: Template, answer: list[Message], text: str, every: bool
    ) -> list[Span]:
        """The spans of the earlier turns that are learned besides the answer."""
        turns = example.conversation
        places = list(example.turns) or (_assistants(turns, 0) if every else [])
        if not places:
            return []
        whole = [*turns, *answer]
        spans = self._message_spans(text, whole, [*places, *_assistants(whole, len(turns))], example, template)
        if spans is None:
            message = (
                f"Line {example.line}: the model's chat template writes earlier turns differently when later turns "
                "follow. Learning them ('loss_on': 'turns', or a 'weight') would train on text that the model never "
                "writes. Learn only the last answer ('loss_on': 'answers')."
            )
            raise UserError("chat_template_error", message, "loss_on")
        return spans[: len(places)]

    def _message_spans(
        self, text: str, whole: list[Message], places: list[int], example: Example, template: Template
    ) -> list[Span] | None:
        """The spans of the messages `places` of the conversation `whole` in its `text`.

        A span lies between the text that the template writes without the message, and the text with it. If the template
        rewrites earlier text later, its own marks give the spans. None if it has no marks.
        """
        try:
            end = self.tokenizer.eos_token
            spans = [_span_of_message(text, whole, place, example, template, end) for place in places]
            if None not in spans:
                return [span for span in spans if span is not None]
            marked_spans = template.marked(whole, example.tools)
        except Exception:  # some templates refuse a conversation that ends at such a message
            return None
        assistant_places = _assistants(whole, 0)
        if marked_spans is None or len(assistant_places) != len(marked_spans):
            return None
        return [self._with_turn_end(marked_spans[assistant_places.index(place)], text) for place in places]

    def _with_turn_end(self, span: Span, text: str) -> Span:
        """The span that the template marks for a turn, extended by its end token: the model learns to stop."""
        begin, end = span
        if text[begin:end].rstrip().endswith(self._end_texts):
            return span
        return begin, end + next((len(end_text) for end_text in self._end_texts if text.startswith(end_text, end)), 0)


def _bos(tokenizer: Tokenizer) -> list[int]:
    """The BOS token in a list, if the tokenizer adds it by itself; else an empty list."""
    alone = tokenizer("a").input_ids
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and alone[0] == tokenizer.bos_token_id else []


_HEADER_CHARACTERS = 8
"""Number of characters before an answer by which its header is recognised."""
_SPEAKERS = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": ""}
"""The beginning of each turn in a transcript, by role."""


def _assistants(turns: list[Message], first: int) -> list[int]:
    """The indices of the assistant's turns, from the turn `first` on."""
    return [place for place in range(first, len(turns)) if turns[place]["role"] == "assistant"]


def _span_of_message(
    text: str, whole: list[Message], place: int, example: Example, template: Template, end: str
) -> Span | None:
    """The span of the message `place` in `text`: the part by which the text grows when the message is added.

    None if the earlier text does not stay the same. `end` is the end-of-sequence token.
    """
    before = template.write(whole[:place], example.tools, generation=True)
    base = template.write(whole[:place], example.tools)
    after = template.write(whole[: place + 1], example.tools)
    last, shared = place == len(whole) - 1, _common(before, text)
    if not last and not text.startswith(after):  # some templates write another end after the last turn
        after = after.rstrip().removesuffix(end)
    if shared < len(base.rstrip()) or not (last or text.startswith(after)):
        return None
    return min(shared, _find_answer([whole[place]], text, len(base.rstrip()))), len(text) if last else len(after)


def _turns_of(answer: ResponseContent) -> list[Message]:
    """An answer as a list of turns."""
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer


def _with_reasoning(turn: Message) -> Message:
    """A turn with the thoughts at the beginning of its text moved to `reasoning`. The template writes their tags."""
    thought = _INLINE_THOUGHTS.match(turn["content"])
    if thought is None or "reasoning" in turn or turn["role"] != "assistant":
        return turn
    return {**turn, "reasoning": thought[1].strip("\n"), "content": turn["content"][thought.end() :].lstrip("\n")}


def _texts_of(example: Example) -> list[object]:
    """All parts of an example that come from data and reach the text."""
    return [example.prompt, example.system, list(example.responses), list(example.tools)]


def _with_folded_system(example: Example) -> Example:
    """`example` with its system prompt in its first user turn."""
    if isinstance(example.prompt, str):
        prompt: PromptContent = f"{example.system}\n\n{example.prompt}" if example.system else example.prompt
        return replace(example, prompt=prompt, system="")
    system_texts = [turn["content"] for turn in example.prompt if turn["role"] == "system" and turn["content"]]
    first = next((place for place, turn in enumerate(example.prompt) if turn["role"] == "user"), None)
    if not system_texts or first is None:
        return example
    turns: list[Message] = []
    learned = []
    for place, turn in enumerate(example.prompt):
        if place in example.turns:
            learned.append(len(turns))
        if place == first:
            turns.append({**turn, "content": "\n\n".join([*system_texts, turn["content"]])})
        elif turn["role"] != "system":
            turns.append(turn)
    return replace(example, prompt=turns, turns=tuple(learned))


def _require_no_tools(example: Example) -> None:
    """Refuse tools, tool calls and tool results: without a template their form is unknown."""
    turns = [*example.conversation, *(turn for answer in example.responses for turn in _turns_of(answer))]
    if example.tools or any(turn["role"] == "tool" or "tool_calls" in turn for turn in turns):
        message = f"Line {example.line}: the model has no chat template, so tools cannot be written for it."
        raise UserError("chat_template_error", message, "model")


def _template_error(example: Example, error: Exception) -> UserError:
    """The error for a conversation that the template refuses."""
    message = f"Line {example.line}: the model's chat template refuses the conversation: {error}"
    system = example.system or any(turn["role"] == "system" for turn in example.conversation)
    if system and "system" in str(error).lower():
        message += ". The option 'fold_system' writes the system prompt into the first user turn"
    return UserError("chat_template_error", message, "training_file")


def _no_tools(example: Example) -> UserError:
    """The error for tools whose definitions or calls the template leaves out."""
    message = f"Line {example.line}: the model's chat template leaves tools out; use a model that was made for them."
    return UserError("chat_template_error", message, "model")


def _require_context(turns: list[Message], prompt: str) -> None:
    """Refuse a row if the prompt lacks the text of a user or system turn."""
    for turn in turns:
        if turn["role"] in ("user", "system") and not _holds(prompt, turn["content"]):
            detail = f"the model's chat template leaves out what the {turn['role']} says"
            if turn["role"] == "system":
                detail += "; 'fold_system' writes it into the first user turn"
            raise RowRefused(f"template_drops_{turn['role']}", detail)


def _require_answer(example: Example, answer: list[Message], text: str) -> None:
    """Refuse a row if the learned `text` lacks what the assistant says, thinks or calls."""
    for turn in answer:
        if turn["role"] != "assistant":
            continue
        if not all(call["function"]["name"] in text for call in turn.get("tool_calls", [])):
            raise _no_tools(example)
        if not _holds(text, turn.get("reasoning", "")):
            detail = (
                "the model's chat template leaves out the reasoning of answers; use data without it, or another model"
            )
            raise RowRefused("template_drops_reasoning", detail)
        if not _holds(text, turn["content"]):
            detail = "the model's chat template leaves out part of the answer, such as the text before '</think>'"
            raise RowRefused("template_drops_answer", detail)


def _holds(text: str, said: str) -> bool:
    """Whether `text` contains all of `said`, ignoring white space and the tags of thinking."""
    if said.strip() in text:
        return True
    return _THINK.sub("", said) in _THINK.sub("", text)


def _boundary(prompt: str, base: str, texts: list[str], answers: list[list[Message]]) -> tuple[int, list[str]]:
    """Where the prompt ends, for texts that do not all begin with it. Returns that length in characters, and the texts.

    Case 1: templates of thinking models open a block at the start of the answer. An answer without thoughts lacks the
    block. Then the prompt ends where both texts still agree, as in TRL.

    Case 2: other templates write the last question differently once it is answered, for example with the system prompt
    in it. Then the template's text of the answer is put after the prompt, as a server sends it.
    """
    shared = min(_common(prompt, text) for text in texts)
    if shared >= len(base.rstrip()):
        starts = [_find_answer(answer, text, len(base.rstrip())) for answer, text in zip(answers, texts, strict=True)]
        return min(shared, *starts), texts
    joined = []
    for answer, text in zip(answers, texts, strict=True):
        said = answer[0]["content"].strip() if len(answer) == 1 and "tool_calls" not in answer[0] else ""
        place = len(text[: text.rfind(said)].rstrip()) if said else -1
        ending = text[max(0, place - _HEADER_CHARACTERS) : place] if place > 0 else ""
        if not ending or "reasoning" in answer[0] or not prompt.rstrip().endswith(ending):
            detail = "the model's chat template writes earlier turns differently when the answer follows"
            raise RowRefused("template_rewrites_history", detail)
        joined.append(prompt.rstrip() + text[place:])
    boundary = len(prompt) if all(text.startswith(prompt) for text in joined) else len(prompt.rstrip())
    return boundary, joined


def _common(first: str, second: str) -> int:
    """Length of the common beginning of two texts, in characters."""
    if second.startswith(first):
        return len(first)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _find_answer(answer: list[Message], text: str, start: int) -> int:
    """Where the assistant's own words begin in `text`, searched from `start`, or the end of `text`."""
    first = answer[0]
    said = (first.get("reasoning") or first["content"]).strip()
    place = text.find(said, start) if said else -1
    return place if place >= 0 else len(text)

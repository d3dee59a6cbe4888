"""The known dataset formats: how each is recognised, and how a record of it becomes an example.

A format is recognised by the columns of a file's first rows. It reads one row at a time. The meaning of the values in
a verdict or label column is decided on the whole file (see `labels`) and passed in through `Reading`.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from app.spec.datasets import labels, limits
from app.spec.datasets.columns import ALIASES, plain_name
from app.spec.datasets.conversations import (
    ROLES,
    TRANSCRIPT,
    MessageReader,
    as_response,
    has_system,
    is_empty,
    learn_flag,
    parse_tools,
    same_turn,
    same_turns,
    system_prompt,
    without_system,
)
from app.spec.datasets.errors import DatasetError, Dropped
from app.spec.datasets.example import Example, Kind, Message, PromptContent, ResponseContent
from app.spec.datasets.labels import LabelScheme
from app.spec.json_types import JsonObject

Record = dict[str, object]
_LABELS = ("kto_tag", "label")
_OLD_SIDES = ("preferred_completion", "non_preferred_completion")
"""OpenAI's first names of the two sides."""
_SIDES = ("chosen", "rejected")


@dataclass
class Reading:
    """How to read the records of one file: its format, its messages, and the meaning of its verdicts or labels."""

    format: "Format"
    messages: MessageReader = field(default_factory=MessageReader)
    scheme: LabelScheme | None = None

    def example(self, record: Record, line: int) -> Example:
        """The example of a record. Raises `Dropped` or `DatasetError`."""
        return self.format.read(FileRow(record, line, self))


@dataclass(slots=True)
class FileRow:
    """A row as it is in the file: its record, its line, and how to read it."""

    record: Record
    line: int
    reading: Reading

    def text(self, name: str) -> str:
        """The string in the column `name`; empty for null, which tables have in place of a missing value."""
        value = self.record.get(name)
        if isinstance(value, str):
            return value
        if value is None and name in self.record:
            return ""
        raise DatasetError(self.line, name, "must be a string" if name in self.record else "is missing")

    def messages(self, name: str) -> list[Message]:
        """The messages in the column `name`. Raises `Dropped` for null."""
        value = self.record.get(name)
        if value is None and name in self.record:
            raise Dropped(f"empty_{name}", name)
        return self.reading.messages.read(value, name, self.line)

    @property
    def system(self) -> str:
        """The system prompt in a column of its own; empty if there is none."""
        for name in ("system", "system_prompt"):
            value = self.record.get(name)
            if value is None:
                continue
            if isinstance(value, str) and value.strip():
                return value
            if isinstance(value, list | dict) and value:
                listed = value if isinstance(value, list) else [value]
                turns = self.reading.messages.read(listed, name, self.line)
                if len(system_prompt(turns)) and not without_system(turns):
                    return system_prompt(turns)
                raise DatasetError(self.line, name, "must be text, or messages of the role 'system'")
            if not isinstance(value, str | list | dict):
                raise DatasetError(self.line, name, "must be text, or messages of the role 'system'")
        return ""

    def unanswered_from(self, name: str) -> Example:
        """An example without answers: the prompt in the column `name`, with the row's system prompt and tools."""
        value = self.record.get(name)
        if isinstance(value, str):
            return self.unanswered(value)
        if isinstance(value, dict) and not self.reading.messages.is_message(value):
            inside = next((f"{name}.{key}" for key, text in value.items() if isinstance(text, str)), name)
            reason = f"is an object; a mapping can name the text in it, as '{inside}'"
            raise DatasetError(self.line, name, reason)
        return self.unanswered(self.text(name) if value is None else self.messages(name))

    def unanswered(self, prompt: PromptContent) -> Example:
        """An example of `prompt` without answers, with the row's tools.

        The row's system prompt is added unless `prompt` has its own.
        """
        raw_tools = self.record.get("tools")
        tools = parse_tools(raw_tools, "tools", self.line) if raw_tools else ()
        system = self.system
        if isinstance(prompt, str):
            return Example(self.line, prompt, (), tools=tools, system=system)
        if system and not has_system(prompt):
            prompt = [{"role": "system", "content": system}, *prompt]
        return Example(self.line, prompt, (), tools=tools)

    def answer(self, name: str) -> str | list[Message]:
        """The answer in the column `name`: text, or messages, which may begin with the prompt."""
        value = self.record.get(name)
        if isinstance(value, str):
            return value
        return self.text(name) if value is None else self.reading.messages.answer(value, name, self.line)


@dataclass(frozen=True)
class Format:
    """A dataset format. A file in it has the fields `needs`, and may have the fields `optional`.

    `label` names the column of verdicts or labels, if there is one. `fits` is a further test of the first records.
    """

    name: str
    kind: Kind
    needs: frozenset[str]
    read: Callable[[FileRow], Example]
    optional: frozenset[str] = frozenset()
    label: str | None = None
    fits: Callable[[list[Record]], bool] = lambda _: True

    @property
    def reads(self) -> frozenset[str]:
        """All fields that the format reads."""
        return self.needs | self.optional


# -- pairs ------------------------------------------------------------------------------------------------------


def _with_answers(example: Example, answers: list[str | list[Message]], names: tuple[str, ...]) -> Example:
    """`example` with answers. Answers that are messages may repeat the prompt, and may bring the system prompt."""
    if all(type(answer) is str for answer in answers):
        return example.with_responses(tuple(answers))
    example = _with_system(example, answers)
    example, answers = _with_shared_history(example, answers)
    history = without_system(example.conversation)
    responses = []
    for answer, name in zip(answers, names, strict=True):
        if isinstance(answer, str):
            responses.append(answer)
            continue
        turns = without_system(answer)
        if len(turns) > len(history) and same_turns(turns[: len(history)], history):
            turns = turns[len(history) :]
        responses.append(as_response(turns, name))  # type: ignore[arg-type]
    return example.with_responses(tuple(responses))


def _with_system(example: Example, answers: list[str | list[Message]]) -> Example:
    """`example` with the system prompt of the answers. Raises `Dropped` if two system prompts differ."""
    systems = {system_prompt(answer) for answer in answers if not isinstance(answer, str) and has_system(answer)}
    own = example.system if isinstance(example.prompt, str) else system_prompt(example.prompt)
    systems |= {own} if own else set()
    systems.discard("")
    if len(systems) > 1 and len({" ".join(system.split()) for system in systems}) > 1:
        raise Dropped("histories_differ")
    if own or not systems:
        return example
    system = min(systems)  # they differ in white space only: the choice must not depend on the order of a set
    if isinstance(example.prompt, str):
        return replace(example, system=system)
    return replace(example, prompt=[{"role": "system", "content": system}, *example.prompt])


def _with_shared_history(
    example: Example, answers: list[str | list[Message]]
) -> tuple[Example, list[str | list[Message]]]:
    """If the answers are whole conversations that contain the prompt, their common history replaces the prompt."""
    conversations = [without_system(answer) for answer in answers if not isinstance(answer, str)]
    if (
        len(conversations) < len(answers)
        or any(turns[0]["role"] != "user" for turns in conversations if turns)
        or not all(conversations)
    ):
        return example, answers
    history = without_system(example.conversation)
    if all(len(turns) > len(history) and same_turns(turns[: len(history)], history) for turns in conversations):
        return example, answers
    shared = _shared_history(conversations)
    if not shared or not (isinstance(example.prompt, str) and any(same_turn(turn, history[0]) for turn in shared)):
        return example, answers  # they answer another prompt: `as_response` drops the row
    whole: list[Message] = [{"role": "system", "content": example.system}, *shared] if example.system else shared
    return replace(example, prompt=whole, system=""), list(conversations)


def _shared_history(conversations: list[list[Message]]) -> list[Message]:
    """The turns that all `conversations` begin with, up to the last one that is not the assistant's."""
    count = 0
    for turns in zip(*conversations, strict=False):
        if not all(same_turn(turns[0], turn) for turn in turns[1:]):
            break
        count += 1
    count = min(count, *(len(turns) - 1 for turns in conversations))
    while count and conversations[0][count - 1]["role"] == "assistant":
        count -= 1
    return conversations[0][:count]


def _checked_pair(example: Example) -> Example:
    """The example of a pair. Raises `Dropped` if a side is empty or both are equal."""
    chosen, rejected = example.responses
    if is_empty(chosen):
        raise Dropped("empty_chosen", "chosen")
    if is_empty(rejected):
        raise Dropped("empty_rejected", "rejected")
    if chosen == rejected:
        raise Dropped("identical_responses")
    return example


def _preference(prompt: str) -> Callable[[FileRow], Example]:
    """The reader of pairs whose prompt is in the column `prompt`."""

    def read(row: FileRow) -> Example:
        example = row.unanswered_from(prompt)
        return _checked_pair(_with_answers(example, [row.answer(name) for name in _SIDES], _SIDES))

    return read


def _openai_preference(row: FileRow) -> Example:
    request = row.record.get("input")
    if not isinstance(request, dict):
        raise DatasetError(row.line, "input", "must be an object with 'messages'")
    prompt = row.reading.messages.read(request.get("messages"), "input.messages", row.line)
    if prompt[-1]["role"] == "assistant":
        raise DatasetError(row.line, "input.messages", "must end with the user's message")
    names = _OLD_SIDES if _OLD_SIDES[0] in row.record else ("preferred_output", "non_preferred_output")
    example = Example(row.line, prompt, (), tools=parse_tools(request.get("tools"), "input.tools", row.line))
    return _checked_pair(_with_answers(example, [row.answer(name) for name in names], names))


def _whole_conversations(row: FileRow) -> Example:
    """Two whole conversations: the prompt is their common history."""
    conversations = []
    for name in _SIDES:
        value = row.record.get(name)
        if value is None and name in row.record:
            raise Dropped(f"empty_{name}", name)
        conversations.append(row.reading.messages.transcript(value, name, row.line))
    if any(turns[-1]["role"] != "assistant" for turns in conversations):
        raise Dropped("ends_without_an_answer")
    example = _with_system(row.unanswered([]), list(conversations))
    dialogues = [without_system(turns) for turns in conversations]
    shared = _shared_history(dialogues)
    answers = [turns[len(shared) :] for turns in dialogues]
    is_transcript = any(isinstance(row.record[name], str) for name in _SIDES)  # a transcript has no tool calls
    if is_transcript and any(len(answer) > 1 for answer in answers):
        raise Dropped("histories_differ")
    if any(turn["role"] in ("user", "system") for answer in answers for turn in answer):
        raise Dropped("histories_differ")
    if not shared:
        raise DatasetError(row.line, "chosen", "the two sides share no prompt; add a 'prompt'")
    assert not isinstance(example.prompt, str)
    example = replace(example, prompt=[*example.prompt, *shared])
    responses = tuple(as_response(answer, name) for answer, name in zip(answers, _SIDES, strict=True))
    return _checked_pair(example.with_responses(responses))


def _are_conversations(records: list[Record]) -> bool:
    """Whether the sides are conversations rather than plain texts."""
    sides = [record.get(name) for record in records for name in _SIDES]
    return any(isinstance(side, list | dict) or (isinstance(side, str) and TRANSCRIPT.match(side)) for side in sides)


def _no_prompt_column(records: list[Record]) -> bool:
    """Whether no column has a name that a prompt may have. If one has, the user must say by a mapping what it is."""
    return all(plain_name(name) not in ALIASES["prompt"] for record in records for name in record)


def _implicit_prompt(row: FileRow) -> Example:
    """Two texts that begin with the same prompt. It ends where they differ, before a space there, as in TRL."""
    chosen, rejected = (row.text(name) for name in _SIDES)
    if not chosen.strip():
        raise Dropped("empty_chosen", "chosen")
    if not rejected.strip():
        raise Dropped("empty_rejected", "rejected")
    if chosen == rejected:
        raise Dropped("identical_responses")
    shared = 0
    for ours, theirs in zip(chosen, rejected, strict=False):
        if ours != theirs:
            break
        shared += 1
    if shared and chosen[shared - 1] == " ":
        shared -= 1
    if not chosen[:shared].strip():
        raise Dropped("no_shared_prompt")
    example = row.unanswered(chosen[:shared])
    return _checked_pair(example.with_responses((chosen[shared:], rejected[shared:])))


def _stack_exchange(row: FileRow) -> Example:
    prompt = "Question: " + row.text("question") + "\n\nAnswer: "
    return _checked_pair(Example(row.line, prompt, (row.text("response_j"), row.text("response_k"))))


# -- verdicts ---------------------------------------------------------------------------------------------------

VERDICTS = ("label", "labels", "winner", "better_response_id", "preference", "preferred", "better", "choice", "verdict",
            "human_label", "overall_preference", "judgment", "judgement", "vote", "human_preference")  # fmt: skip
"""Names of columns that say which of two answers is better."""
_ANSWER_COLUMN = re.compile(
    r"(response|output|answer|completion|candidate|conversation|summary|human_ref|option|reply)s?[\s_-]*(0|1|2|a|b)",
    re.IGNORECASE,
)
_SCORE_COLUMN = re.compile(
    r"(score|rating|reward|winner|votes?|preferred)[\s_-]*(?:(?:model|response|answer|output)[\s_-]*)?(0|1|2|a|b)",
    re.IGNORECASE,
)
"""Names of columns with a number for each of two answers: a score, or 1 for the better answer and 0 for the other."""
_PROMPT_COLUMNS = ("prompt", "instruction", "question", "input", "query", "context", "history")
_KNOWN_VERDICTS: dict[tuple[str, str, str], dict[labels.Value, labels.Meaning]] = {
    # Stanford Human Preferences: "labels is the preference label: 1 if A is preferred to B; 0 if B is preferred to A".
    ("human_ref_A", "human_ref_B", "labels"): {1.0: "first", 0.0: "second"},
    # HelpSteer3: from −3, "Response 1 is much better than Response 2", to 3, the other way round.
    ("response1", "response2", "overall_preference"): {
        **dict.fromkeys((-3.0, -2.0, -1.0), "first"), 0.0: "tie", **dict.fromkeys((1.0, 2.0, 3.0), "second"),
    },
}  # fmt: skip
"""The meanings of the values in published datasets, by the two columns of answers and the column of verdicts."""


@dataclass(frozen=True)
class VerdictColumns:
    """The columns of a file of verdicts: the prompt, two answers, and which answer is better.

    The last is in the column `verdict`, or in the two numeric columns `scores`.
    """

    prompt: str
    answers: tuple[str, str]
    verdict: str | None
    scores: tuple[str, str] | None = None

    @property
    def known_meanings(self) -> dict[labels.Value, labels.Meaning] | None:
        """The meanings of the verdicts, if the columns are those of a published dataset that documents them."""
        return None if self.verdict is None else _KNOWN_VERDICTS.get((*self.answers, self.verdict))

    def verdict_of(self, row: FileRow) -> labels.Meaning | None:
        """The verdict of a row; None if it has none."""
        if self.verdict is not None:
            assert row.reading.scheme is not None
            return row.reading.scheme.meaning_of(row.record.get(self.verdict))
        first, second = (labels.value_of(row.record.get(name)) for name in self.scores or ())
        if not isinstance(first, float) or not isinstance(second, float):
            return None
        return "first" if first > second else "second" if second > first else "tie"


def find_verdict_columns(columns: frozenset[str]) -> VerdictColumns | None:
    """Which of the `columns` make a file of verdicts; None if it is no such file."""
    answers, verdict = _column_pair(columns, _ANSWER_COLUMN), next((name for name in VERDICTS if name in columns), None)
    scores = _column_pair(columns, _SCORE_COLUMN) if verdict is None else None
    if answers is None or (verdict is None and scores is None):
        return None
    prompt = next((name for name in _PROMPT_COLUMNS if name in columns), None)
    if prompt is None and not answers[0].lower().startswith("conversation"):
        return None
    return VerdictColumns(prompt or answers[0], answers, verdict, scores)


def _column_pair(columns: frozenset[str], pattern: re.Pattern[str]) -> tuple[str, str] | None:
    """The only two columns that match `pattern` and differ just in their suffix; None if there is not one such pair."""
    names = sorted(name for name in columns if pattern.fullmatch(name))
    pairs = [(first, second) for first in names for second in names if labels.answer_suffixes(first, second)]
    return pairs[0] if len(pairs) == 1 else None


def verdict_format(columns: VerdictColumns) -> Format:
    """The format of a file of verdicts with these columns."""
    names = columns.answers

    def read(row: FileRow) -> Example:
        unanswered, answers = _compared_answers(row, columns)
        meaning = columns.verdict_of(row)
        if meaning is None:
            raise Dropped("no_verdict", columns.verdict)
        if meaning not in ("first", "second"):
            raise Dropped("tie", columns.verdict)
        example = _with_answers(unanswered, answers, names)
        better, worse = example.responses if meaning == "first" else example.responses[::-1]
        return _checked_pair(example.with_responses((better, worse)))

    needs = frozenset((columns.prompt, *names, *(columns.scores or (columns.verdict or "",))))
    return Format("judged", Kind.PREFERENCE, needs, read, _CONTEXT, columns.verdict)


def _compared_answers(row: FileRow, columns: VerdictColumns) -> tuple[Example, list[str | list[Message]]]:
    """(the example without answers, the two answers). Without a prompt column, it is the answers' common history."""
    answers = [row.answer(name) for name in columns.answers]
    if columns.prompt != columns.answers[0]:
        return row.unanswered_from(columns.prompt), answers
    conversations = [without_system(answer) for answer in answers if not isinstance(answer, str)]
    shared = _shared_history(conversations) if len(conversations) == len(answers) else []
    if not shared:
        raise Dropped("histories_differ", columns.answers[0])
    return replace(_with_system(row.unanswered([]), answers), prompt=shared), answers


# -- exports of labelling tools -----------------------------------------------------------------------------------


def _label_studio(row: FileRow) -> Example:
    """A task of Label Studio with two answers in its `data`, and a choice of `left` or `right` in each annotation.

    The votes of all annotations that were not cancelled decide.
    """
    data, annotations = row.record["data"], row.record["annotations"]
    if not isinstance(data, dict) or not isinstance(annotations, list):
        raise DatasetError(row.line, "annotations", "must be a list, and 'data' an object")
    task = FileRow(data, row.line, row.reading)
    names = frozenset(data)
    prompt, answers = (
        next((name for name in _PROMPT_COLUMNS if name in names), None),
        _column_pair(names, _ANSWER_COLUMN),
    )
    if prompt is None or answers is None:
        raise DatasetError(row.line, "data", "must have a prompt and two answers, such as 'answer1' and 'answer2'")
    votes, voted = 0, False
    for place, annotation in enumerate(annotations):
        if not isinstance(annotation, dict) or not isinstance(annotation.get("result"), list):
            raise DatasetError(row.line, f"annotations[{place}]", "must be an object with a list 'result'")
        if annotation.get("was_cancelled"):
            continue
        for item in annotation["result"]:
            if isinstance(item, dict) and item.get("type") == "pairwise":
                votes += _vote(item, answers, row.line, f"annotations[{place}].result")
                voted = True
    if not voted:
        raise Dropped("no_verdict", "annotations")
    if votes == 0:
        raise Dropped("tie", "annotations")
    better, worse = answers if votes > 0 else answers[::-1]
    example = task.unanswered_from(prompt)
    return _checked_pair(_with_answers(example, [task.answer(better), task.answer(worse)], (better, worse)))


def _are_tasks(records: list[Record]) -> bool:
    """Whether the records are tasks of Label Studio with their annotations."""
    return all(
        isinstance(record.get("data"), dict) and isinstance(record.get("annotations"), list) for record in records
    )


def _vote(item: JsonObject, answers: tuple[str, str], line: int, field: str) -> int:
    """1 for the first of `answers`, −1 for the second. `to_name` says which one was on the left."""
    value = item.get("value")
    selected = value.get("selected") if isinstance(value, dict) else None
    if selected not in ("left", "right"):
        raise DatasetError(line, field, "must have a 'value' with 'selected': 'left' or 'right'")
    shown = item.get("to_name")
    shown = shown.split(",") if isinstance(shown, str) else shown
    swapped = shown == [answers[1], answers[0]]
    return 1 if (selected == "left") != swapped else -1


ARGILLA = "ranking.responses"
"""The column of Argilla's exports with the rankings that people gave."""


def ranked_fields(records: list[Record]) -> list[str] | None:
    """The columns with the answers that rankings in an export of Argilla name; None if it is no such export."""
    for record in records:
        rankings = record.get(ARGILLA)
        for ranking in rankings if isinstance(rankings, list) else ():
            if isinstance(ranking, list) and len(ranking) > 1 and all(isinstance(name, str) for name in ranking):
                return sorted(ranking)
    return None


def argilla_format(names: list[str]) -> Format:
    """The format of an export of Argilla with the answers in the columns `names`."""
    optional = frozenset({f"{ARGILLA}.status", f"{ARGILLA}.users"})
    needs = frozenset({"prompt", ARGILLA, *names})
    return Format("argilla", Kind.RANKED, needs, _argilla(names), _CONTEXT | optional)


def _argilla(names: list[str]) -> Callable[[FileRow], Example]:
    """The reader of an export of Argilla. Rankings name the columns of answers, the best first.

    Only submitted ones count. The score of an answer is the mean share of the others that it is above.
    """

    def read(row: FileRow) -> Example:
        rankings, statuses = row.record[ARGILLA], row.record.get(f"{ARGILLA}.status")
        if rankings is not None and not isinstance(rankings, list):
            raise DatasetError(row.line, ARGILLA, "must be a list of rankings")
        rankings = rankings or []
        statuses = statuses if isinstance(statuses, list) else [None] * len(rankings)
        taken = [ranking for ranking, status in zip(rankings, statuses, strict=False) if status in (None, "submitted")]
        if not taken:
            raise Dropped("no_verdict", ARGILLA)
        if not all(isinstance(ranking, list) and sorted(map(str, ranking)) == names for ranking in taken):
            raise DatasetError(row.line, ARGILLA, f"must rank the columns {', '.join(names)}, each once")
        others = len(names) - 1
        scores = [sum(others - ranking.index(name) for ranking in taken) / (others * len(taken)) for name in names]
        example = _with_answers(row.unanswered_from("prompt"), [row.answer(name) for name in names], tuple(names))
        return _best_first(example, ARGILLA, scores)

    return read


# -- answers ----------------------------------------------------------------------------------------------------


def _conversation(row: FileRow, name: str) -> Example:
    """A conversation in the column `name`. Its last answer is trained on.

    If messages have flags such as `weight`, all answers that are not switched off are trained on.
    """
    turns = row.messages(name)
    value = row.record[name]
    flags = [
        learn_flag(item, f"{name}[{k}]", row.line)
        for k, item in enumerate(value if isinstance(value, list) else [value])
    ]
    earlier: tuple[int, ...] = ()
    if any(flag is not None for flag in flags):
        answers = [k for k, turn in enumerate(turns) if turn["role"] == "assistant" and flags[k] is not False]
        if not answers:
            raise Dropped("no_answer_to_train_on", name)
        turns, earlier = turns[: answers[-1] + 1], tuple(answers[:-1])  # turns after the last answer are not needed
        for turn, flag in zip(turns, flags, strict=False):
            if flag and turn["role"] != "assistant":
                row.reading.messages.unread[f"{name}[].weight of the {turn['role']}"] += 1
    *history, last = turns
    response = as_response([last], name)
    if is_empty(response):
        raise Dropped("no_answer_to_train_on", name)
    example = row.unanswered(history)
    if not earlier:
        return example.with_responses((response,))
    offset = len(example.prompt) - len(history)  # 1 if a system prompt from its own column precedes the turns
    return replace(example, responses=(response,), turns=tuple(k + offset for k in earlier))


def _openai_chat(row: FileRow) -> Example:
    return _conversation(row, "messages")


def _sharegpt(row: FileRow) -> Example:
    return _conversation(row, "conversations")


def _alpaca_unanswered(row: FileRow) -> Example:
    instruction, input_text = row.text("instruction"), row.record.get("input")
    if input_text is not None and not isinstance(input_text, str):
        raise DatasetError(row.line, "input", "must be a string")
    prompt = f"{instruction}\n{input_text}" if input_text else instruction
    history = row.record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise DatasetError(row.line, "history", "must be a list of [question, answer]")
    turns: list[Message] = []
    for number, (question, reply) in enumerate(history):
        if not isinstance(question, str) or not isinstance(reply, str):
            raise DatasetError(row.line, f"history[{number}]", "must be two strings")
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return row.unanswered([*turns, {"role": "user", "content": prompt}] if turns else prompt)


def _alpaca(row: FileRow) -> Example:
    return _completed(_alpaca_unanswered(row), row, "output")


def _alpaca_preference(row: FileRow) -> Example:
    return _checked_pair(_with_answers(_alpaca_unanswered(row), [row.answer(name) for name in _SIDES], _SIDES))


def _prompt_completion(row: FileRow) -> Example:
    return _completed(row.unanswered_from("prompt"), row, "completion")


def _completed(unanswered: Example, row: FileRow, name: str) -> Example:
    """`unanswered` with the one answer in the column `name`."""
    example = _with_answers(unanswered, [row.answer(name)], (name,))
    if is_empty(example.responses[0]):
        raise Dropped("empty_completion", name)
    return example


def _labelled(read: Callable[[FileRow], Example], column: str) -> Callable[[FileRow], Example]:
    """The reader `read`, extended by the label in `column`."""

    def labelled(row: FileRow) -> Example:
        assert row.reading.scheme is not None
        example = read(row)
        meaning = row.reading.scheme.meaning_of(row.record.get(column))
        if meaning not in ("desirable", "undesirable"):
            raise Dropped("no_label" if meaning is None else "neutral_label", column)
        return example if meaning == "desirable" else replace(example, desirable=False)

    return labelled


# -- ranked lists -----------------------------------------------------------------------------------------------

ANSWER_LISTS = ("responses", "answers", "completions")
_ANSWER_KEYS = ("response", "answer", "text", "completion", "content", "output", "generation")
_RANK_KEYS = ("rank", "ranking", "position")
_SCORE_KEYS = ("overall_score", "score", "reward", "rating", "fine-grained_score")


def _ranked(prompt: str, column: str) -> Callable[[FileRow], Example]:
    """The reader of ranked lists of answers. `prompt` and `column` name the columns of the prompt and of the list.

    Ranks (1 is best) or scores are in columns of their own, or in the list's items. Without them the best comes first.
    """

    def read(row: FileRow) -> Example:
        items = row.record[column]
        if items is None:
            raise Dropped(f"empty_{column}", column)
        if not isinstance(items, list) or len(items) < 2:
            raise DatasetError(row.line, column, "must be a list of at least two answers")
        if len(items) > limits.MAX_ANSWERS:
            most = limits.MAX_ANSWERS
            reason = f"has {len(items)} answers; at most {most} are taken, which are {most * (most - 1) // 2} pairs"
            raise DatasetError(row.line, column, reason)
        unanswered = row.unanswered_from(prompt)
        answers, objects = [], []
        for number, item in enumerate(items):
            key = next((name for name in _ANSWER_KEYS if name in item), None) if _wraps_answer(item) else None
            value = item if key is None else item[key]
            objects.append({} if key is None else item)
            answers.append("" if value is None else row.reading.messages.answer(value, f"{column}[{number}]", row.line))
        example = _with_answers(unanswered, answers, tuple(f"{column}[{number}]" for number in range(len(answers))))
        scores = _scores(row, column, objects)
        if scores is not None:
            return _best_first(example, column, scores)
        return _best_first(example, column, [-float(position) for position in range(len(answers))], scored=False)

    return read


def _wraps_answer(item: object) -> bool:
    """Whether an item of a list is an object that holds an answer, and not a message."""
    return isinstance(item, dict) and not ("role" in item or "from" in item)


def _scores(row: FileRow, column: str, objects: list[JsonObject]) -> list[float] | None:
    """A score for each answer, higher is better: from a column, or from the objects around the answers.

    None if the row has none: the best answer comes first.
    """
    count = len(objects)
    if row.record.get("ranks") is not None and row.record.get("scores") is not None:
        raise DatasetError(row.line, "ranks", "must come without 'scores': only one of them can set the order")
    if row.record.get("ranks") is not None:
        return [-value for value in _numbers(row.record["ranks"], "ranks", count, row.line)]
    if row.record.get("scores") is not None:
        return _numbers(row.record["scores"], "scores", count, row.line)
    for names, sign in ((_RANK_KEYS, -1.0), (_SCORE_KEYS, 1.0)):
        name = next((name for name in names if any(name in item for item in objects)), None)
        if name is not None:
            values = [item.get(name) for item in objects]
            return [sign * value for value in _numbers(values, f"{column}[].{name}", count, row.line)]
    if any(objects):
        raise DatasetError(row.line, column, "must have a 'rank' or a 'score' for each answer, which sets the order")
    return None


def _best_first(example: Example, column: str, scores: list[float], *, scored: bool = True) -> Example:
    """`example` with its answers sorted by score, the best first. Answers with equal scores: only the first stays.

    Unless they are `scored`, the scores say nothing but the order.
    """
    if any(map(is_empty, example.responses)):
        raise Dropped("empty_response", column)
    first_by_score: dict[float, ResponseContent] = {}
    for response, score in zip(example.responses, scores, strict=True):
        first_by_score.setdefault(score, response)
    if len(first_by_score) < 2:
        raise Dropped("tied_ranks", column)
    ordered = sorted(first_by_score, reverse=True)
    ranked = [first_by_score[score] for score in ordered]
    if len({response if isinstance(response, str) else repr(response) for response in ranked}) < len(ranked):
        raise Dropped("identical_responses", column)
    return example.with_responses(tuple(ranked), tuple(ordered) if scored else ())


def _numbers(values: object, field: str, count: int, line: int) -> list[float]:
    if not isinstance(values, list) or len(values) != count:
        raise DatasetError(line, field, f"must be a list of {count} numbers, one for each answer")
    parsed = [labels.value_of(value) for value in values if not isinstance(value, bool)]
    numbers = [value for value in parsed if isinstance(value, float)]
    if len(numbers) < count:
        raise DatasetError(line, field, "must be numbers")
    return numbers


# -- the rest ---------------------------------------------------------------------------------------------------


def _plain_text(row: FileRow) -> Example:
    text = row.text("text")
    if not text.strip():
        raise Dropped("empty_text", "text")
    return Example(row.line, "", (text,), raw=True)


def _only_a_prompt(row: FileRow) -> Example:
    return row.unanswered_from("prompt")


def _only_prompts(records: list[Record]) -> bool:
    """Whether the records have no other columns than a prompt. Another column may be an answer with an unknown name."""
    return all(record.keys() <= {"prompt", *_CONTEXT} for record in records)


def _only_questions(row: FileRow) -> Example:
    example = row.unanswered_from("messages")
    if isinstance(example.prompt, list) and example.prompt[-1]["role"] != "user":
        raise DatasetError(row.line, "messages", "must end with a turn of the user, as the first rows do")
    return example


def _end_with_a_question(records: list[Record]) -> bool:
    """Whether all conversations end with a turn of the user, as the rows of OpenAI's reinforcement do.

    One whose earlier answers have weights is there to be trained on.
    """
    return all(
        isinstance(turns := record["messages"], list)
        and turns
        and all(isinstance(turn, dict) and "weight" not in turn for turn in turns)
        and isinstance(role := turns[-1].get("role"), str)
        and ROLES.get(role.strip().lower()) == "user"
        for record in records
    )


_CONTEXT = frozenset({"system", "system_prompt", "tools"})


def _formats() -> Iterator[Format]:
    def format(
        name: str,
        kind: Kind,
        needs: str,
        read: Callable[[FileRow], Example],
        *optional: str,
        label: str | None = None,
        fits: Callable[[list[Record]], bool] = lambda _: True,
    ) -> Format:
        return Format(name, kind, frozenset(needs.split()), read, _CONTEXT | frozenset(optional), label, fits)

    pairs, ranked, labelled, answers = Kind.PREFERENCE, Kind.RANKED, Kind.LABELLED, Kind.SUPERVISED
    alpaca = ("input", "history")
    yield format("openai_preference", pairs, "input preferred_output non_preferred_output", _openai_preference)
    yield format("openai_preference", pairs, "input preferred_completion non_preferred_completion", _openai_preference)
    yield format("preference", pairs, "prompt chosen rejected", _preference("prompt"))
    yield format("sharegpt_preference", pairs, "conversations chosen rejected", _preference("conversations"))
    yield format("alpaca_preference", pairs, "instruction chosen rejected", _alpaca_preference, *alpaca)
    for prompt in ("question", "query", "input"):
        yield format("preference", pairs, f"{prompt} chosen rejected", _preference(prompt))
    yield format("transcripts", pairs, "chosen rejected", _whole_conversations, fits=_are_conversations)
    yield format("implicit_prompt", pairs, "chosen rejected", _implicit_prompt, fits=_no_prompt_column)
    yield format("stack_exchange_paired", pairs, "question response_j response_k", _stack_exchange)
    yield format("ultrafeedback", ranked, "instruction completions", _ranked("instruction", "completions"))
    for column in ANSWER_LISTS:
        read = _ranked("prompt", column)
        yield format("ranked", ranked, f"prompt {column}", read, "ranks", "scores", fits=_has_list(column))
    yield format("openai_prompts", Kind.PROMPTS, "messages", _only_questions, fits=_end_with_a_question)
    for label in _LABELS:
        unlabelled: list[tuple[str, str, Callable[[FileRow], Example], tuple[str, ...]]] = [
            ("labelled", "prompt completion", _prompt_completion, ()),
            ("labelled_chat", "messages", _openai_chat, ()),
            ("sharegpt_labelled", "conversations", _sharegpt, ()),
            ("alpaca_labelled", "instruction output", _alpaca, alpaca),
        ]
        for name, needs, reader, optional in unlabelled:
            yield format(name, labelled, f"{needs} {label}", _labelled(reader, label), *optional, label=label)
    yield format("openai_chat", answers, "messages", _openai_chat)
    yield format("sharegpt", answers, "conversations", _sharegpt)
    yield format("alpaca", answers, "instruction output", _alpaca, *alpaca)
    yield format("prompt_completion", answers, "prompt completion", _prompt_completion)
    yield format("text", answers, "text", _plain_text)
    yield format("prompts", Kind.PROMPTS, "prompt", _only_a_prompt, fits=_only_prompts)
    yield format("label_studio", pairs, "data annotations", _label_studio, fits=_are_tasks)


def _has_list(column: str) -> Callable[[list[Record]], bool]:
    return lambda records: any(isinstance(record.get(column), list) for record in records)


FORMATS = tuple(_formats())
"""All formats in the order in which they are tried. A format comes before those that need only a part of its fields."""

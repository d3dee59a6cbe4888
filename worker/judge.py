"""The questions to a judge, and how to read a verdict from its answer. Pure functions.

A judge sees each pair of answers in both orders. This reveals a preference for the first position and cancels it. The
prompts are those of Rafailov et al. 2023, App. C.2.
"""

import re
from collections.abc import Sequence
from typing import Literal

from app.spec.evaluation import Judge
from app.spec.json_types import JsonObject

Choice = Literal["A", "B", "tie"]
Sides = tuple[str, str]
"""The field names of an item's two answers: `candidate` and `baseline`, or `first` and `second`."""

_SUMMARY = """Which of the following summaries does a better job of summarizing the most important points in the given \
forum post{more}

Post:
{{prompt}}

Summary A:
{{a}}

Summary B:
{{b}}

FIRST provide a one-sentence comparison of the two summaries, explaining which you prefer and why. SECOND, on a new \
line, state only "A" or "B" to indicate your choice. Your response should use the format:
Comparison: <one-sentence comparison and explanation>
Preferred: <"A" or "B">"""

QUESTION_TEMPLATES = {
    "plain_summary": _SUMMARY.format(more="?"),
    "concise_summary": _SUMMARY.format(
        more=", without including unimportant or irrelevant details? A good summary is both precise and concise."
    ),
    "dialogue": """For the following query to a chatbot, which response is more helpful?

Query: {prompt}

Response A:
{a}

Response B:
{b}

FIRST provide a one-sentence comparison of the two responses and explain which you feel is more helpful. SECOND, on \
a new line, state only "A" or "B" to indicate which response is more helpful. Your response should use the format:
Comparison: <one-sentence comparison and explanation>
More helpful: <"A" or "B">""",
}
_PLACEHOLDER = re.compile(r"\{(prompt|a|b)\}")
# All repetitions are bounded: an answer is untrusted text and must not make the matching take very long.
_MARKS = r"\W{0,16}"
_LETTER = _MARKS + r"(?:(?i:response|summary|answer)\s{1,4})?" + _MARKS + r"(A|B|(?i:tie))\b"
_JOINER = r"\W{0,16}(?:(or|and|nor|vs|versus)\b|[/&=])"
_BOTH = "(?:" + _JOINER + _LETTER + ")"
_NAMED = re.compile(r"(?i:preferred|more helpful)" + _MARKS + ":" + _LETTER + _BOTH + "?")
_ALONE = re.compile(_LETTER + _BOTH + "?" + _MARKS)
VERDICT_CHARACTERS = 8192
"""Number of characters at the end of an answer in which the verdict is looked for."""


def questions(judge: Judge, item: JsonObject, sides: Sides) -> list[str]:
    """The questions to `judge` about the two answers of `item`, one per order; none if the answers are equal."""
    first, second = (item[side].strip() for side in sides)
    if first == second:
        return []
    return [_question(judge, item["prompt"], *pair) for pair in ((first, second), (second, first))]


def _question(judge: Judge, prompt: str, a: str, b: str) -> str:
    values = {"prompt": prompt.strip(), "a": a, "b": b}
    # One substitution for all placeholders, so that placeholders inside an answer are left as they are.
    return _PLACEHOLDER.sub(
        lambda match: values[match[1]], judge.template or QUESTION_TEMPLATES[judge.question or "dialogue"]
    )


def verdicts(answers: Sequence[str | None], sides: Sides) -> list[str | None]:
    """The verdicts of the judge's answers, in the order of `questions`: a side, `tie`, or None if unreadable.

    Without questions, because the two answers are equal, both verdicts are `tie`.
    """
    if not answers:
        return ["tie", "tie"]
    orders: tuple[dict[Choice, str], ...] = ({"A": sides[0], "B": sides[1]}, {"A": sides[1], "B": sides[0]})
    choices = [None if answer is None else choice(answer) for answer in answers]
    return [
        None if letter is None else "tie" if letter == "tie" else order[letter]
        for letter, order in zip(choices, orders, strict=True)
    ]  # fmt: skip


def choice(answer: str) -> Choice | None:
    """The choice of an answer: a last line that is only a letter, else the last `Preferred:` or `More helpful:`.

    None if it names neither or both ("A and B", "A/B"). "A or B" only repeats the question and is skipped.
    """
    answer = answer[-VERDICT_CHARACTERS:]
    lines = answer.strip().splitlines()
    alone = _ALONE.fullmatch(lines[-1]) if lines else None
    matches = [alone] if alone and alone[2] != "or" else list(_NAMED.finditer(answer))
    matches = [match for match in matches if match[2] != "or"]  # groups: 1 letter, 2 joiner, 3 second letter
    if not matches or matches[-1][3] is not None:
        return None
    letter = matches[-1][1]
    return "tie" if letter.lower() == "tie" else "A" if letter == "A" else "B"

"""What a judge is asked, and what its answer says. Pure functions.

Each two answers are shown in both orders: a judge that prefers what stands first is found out, and its preference
cancels. The words are those of Rafailov et al. 2023, App. C.2.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal

from app.spec.evaluation import Judge

Choice = Literal["A", "B", "tie"]
Sides = tuple[str, str]
"""What the two answers of an item are called in it: `candidate` and `baseline`, or `first` and `second`."""

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

TEMPLATES = {
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
_PLACE = re.compile(r"\{(prompt|a|b)\}")
# Bounded everywhere: an answer is anybody's text, and must not keep the worker matching for ever.
_MARKS = r"\W{0,16}"
_LETTER = _MARKS + r"(?:(?i:response|summary|answer)\s{1,4})?" + _MARKS + r"(A|B|(?i:tie))\b"
_JOINED = r"\W{0,16}(?:(or|and|nor|vs|versus)\b|[/&=])"
_BOTH = "(?:" + _JOINED + _LETTER + ")"
_NAMED = re.compile(r"(?i:preferred|more helpful)" + _MARKS + ":" + _LETTER + _BOTH + "?")
_ALONE = re.compile(_LETTER + _BOTH + "?" + _MARKS)
LAST = 8192
"""Of an answer so many characters, the last ones, are looked at for its verdict."""


def questions(judge: Judge, item: dict[str, Any], sides: Sides) -> list[str]:
    """What `judge` is asked about the answers of `item`: in both orders, and nothing where they say the same."""
    first, second = (item[side].strip() for side in sides)
    if first == second:
        return []
    return [_question(judge, item["prompt"], *pair) for pair in ((first, second), (second, first))]


def _question(judge: Judge, prompt: str, a: str, b: str) -> str:
    values = {"prompt": prompt.strip(), "a": a, "b": b}
    # In one go: what stands in an answer is not looked at for places.
    return _PLACE.sub(lambda place: values[place[1]], judge.template or TEMPLATES[judge.question or "dialogue"])


def verdicts(answers: Sequence[str | None], sides: Sides) -> list[str | None]:
    """Whom the answers to both questions about an item prefer: a side, `tie`, or None where one cannot be read.

    Where nothing was asked, because the two say the same, it is a tie.
    """
    if not answers:
        return ["tie", "tie"]
    orders: tuple[dict[Choice, str], ...] = ({"A": sides[0], "B": sides[1]}, {"A": sides[1], "B": sides[0]})
    found = [None if answer is None else choice(answer) for answer in answers]
    return [
        None if one is None else "tie" if one == "tie" else order[one]
        for one, order in zip(found, orders, strict=True)
    ]  # fmt: skip


def choice(answer: str) -> Choice | None:
    """What an answer prefers: a last line that is only the letter, or else its last `Preferred:` or `More helpful:`.

    None where it says neither, or both ("A and B", "A/B"). "A or B" repeats the question, and says nothing.
    """
    answer = answer[-LAST:]
    lines = answer.strip().splitlines()
    alone = _ALONE.fullmatch(lines[-1]) if lines else None
    said = [alone] if alone and alone[2] != "or" else list(_NAMED.finditer(answer))
    said = [one for one in said if one[2] != "or"]
    if not said or said[-1][3] is not None:
        return None
    found = said[-1][1]
    return "tie" if found.lower() == "tie" else "A" if found == "A" else "B"

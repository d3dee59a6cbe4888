"""Graders: templates, comparisons, similarities against their definitions, and formulas."""

import math
from datetime import date
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from app.errors import describe_validation_error
from app.graders.schemas import ValidateGrader
from app.spec.graders.formula import Formula, FormulaError
from app.spec.graders.grading import Grade, grade
from app.spec.graders.schemas import Grader, by_models
from app.spec.graders.similarity import MAX_CHARACTERS, similarity

GRADERS: TypeAdapter[Any] = TypeAdapter(Grader)
CHECK = {"type": "string_check", "name": "check", "input": "{{sample.output_text}}", "reference": "{{item.answer}}"}
SIMILAR = {"type": "text_similarity", "name": "near", "input": "{{sample.output_text}}", "reference": "{{item.answer}}"}


def graded(grader: dict[str, Any], text: str, /, **item: Any) -> Grade:
    return grade(GRADERS.validate_python(grader), text, item)


def refusal(grader: object) -> tuple[str, str | None]:
    """(message, field) of the error for `grader`."""
    with pytest.raises(ValidationError) as caught:
        ValidateGrader.model_validate({"grader": grader})
    error = caught.value.errors()[0]
    message, param, _ = describe_validation_error(error | {"loc": ("body", *error["loc"])})
    return message, param


# -- templates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{sample.output_text}}", '{"n": [1, {"x": "ü"}]}'),
        ("a {{ item.answer }}, {{item.more.list.1}}!", "a yes, 2.5!"),
        ("{{sample.output_json.n.1.x}}", "ü"),
        ("{{item.more}} {{item.flag}} {{item.day}}", '{"list": ["ä", 2.5]} true 2026-01-02'),
        ("{{" + " " * 20_000 + "item.answer" + " " * 20_000 + "}}", "yes"),
        ("{{" + " " * 60_000, "{{" + " " * 60_000),
        ("{item.answer} {{{item.answer}}}", "{item.answer} {yes}"),
        ("{{item.again}}", "{{item.answer}}"),  # values are not filled in again
    ],
)
def test_a_template_is_filled_with_the_answer_and_the_row(template: str, text: str) -> None:
    item = {
        "expected": text,
        "answer": "yes",
        "more": {"list": ["ä", 2.5]},
        "flag": True,
        "day": date(2026, 1, 2),
        "again": "{{item.answer}}",
    }
    check = CHECK | {"input": template, "reference": "{{item.expected}}", "operation": "eq"}
    assert graded(check, '{"n": [1, {"x": "ü"}]}', **item) == Grade(1.0)


@pytest.mark.parametrize(
    ("template", "answer", "flag"),
    [
        ("{{item.missing}}", "x", "invalid_variable_error"),
        ("{{item.answer.deep}}", "x", "invalid_variable_error"),
        ("{{item.none}}", "x", "invalid_variable_error"),
        ("{{item.list." + "9" * 5000 + "}}", "x", "invalid_variable_error"),
        ("{{sample.output_text}}" * 90, "x" * 20_000, "truncated_observation_error"),
        ("{{item.list.2}}", "x", "invalid_variable_error"),
        ("{{item.list.-1}}", "x", "invalid_variable_error"),
        ("{{sample.output_json.x}}", "no JSON", "sample_parse_error"),
        ("{{sample.output_json.x}}", "[" * 10_000, "sample_parse_error"),
        ("{{sample.output_json.y}}", '{"x": 1}', "invalid_variable_error"),
    ],
)
def test_an_answer_that_cannot_be_graded_has_no_reward(template: str, answer: str, flag: str) -> None:
    failed = graded(CHECK | {"input": template, "operation": "eq"}, answer, answer="x", list=[1, 2], none=None)
    assert failed.reward is None and failed.error is not None and failed.error.flag == flag


@pytest.mark.parametrize("place", ["x", "items.x", "item", "item.", "sample.text", "sample.output_text.x", ""])
def test_a_place_that_no_row_can_fill_is_refused(place: str) -> None:
    message, param = refusal(CHECK | {"input": f"{{{{{place}}}}}", "operation": "eq"})
    assert f"'{{{{{place}}}}}'" in message and param == "grader.input"


# -- comparisons -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "answer", "reference", "reward"),
    [
        ("eq", "Yes", "Yes", 1), ("eq", "Yes", "yes", 0), ("ne", "Yes", "yes", 1), ("ne", "a", "a", 0),
        ("like", "so Yes.", "Yes", 1), ("like", "so yes.", "Yes", 0), ("ilike", "so YES.", "yes", 1),
        ("ilike", "STRASSE", "straße", 1), ("ilike", "no", "yes", 0),
    ],
)  # fmt: skip
def test_the_operations_of_string_check(operation: str, answer: str, reference: str, reward: float) -> None:
    assert graded(CHECK | {"operation": operation}, answer, answer=reference).reward == reward


@pytest.mark.parametrize(
    ("metric", "text", "reference", "value"),
    [
        # 2 M / T with the longest common subsequence "ittn", M = 4 of T = 13 characters (Indel similarity).
        ("fuzzy_match", "kitten", "sitting", 2 * 4 / 13),
        ("rouge_1", "the cat sat", "The cat, it ran!", 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)),
        ("rouge_2", "the cat sat", "the cat ran", 1 / 2),
        ("rouge_3", "a b c d", "a b c e", 1 / 2),
        ("rouge_l", "a x b y c", "a b c", 2 * (3 / 5) * 1 / (3 / 5 + 1)),
        ("rouge_1", "größe ähnlich", "Größe gleich", 1 / 2),
        ("rouge_1", "你好 世界", "你好 地球", 1 / 2),
        # The least of precision and recall of all n-grams up to 4: the texts share 5 of 6 and 8 of 10.
        ("gleu", "the cat sat", "the cat sat down", 6 / 10),
        ("bleu", "the quick brown fox", "the quick brown fox", 1.0),
        # Four-grams of five words: precisions 4/5, 3/4, 2/3, 1/2 and no penalty for the same length.
        ("bleu", "a b c d e", "a b c d f", (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25),
        ("gleu", "", "x", 0.0),
        ("rouge_l", "", "x", 0.0),
        ("bleu", "", "x", 0.0),
        ("fuzzy_match", "", "x", 0.0),
    ],
)
def test_similarities_have_the_values_of_their_definitions(
    metric: Any, text: str, reference: str, value: float
) -> None:
    assert similarity(metric, text, reference) == pytest.approx(value, abs=1e-12)
    assert graded(SIMILAR | {"evaluation_metric": metric}, text, answer=reference).reward == pytest.approx(value)


def test_texts_that_are_too_long_to_compare_are_an_error() -> None:
    words = "a " * (MAX_CHARACTERS // 4)
    for text, reference in (("a " * MAX_CHARACTERS, "a"), (words, words)):
        failed = graded(SIMILAR | {"evaluation_metric": "rouge_l"}, text, answer=reference)
        assert failed.error is not None and failed.error.flag == "truncated_observation_error"
    assert similarity("bleu", "the same text, word for word", "the same text, word for word") == 1
    failed = graded(SIMILAR | {"evaluation_metric": "gleu"}, "a " * MAX_CHARACTERS, answer="a")
    assert failed.reward is None and failed.error is not None and failed.error.flag == "truncated_observation_error"


# -- formulas --------------------------------------------------------------------------------------------------


def multi(formula: str, graders: object = None) -> dict[str, Any]:
    named = {"exact": CHECK | {"operation": "eq"}, "near": SIMILAR | {"evaluation_metric": "fuzzy_match"}}
    return {"type": "multi", "name": "both", "graders": graders or named, "calculate_output": formula}


def test_several_graders_make_one_reward() -> None:
    half = graded(multi("0.25 * exact + 3 * near ^ 2"), "ab", answer="ac")
    assert half.reward == 0.75 and half.scores == {"exact": 0.0, "near": 0.5}
    alone = CHECK | {"operation": "eq"}
    assert graded(multi("2 * check", alone), "x", answer="x").reward == 2
    assert (
        graded(multi("check - near", [alone, SIMILAR | {"evaluation_metric": "rouge_1"}]), "x", answer="x").reward == 0
    )


@pytest.mark.parametrize(
    ("formula", "value"),
    [
        ("a + b * c", 2 + 3 * 5), ("(a + b) * c", 25), ("-a ^ 2", -4), ("a ^ b ^ 2", 2**9), ("a - b - c", -6),
        ("c / a", 2.5), ("min(a, b, c) + max(b)", 5), ("abs(a - c)", 3), ("floor(c / a) + ceil(c / a)", 5),
        ("exp(log(c))", 5), ("sqrt(a + b + c - 1)", 3), ("1e-3 * a", 0.002), (" +a ", 2),
    ],
)  # fmt: skip
def test_the_values_of_formulas(formula: str, value: float) -> None:
    names = {"a": 2.0, "b": 3.0, "c": 5.0}
    assert Formula(formula, frozenset(names))(names) == pytest.approx(value)


@pytest.mark.parametrize("formula", ["1 / a", "log(a)", "sqrt(a - 1)", "9 ^ 9 ^ 9", "exp(1000)", "(a - 1) ^ 0.5"])
def test_a_formula_without_a_value_is_an_error_of_the_answer(formula: str) -> None:
    failed = graded(multi(formula.replace("a", "exact")), "x", answer="y")
    assert failed.reward is None and failed.error is not None and failed.error.flag == "other_error"
    assert failed.scores["exact"] == 0


@pytest.mark.parametrize(
    "formula",
    [
        "a +", "a ** 2", "d", "__import__('os')", "a.real", "(lambda: 1)()", "[a]", "a if a else b", "a and b", "a < b",
        "sum(a, b)", "min()", "abs(a, b)", "min(*a)", "min(a, key=b)", "True", "'x'", "1j", "a\nb", "a // b", "~a", "a % b",
        "(" * 500 + "a" + ")" * 500, "a" * 2000, "x := 1", "a; b", "#", "a # + b", "a\x00",
    ],
)  # fmt: skip
def test_anything_but_a_formula_is_refused(formula: str) -> None:
    with pytest.raises(FormulaError):
        Formula(formula, frozenset("abc"))


@given(st.text(alphabet="ab12.+-*/^() ,minlogexp_[]'\"", max_size=60))
def test_any_text_is_a_formula_with_a_value_or_refused(text: str) -> None:
    try:
        value = Formula(text, frozenset("ab"))({"a": 0.5, "b": -2.0})
    except (FormulaError, ArithmeticError, ValueError):
        return
    assert math.isfinite(value)


def test_a_reward_model_grades_where_it_is_given() -> None:
    learned = {"type": "reward_model", "name": "learned", "model": "ft:judge"}
    both = GRADERS.validate_python(
        multi("2 * exact + learned", {"exact": CHECK | {"operation": "eq"}, "learned": learned})
    )
    assert grade(both, "x", {"answer": "x"}, {"ft:judge": 0.5}) == Grade(2.5, {"exact": 1.0, "learned": 0.5})
    assert grade(both, "x", {"answer": "x"}, {"ft:judge": math.nan}).reward is None
    failed = grade(both, "x", {"answer": "x"})
    assert failed.reward is None and "in trainings only" in str(failed.error)
    assert [path for path, _ in by_models(both)] == ["graders.learned."]
    listed = GRADERS.validate_python(multi("learned", [CHECK | {"operation": "eq"}, learned]))
    assert [path for path, _ in by_models(listed)] == ["graders.1."]
    assert [path for path, _ in by_models(GRADERS.validate_python(learned))] == [""]
    alone = GRADERS.validate_python(multi("learned", learned))
    assert [path for path, _ in by_models(alone)] == ["graders."]


# -- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grader", "field", "words"),
    [
        ({"type": "python", "name": "x", "source": "def grade(): pass"}, "type", "formula"),
        ({"type": "score_model", "name": "x", "model": "m", "input": []}, "type", "not available yet"),
        (CHECK | {"operation": "eq", "input": "{{item.a}}" * 101}, "input", "101 places"),
        (CHECK | {"operation": "neq"}, "operation", "ilike"),
        (CHECK, "operation", "Missing"),
        (CHECK | {"operation": "eq", "weight": 1}, "weight", "Unknown parameter"),
        (SIMILAR | {"evaluation_metric": "cosine"}, "evaluation_metric", "embeddings"),
        (SIMILAR | {"evaluation_metric": "meteor"}, "evaluation_metric", "synonyms"),
        (multi("exact + nothing"), "calculate_output", "exact, near"),
        (multi("a", {"a": multi("1")}), "graders.a.type", "'reward_model' or 'classifier'"),
        (multi("a", {"a b": CHECK | {"operation": "eq"}}), "graders.a b", "pattern"),
        (multi("check", [CHECK | {"operation": "eq"}] * 2), "graders", "same name"),
        (multi("a", {"a": {"type": "label_model"}}), "graders.a.type", "not available yet"),
        (multi("a", [1]), "graders.0.type", "object"),
        (multi("a", {}) | {"graders": []}, "graders", "at least 1"),
        ({"name": "x"}, "type", "'multi'"),
        ({"type": "nothing"}, "type", "'multi'"),
        ({"type": ["multi"]}, "type", "'multi'"),
        (multi("a", {"a": {"type": {}}}), "graders.a.type", "'string_check'"),
        (multi("a", {"type": {}}), "graders.type.type", "'string_check'"),
        ("text", "type", "object"),
    ],
    ids=str,
)
def test_a_grader_that_cannot_grade_is_refused(grader: object, field: str, words: str) -> None:
    message, param = refusal(grader)
    assert words in message and param == f"grader.{field}"

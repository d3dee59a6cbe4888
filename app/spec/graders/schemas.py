"""The fields of graders, as OpenAI's client types them."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, StringConstraints, Tag, model_validator

from app.spec.evaluation import Classifier
from app.spec.graders import similarity
from app.spec.graders.formula import MAX_CHARACTERS, Formula, FormulaError
from app.spec.graders.templates import Template
from app.spec.schema_base import NO_NUL, ModelName, Strict, inconsistent

Name = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=NO_NUL)]
Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
"""A name that a formula can use."""
NOT_BUILT = {
    "python": "'python' graders would run code that others wrote; use 'multi' with a formula",
    "score_model": "'score_model' graders are part of the contract but not available yet",
    "label_model": "'label_model' graders are part of the contract but not available yet",
}


def _of_types(*types: str) -> BeforeValidator:
    """Refuse what is no grader of one of these `types`, with the reason."""
    listed = ", ".join(f"'{kind}'" for kind in types[:-1]) + f" or '{types[-1]}'"

    def check(value: object) -> object:
        kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
        if isinstance(kind, str) and kind in NOT_BUILT:
            raise inconsistent("type", NOT_BUILT[kind])
        if kind not in types:
            raise inconsistent("type", f"A grader here is an object with the 'type' {listed}")
        return value

    return BeforeValidator(check)


def _tag(value: object) -> str:
    """The tag of a grader in a union. With its bracket, it is no part of the path in an error."""
    return f"[{value['type'] if isinstance(value, dict) else getattr(value, 'type', None)}]"


class StringCheck(Strict):
    """1 if the comparison holds, else 0."""

    type: Literal["string_check"]
    name: Name
    input: Template
    reference: Template
    operation: Literal["eq", "ne", "like", "ilike"]
    """`eq`: equal. `ne`: not equal. `like`: `input` contains `reference`. `ilike`: the same, regardless of case."""


def _available_metric(value: object) -> object:
    if isinstance(value, str) and value in similarity.NOT_BUILT:
        raise ValueError(f"'{value}' is not available: {similarity.NOT_BUILT[value]}")
    return value


class TextSimilarity(Strict):
    """The similarity of two texts, from 0 to 1."""

    type: Literal["text_similarity"]
    name: Name
    input: Template
    reference: Template
    evaluation_metric: Annotated[similarity.Metric, BeforeValidator(_available_metric)]
    """`fuzzy_match` compares characters, the others words: BLEU, GLEU, and ROUGE as F1."""


class RewardModel(Strict):
    """The reward of a reward model that was trained here, minus its mean over the answers of its training."""

    type: Literal["reward_model"]
    name: Name
    model: ModelName

    @property
    def source(self) -> str:
        """The model that gives its scores."""
        return self.model


class ByClassifier(Strict):
    """The logit of a linear classifier over the words of prompt and answer."""

    type: Literal["classifier"]
    name: Name
    classifier: Classifier

    @property
    def source(self) -> str:
        """The file of the classifier that gives its scores."""
        return self.classifier.file


ByModel = RewardModel | ByClassifier
"""Graders whose scores come from models, in trainings only."""
AnySingle = StringCheck | TextSimilarity | RewardModel | ByClassifier
SINGLE_TYPES = ("string_check", "text_similarity", "reward_model", "classifier")
TaggedSingle = (
    Annotated[StringCheck, Tag("[string_check]")]
    | Annotated[TextSimilarity, Tag("[text_similarity]")]
    | Annotated[RewardModel, Tag("[reward_model]")]
    | Annotated[ByClassifier, Tag("[classifier]")]
)
Single = Annotated[TaggedSingle, Discriminator(_tag), _of_types(*SINGLE_TYPES)]
MAX_GRADERS = 16


def _form(value: object) -> str:
    """The form of the graders of `multi`."""
    if isinstance(value, list):
        return "[list]"
    is_one = isinstance(value, AnySingle) or (isinstance(value, dict) and isinstance(value.get("type"), str))
    return "[one]" if is_one else "[named]"


class Multi(Strict):
    """Several graders, whose scores make one reward by a formula."""

    type: Literal["multi"]
    name: Name
    graders: Annotated[
        Annotated[Annotated[dict[Variable, Single], Field(min_length=1, max_length=MAX_GRADERS)], Tag("[named]")]
        | Annotated[Annotated[list[Single], Field(min_length=1, max_length=MAX_GRADERS)], Tag("[list]")]
        | Annotated[Single, Tag("[one]")],
        Discriminator(_form),
    ]
    """The graders by the names that the formula uses. In a list, and alone, they have their own names."""
    calculate_output: Annotated[str, StringConstraints(min_length=1, max_length=MAX_CHARACTERS)]
    """A formula: numbers, names of graders, `+ - * / ^`, parentheses, and the functions min, max, abs, floor, ceil,
    exp, sqrt and log."""

    @model_validator(mode="after")
    def _formula_is_valid(self) -> Self:
        if isinstance(self.graders, list) and len(self.named) < len(self.graders):
            raise inconsistent("graders", "Two of the 'graders' have the same name")
        try:
            self.formula()
        except FormulaError as error:
            raise inconsistent("calculate_output", f"'calculate_output' {error}") from None
        return self

    @property
    def named(self) -> dict[str, AnySingle]:
        """The graders by name."""
        if isinstance(self.graders, dict):
            return self.graders
        graders = self.graders if isinstance(self.graders, list) else [self.graders]
        return {grader.name: grader for grader in graders}

    def formula(self) -> Formula:
        """The formula over the names of its graders. Raises `FormulaError`."""
        return Formula(self.calculate_output, frozenset(self.named))


AnyGrader = AnySingle | Multi
Grader = Annotated[
    TaggedSingle | Annotated[Multi, Tag("[multi]")],
    Discriminator(_tag),
    _of_types(*SINGLE_TYPES, "multi"),
]


def by_models(grader: AnyGrader) -> list[tuple[str, ByModel]]:
    """The graders in `grader` whose scores come from models, each with the path of its field."""
    if isinstance(grader, ByModel):
        return [("", grader)]
    if not isinstance(grader, Multi):
        return []
    named = list(grader.named.values())
    paths = [f"graders.{key}." for key in (grader.graders if isinstance(grader.graders, dict) else range(len(named)))]
    if not isinstance(grader.graders, dict | list):
        paths = ["graders."]
    return [(path, one) for path, one in zip(paths, named, strict=True) if isinstance(one, ByModel)]

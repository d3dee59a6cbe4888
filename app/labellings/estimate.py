"""The answers, questions, tokens and money of a labelling, at most. A pure function."""

from typing import Literal

from app.labellings.schemas import EndpointEstimate, LabellingEstimate
from app.spec.datasets.example import Kind
from app.spec.evaluation import Endpoint, SamplingSpec
from app.spec.json_types import JsonObject
from app.spec.labelling import LabellingSpec

CHARACTERS_PER_TOKEN = 4
QUESTION_TOKENS = 150
"""Tokens of a question to a judge beside the prompt and the two answers."""
REPLY_TOKENS = 512
"""Tokens of a judge's reply at most, if its parameters do not say."""
OWN_ANSWERS = {Kind.PREFERENCE: 2, Kind.SUPERVISED: 1, Kind.LABELLED: 1}
"""Answers that a row of each kind has. A ranked row has some number of them."""


def estimate(spec: LabellingSpec, report: JsonObject) -> LabellingEstimate:
    """The estimate of a resolved spec. `report` is the structural report on its file."""
    prompts, warnings = min(report["kept"], spec.max_rows or report["kept"]), list[str]()
    own = OWN_ANSWERS.get(Kind(report["kind"]), 0) if spec.own_answers else 0
    if spec.own_answers and report["kind"] == Kind.RANKED:
        own = 4
        warnings.append("The number of ranked answers in a row is not known. Four are assumed.")
    answers = spec.written + own
    sampling = spec.sampling or SamplingSpec()
    prompt = round(report["characters"]["prompt"]["mean"] / CHARACTERS_PER_TOKEN)
    characters = report["characters"]
    lengths = [characters[side]["mean"] for side in ("chosen", "rejected", "answer") if side in characters]
    own_tokens = round(sum(lengths) / len(lengths) / CHARACTERS_PER_TOKEN) if lengths else 0
    answer = (spec.written * sampling.max_tokens + own * own_tokens) / max(1, answers)
    endpoints = []
    for number, writer in enumerate(spec.writers):
        if writer.endpoint is not None:
            asked = prompts * spec.answers_of_a_writer
            field = f"writers.{number}.endpoint"
            written = _token_limit(writer.endpoint, sampling.max_tokens)
            endpoints.append(_asked(field, "writer", writer.endpoint, asked, prompt, written))
    for number, labeller in enumerate(spec.labellers):
        if labeller.endpoint is not None:
            asked = prompts * answers * (answers - 1)  # every two answers, in both orders
            read, written = prompt + round(2 * answer) + QUESTION_TOKENS, _token_limit(labeller.endpoint, REPLY_TOKENS)
            field = f"labellers.{number}.judge.endpoint"
            endpoints.append(_asked(field, "judge", labeller.endpoint, asked, read, written))
    costs = [entry.cost for entry in endpoints if entry.cost is not None]
    local = sum(writer.model is not None for writer in spec.writers)
    return LabellingEstimate(
        prompts=prompts,
        answers=prompts * answers,
        sampled_tokens=prompts * spec.answers_of_a_writer * local * sampling.max_tokens,
        endpoints=endpoints,
        cost=sum(costs) if costs else None,
        warnings=warnings,
    )


def _token_limit(endpoint: Endpoint, default: int) -> int:
    """The most tokens of an answer, by the endpoint's own parameters."""
    limits = (endpoint.parameters.get(name) for name in ("max_completion_tokens", "max_tokens"))
    return next((limit for limit in limits if isinstance(limit, int)), default)


def _asked(
    field: str, role: Literal["writer", "judge"], endpoint: Endpoint, questions: int, read: int, written: int
) -> EndpointEstimate:
    """The cost of `questions` that have `read` tokens each, with replies of at most `written` tokens."""
    price, tokens = endpoint.price, (questions * read, questions * written)
    return EndpointEstimate(
        field=field,
        role=role,
        model=endpoint.model,
        questions=questions,
        input_tokens=tokens[0],
        output_tokens=tokens[1],
        cost=None if price is None else (tokens[0] * price.input + tokens[1] * price.output) / 1e6,
    )

"""Every causal model type of the installed transformers is exact, falls back with a reason, or is refused with one."""

import pytest

from tests.helpers.causal_types import TYPES
from tests.helpers.model_table import BEGIN, END, PLACE, QUANTISATIONS, outcome, row, table, written
from tests.helpers.versions import needs_transformers

OF_THE_DOCS = needs_transformers("5.23", "the table in the docs has the types of a later one")
DOCS = PLACE.read_text().partition(BEGIN)[2].partition(END)[0].splitlines()


@OF_THE_DOCS
@pytest.mark.parametrize("kind", TYPES)
def test_the_docs_give_the_outcome_of_each_model_type(kind: str) -> None:
    (line,) = [line for line in DOCS if line.startswith(f"| `{kind}` |")]
    assert row(kind) == line


@OF_THE_DOCS
def test_the_docs_list_every_type_and_count_the_outcomes() -> None:
    rows = [line for line in DOCS if line.startswith("| `")]
    assert "\n".join([BEGIN, *DOCS[1:], END]) == table(rows)
    assert [line.split("`")[1] for line in rows] == TYPES


BIASED = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"attention_bias": True},
    "cohere": {"attention_bias": True},
    "glm": {"attention_bias": True},
    "olmo2": {"attention_bias": True},
    "gemma2": {"attention_bias": True},
    "starcoder2": {"use_bias": True},
    "stablelm": {"use_qkv_bias": True},
}
"""Types whose linear layers can have a bias. Those of Qwen2, GPT-NeoX, GPT-2, OPT and gpt-oss always have one."""


@pytest.mark.parametrize("quantization", QUANTISATIONS)
@pytest.mark.parametrize("kind", BIASED)
def test_linear_layers_may_have_a_bias_however_the_base_is_quantised(kind: str, quantization: str) -> None:
    with written(kind, **BIASED[kind]) as model:
        assert outcome(model, quantization)[0] != "refused"

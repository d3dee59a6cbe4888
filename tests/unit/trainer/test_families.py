"""Every family of models that shares prompts: log-probs and gradients of packs equal those of one text at a time."""

import io
from typing import Any

import pytest
import torch

from tests.helpers.families import FAMILIES, ROWS, make_policy
from tests.helpers.trainer import gradients, of_kind, pack_of, parse, plain_logps
from tests.helpers.versions import CAPPED
from worker.trainer.attention import TREE_ATTENTION
from worker.trainer.events import Events
from worker.trainer.exactness import check


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=[CAPPED] if family == "gemma2" else []) for family in FAMILIES]
)
def test_shared_log_probs_and_gradients_equal_those_of_one_text_at_a_time(family: str) -> None:
    stream = io.StringIO()
    policy = make_policy(family, FAMILIES[family], stream)
    assert policy.shared, stream.getvalue()
    assert policy.causal.config._attn_implementation == TREE_ATTENTION

    pack = pack_of(policy, ROWS, [0, 1, 2, 3])
    assert pack.tokens < sum(row.tokens for row in ROWS)  # two rows have one prompt
    shared = policy.score(pack).responses
    expected = torch.cat([plain_logps(policy, ROWS[number]) for number in pack.rows])
    torch.testing.assert_close(shared, expected, rtol=1e-6, atol=0)

    weights = torch.arange(1, len(shared) + 1, dtype=shared.dtype)
    theirs = gradients(policy, (expected * weights).sum())
    for name, gradient in gradients(policy, (shared * weights).sum()).items():
        assert theirs[name].any(), name
        tolerance = 1e-6 * theirs[name].abs().max().item()
        torch.testing.assert_close(gradient, theirs[name], rtol=0, atol=tolerance, msg=name)

    check(policy, ROWS, Events(stream))
    assert policy.shared
    assert stream.getvalue() == ""


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma2", "gemma3_text", "phi3"])
def test_a_sliding_window_shorter_than_the_rows_changes_the_log_probs(family: str) -> None:
    policy = make_policy(family, FAMILIES[family], io.StringIO())
    windowed = policy.score(pack_of(policy, ROWS, [0, 1, 2])).responses
    wide_policy = make_policy(family, {**FAMILIES[family], "sliding_window": 64}, io.StringIO())
    unwindowed = wide_policy.score(pack_of(wide_policy, ROWS, [0, 1, 2])).responses
    assert bool(((windowed - unwindowed).abs() > 1e-4 * windowed.abs()).all())


LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4,
    "original_max_position_embeddings": 16,
}  # fmt: skip
UNSHARED: dict[str, tuple[dict[str, Any], str]] = {
    "phi3": ({"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}, "longrope"),
    "llama": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
    "mamba": ({"state_size": 4, "time_step_rank": 2}, "interface"),
    "bloom": ({"n_head": 4, "n_layer": 2}, "interface"),
    "falcon": ({"new_decoder_architecture": True, "num_kv_heads": 2}, "interface"),
}


@pytest.mark.parametrize("family", UNSHARED)
def test_a_model_that_cannot_share_prompts_gets_one_response_a_row_and_reports_why(family: str) -> None:
    settings, reason = UNSHARED[family]
    stream = io.StringIO()
    policy = make_policy(family, settings, stream, adapter="none")
    messages = of_kind(parse(stream), "message")
    assert {message["level"] for message in messages} == {"warn"}
    assert reason in messages[0]["message"]
    assert not policy.shared
    check(policy, ROWS, Events(stream))
    for row in ROWS:
        pack = pack_of(policy, [row], [0])
        assert len(pack.ids) == 2
        responses, expected = policy.score(pack).responses, plain_logps(policy, row)
        torch.testing.assert_close(responses.double(), expected.double(), rtol=1e-5, atol=0)

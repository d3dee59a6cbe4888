"""Tests that need a GPU, and the part of them that runs on a CPU."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.families import FAMILIES, ROWS, make_policy
from tests.helpers.hardware import use_own_kernel
from tests.helpers.trainer import (
    disturb,
    dpo_method,
    gradients,
    load,
    make_pairs,
    make_work_folder,
    pack_of,
    plain_logps,
    run_in_process,
    run_process,
    sft_method,
    training_metrics,
)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
STEPS = {"max_steps": 6, "batch_size": 8, "learning_rate": 0.005}
PLAIN = {"adapter": {"r": 4}, "quantization": "none", "seed": 0, "validation_split": 0.0}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile", "ignore:The .grad attribute")
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3_text", "gpt2"])
def test_flex_attention_equals_the_cpus_kernels(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled, forward and backward. The pack is padded, as on a GPU."""
    policy = disturb(make_policy(family, FAMILIES[family], io.StringIO()))
    expected = policy.score(pack_of(policy, ROWS, [0, 1, 2, 3])).responses
    own = gradients(policy, expected.sum())
    use_own_kernel(monkeypatch)
    policy.blocks = True
    pack = pack_of(policy, ROWS, [0, 1, 2, 3])
    assert pack.slots > pack.tokens
    in_blocks = policy.score(pack).responses
    torch.testing.assert_close(in_blocks, expected, rtol=1e-6, atol=0)
    for name, gradient in gradients(policy, in_blocks.sum()).items():
        torch.testing.assert_close(gradient, own[name], rtol=1e-5, atol=1e-9, msg=name)


@needs_gpu
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral"])
def test_shared_log_probs_and_gradients_on_a_gpu_are_those_of_the_models_own_attention(
    request: pytest.FixtureRequest, architecture: str
) -> None:
    """In bfloat16, against the model's own attention."""
    policy = disturb(load(request.getfixturevalue(architecture)), 0.02)
    assert policy.shared and policy.blocks
    pack = pack_of(policy, ROWS, [0, 1, 2]).to(policy.device)
    shared = policy.score(pack).responses
    rows = [ROWS[number] for number in pack.rows]
    with torch.autocast("cuda", torch.bfloat16):
        expected = torch.cat([plain_logps(policy, row).float() for row in rows])
    torch.testing.assert_close(shared, expected, rtol=2e-2, atol=0.2)
    theirs = gradients(policy, expected.sum())
    for name, gradient in gradients(policy, shared.sum()).items():
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), theirs[name].flatten(), dim=0)
        assert cosine > 0.98, name


@needs_gpu
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_8_bit_optimizers_train_on_a_gpu(llama: Path, tmp_path: Path, optimizer: str, quantization: str) -> None:
    method = dpo_method(max_steps=6, batch_size=8, learning_rate=0.005, optimizer=optimizer)
    spec = {**PLAIN, "quantization": quantization, "method": method}
    losses = training_metrics(
        run_in_process(make_work_folder(tmp_path, llama, spec, train=make_pairs(8))), "loss", "dpo"
    )
    assert losses[0] == pytest.approx(0.6931, abs=2e-2)
    assert losses[-1] < losses[0]


RANKED = [{"prompt": f"q{n}", "responses": ["one", f"two {n}", "three"], "scores": [3, 2, 1]} for n in range(16)]


@needs_gpu
@pytest.mark.parametrize(("fields", "rows"), [
    ({"quantization": "nf4", "method": dpo_method(**STEPS)}, make_pairs(16)),
    ({"method": dpo_method(compile=True, **STEPS)}, make_pairs(16)),
    ({"method": dpo_method(loss="plackett_luce", **STEPS)}, RANKED),  # three answers of a prompt add their gradients
])  # fmt: skip
def test_a_job_has_the_same_bytes_each_time_on_a_gpu(
    llama: Path, tmp_path: Path, fields: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    weights = set()
    for name in ("first", "second"):
        folder = make_work_folder(tmp_path / name, llama, {**PLAIN, **fields}, train=rows)
        status, _ = run_process(folder)
        assert status == 0, (folder / "trainer.log").read_text()
        weights.add((folder / "output" / "adapter_model.safetensors").read_bytes())
    assert len(weights) == 1


@needs_gpu
def test_recomputed_activations_give_the_same_losses_on_a_gpu(llama: Path, tmp_path: Path) -> None:
    losses = []
    for recompute in (True, False):
        method = sft_method(max_steps=3, batch_size=8, activation_checkpointing=recompute)
        folder = make_work_folder(tmp_path / str(recompute), llama, {**PLAIN, "method": method}, train=make_pairs(8))
        losses.append(training_metrics(run_in_process(folder), "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)

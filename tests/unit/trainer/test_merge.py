"""Merged models, compared with PEFT's own merge."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.adapters import make_adapter
from tests.helpers.tiny_model import make_tiny_model
from worker.trainer.errors import UserError
from worker.trainer.merge import main, merge


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_a_merge_equals_pefts_own(tmp_path: Path, options: dict[str, Any]) -> None:
    base = make_tiny_model(tmp_path / "base")
    make_adapter(base, tmp_path / "start", **options)
    merge(base, tmp_path / "start", tmp_path / "output", torch.float32)
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.float32)
    expected = adapted.merge_and_unload().state_dict()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "output", dtype=torch.float32).state_dict()
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, rtol=1e-6, atol=1e-7)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    assert any(not torch.equal(plain[name], value) for name, value in merged.items())


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_program_writes_a_model_in_the_requested_precision(
    tmp_path: Path, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run in this process; the merges of tests/integration run as processes."""
    base = make_tiny_model(tmp_path / "base")
    make_adapter(base, tmp_path / "start")
    (tmp_path / "merge.json").write_text(json.dumps({"dtype": name}))
    monkeypatch.setattr("sys.argv", ["merge", str(tmp_path)])
    assert main() == 0
    assert json.loads(capsys.readouterr().out) == {}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "output")
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    assert AutoTokenizer.from_pretrained(tmp_path / "output").eos_token is not None
    card = (tmp_path / "output" / "README.md").read_text()
    assert "library_name: transformers" in card and "merged" in card
    assert not list((tmp_path / "output").glob("adapter_*"))


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    make_adapter(base, tmp_path / "start")
    tensors = load_file(tmp_path / "start" / "adapter_model.safetensors")
    renamed = {name.replace("q_proj", "queries"): value for name, value in tensors.items()}
    save_file(renamed, tmp_path / "start" / "adapter_model.safetensors")
    with pytest.raises(UserError, match="does not fit the base"):
        merge(base, tmp_path / "start", tmp_path / "output", torch.float32)

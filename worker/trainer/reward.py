"""Reward models: what a training with the loss `reward_model` leaves.

The artifact is a sequence classifier of transformers with one label: base and adapter merged, and the head as its
`score`. Those classifiers have no bias, so that the mean reward of the training answers stands beside the weights, as
`reward_mean` in `config.json`: r(x, y) − reward_mean has mean 0 over them (Rafailov et al. 2023, Sec. 3).
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from app.datasets.example import Example, Kind
from app.datasets.rendering import Rendering
from app.jobs.hyperparameters import DEFAULT_MAX_LENGTH
from worker.model_files import context_length
from worker.trainer.data import Recipe, Row, Tally, batched, rows
from worker.trainer.events import UserError
from worker.trainer.model import Base, Policy
from worker.trainer.tokenizer import load_tokenizer

SCORED_TOGETHER = 16
MEAN_ROWS = 4096
"""The mean reward is taken over at most this many of the training rows."""


def require_classifier(policy: Policy) -> None:
    """Refuse, before any training, a model that transformers has no sequence classifier for."""
    if type(policy.causal.config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        message = f"'{policy.name}' ({policy.causal.config.model_type}) cannot be saved as a reward model."
        raise UserError("unsupported_model", message, "model")


def mean_reward(policy: Policy, rows: Sequence[Row]) -> float:
    """The mean reward of the answers of `rows`, of the first `MEAN_ROWS`."""
    with torch.no_grad():
        found = [policy.rewards(pack) for pack in policy.packs(rows, range(min(len(rows), MEAN_ROWS)))]
    return float(torch.cat(found).double().mean())


def save(folder: Path, policy: Policy, base: Base, rows: Sequence[Row]) -> None:
    """Write the reward model of `policy` into `folder`."""
    assert policy.reward_head is not None
    mean, weight = mean_reward(policy, rows), policy.reward_head.weight.detach().cpu()
    dtype = torch.float32 if policy.full else policy.reward_head.weight.dtype
    if policy.device.type == "cuda":
        dtype = torch.bfloat16
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        policy.save(Path(name))
        source = Path(name) if policy.full else base.folder
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            source, num_labels=1, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
        if not policy.full:
            config = PeftConfig.from_pretrained(name)
            config.task_type = None  # the adapter is a causal model's; its layers are the same
            model = PeftModel.from_pretrained(model, name, config=config).merge_and_unload()
    model.score.weight.data.copy_(weight)
    tokenizer = policy.tokenizer
    # A classifier reads the last token that is not padding, and an answer's last token is the end of sequence.
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.bos_token or tokenizer.pad_token
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.reward_mean = mean
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def scores(
    folder: Path,
    answered: Sequence[Example],
    rendering: Rendering,
    max_length: int | None,
    tick: Callable[[], None] = lambda: None,
) -> list[float]:
    """What the reward model in `folder` says of the answer of each of `answered`, its mean taken off."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(folder)
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, local_files_only=True,
        trust_remote_code=False, use_safetensors=True, device_map={"": device},
    ).eval()  # fmt: skip
    context = context_length(model.config.to_dict()) or DEFAULT_MAX_LENGTH
    recipe = Recipe(Kind.SUPERVISED, min(max_length or context, context), rendering=rendering, lenient=True)
    texts = [row.prompt + row.responses[0].ids for row in rows(answered, tokenizer, recipe, Tally())]
    assert len(texts) == len(answered)
    found, padding = [0.0] * len(texts), model.config.pad_token_id
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    with torch.no_grad():
        for group in batched(order, SCORED_TOGETHER):
            width = len(texts[group[-1]])
            ids = torch.tensor([[*texts[n], *[padding] * (width - len(texts[n]))] for n in group], device=device)
            mask = torch.tensor([[1] * len(texts[n]) + [0] * (width - len(texts[n])) for n in group], device=device)
            logits = model(input_ids=ids, attention_mask=mask).logits.float().squeeze(1)
            for number, value in zip(group, logits.tolist(), strict=True):
                found[number] = value - model.config.reward_mean
            tick()
    return found

"""Reward models: the artifacts of training with the loss `reward_model`.

The artifact is a transformers sequence classifier with one label: base and adapter merged, and the reward head as its
`score`. These classifiers have no bias. The mean reward of the training answers is therefore stored as `reward_mean` in
`config.json`. Then r(x, y) − reward_mean has mean 0 over these answers (Rafailov et al. 2023, Sec. 3).
"""

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from app.spec.datasets.example import Example, Kind
from app.spec.datasets.rendering import Rendering
from app.spec.hyperparameters import DEFAULT_MAX_LENGTH
from app.spec.json_types import JsonObject
from worker.model_files import context_length, text_config
from worker.trainer.data import Recipe, Row, Tally, batched, rows
from worker.trainer.errors import UserError
from worker.trainer.hardware import hardware, own_device
from worker.trainer.model import Base, Policy
from worker.trainer.ranks import Ranks
from worker.trainer.tokenizer import copy_tokenizer, load_tokenizer, padding_token

SCORED_TOGETHER = 16
"""Number of texts that are scored in one batch."""
MEAN_ROWS = 4096
"""Most training rows over which the mean reward is taken."""


def require_classifier(policy: Policy) -> None:
    """Refuse a model for which transformers has no sequence classifier, before any training."""
    if type(policy.causal.config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        message = f"'{policy.name}' ({policy.causal.config.model_type}) cannot be saved as a reward model."
        raise UserError("unsupported_model", message, "model")


def save(
    folder: Path, policy: Policy, base: Base, rows: Sequence[Row], weights: dict[str, Tensor] | None = None
) -> None:
    """Write the reward model of `policy` into `folder`. Frees the policy's model.

    `weights`: those of a divided model, which was gathered.

    The mean reward is taken over the answers of the first `MEAN_ROWS` of `rows`. It is measured with the written model:
    merged and not quantised.
    """
    assert policy.reward_head is not None
    head = policy.reward_head.weight.detach() if weights is None else weights["reward_head.weight"]
    weight, device, dtype = head.cpu(), policy.device, policy.autocast_dtype
    # 1. Merge the adapter into a classifier of the unquantised base.
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        policy.save(Path(name), weights)
        policy.free_model()  # makes room for the merged model
        source = Path(name) if policy.full else base.folder
        model = AutoModelForSequenceClassification.from_pretrained(
            source, num_labels=1, dtype=dtype or torch.float32, local_files_only=True, trust_remote_code=False,
            use_safetensors=True,
        )  # fmt: skip
        if not policy.full:
            config = PeftConfig.from_pretrained(name)
            config.task_type = None  # the adapter is that of a causal model, but the layers are the same
            model = PeftModel.from_pretrained(model, name, config=config).merge_and_unload()
    # 2. Give it the reward head and a padding token.
    model.score.weight.data.copy_(weight)
    # A classifier reads the last token that is not padding. An answer's last token ends it, so no end token may pad.
    text = model.config.get_text_config()
    padding = padding_token(policy.tokenizer, policy.ends, text.vocab_size)
    text.pad_token_id = model.config.pad_token_id = policy.tokenizer.convert_tokens_to_ids(padding)
    # 3. Measure the mean reward.
    texts = [row.prompt + response.ids for row in rows[:MEAN_ROWS] for response in row.responses]
    try:
        rewards = _rewards(model.eval().to(device), texts)
    except torch.OutOfMemoryError:  # the base was quantised in training, but is not here
        rewards = _rewards(model.cpu(), texts)
    rewards_64 = torch.tensor(rewards, dtype=torch.float64)
    model.config.reward_mean, model.config.reward_mean_answers = rewards_64.mean().item(), len(rewards_64)
    # 4. Write the files.
    model.save_pretrained(folder)
    _keep_own_files(base.folder, folder, padding)


CHANGED_FIELDS = (
    "architectures",
    "id2label",
    "label2id",
    "pad_token_id",
    "dtype",
    "reward_mean",
    "reward_mean_answers",
)
"""Configuration fields in which a reward model differs from its base."""


def _keep_own_files(base: Path, folder: Path, padding: str) -> None:
    """Write the base's configuration and tokenizer, with `CHANGED_FIELDS` and padding on the right."""
    written_config, config = (json.loads((place / "config.json").read_text()) for place in (folder, base))
    config.pop("torch_dtype", None)
    config |= {name: written_config[name] for name in CHANGED_FIELDS if name in written_config}
    text = text_config(config)
    if text is not config:
        text["pad_token_id"] = config["pad_token_id"]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    copy_tokenizer(base, folder)
    settings_path = folder / "tokenizer_config.json"
    settings: JsonObject = json.loads(settings_path.read_text()) if settings_path.exists() else {}
    settings |= {"pad_token": padding, "padding_side": "right"}
    settings_path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    special_path = folder / "special_tokens_map.json"
    if special_path.exists():
        special_tokens = json.loads(special_path.read_text()) | {"pad_token": padding}
        special_path.write_text(json.dumps(special_tokens, indent=2, ensure_ascii=False) + "\n")


def _rewards(
    model: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    check_stop: Callable[[], None] = lambda: None,
    ranks: Ranks | None = None,
) -> list[float]:
    """The classifier's score of each text of token ids, [texts]. Batches hold texts of similar length.

    Each of the `ranks` scores some batches.
    """
    rewards, padding, ranks = [0.0] * len(texts), model.config.pad_token_id, ranks or Ranks()
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    with torch.no_grad():
        for together in batched(batched(order, SCORED_TOGETHER), ranks.size):
            values = list[float]()
            if ranks.rank < len(together):
                group = together[ranks.rank]
                width = len(texts[group[-1]])
                # (n, T), padded on the right.
                ids = [[*texts[number], *[padding] * (width - len(texts[number]))] for number in group]
                mask = [[1] * len(texts[number]) + [0] * (width - len(texts[number])) for number in group]
                logits = model(
                    input_ids=torch.tensor(ids, device=model.device),
                    attention_mask=torch.tensor(mask, device=model.device),
                ).logits  # (n, 1)
                values = logits.float().squeeze(1).tolist()
            for group, scored in zip(together, ranks.gather(values), strict=False):
                for number, value in zip(group, scored, strict=True):
                    rewards[number] = value
            check_stop()
    return rewards


class RewardModel:
    """The reward model in `folder`, on this process's device. `rendering`: how it renders conversations."""

    def __init__(self, folder: Path, rendering: Rendering, max_length: int | None = None) -> None:
        device = own_device()
        self._tokenizer = load_tokenizer(folder)
        self._model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.bfloat16 if hardware(device).half else torch.float32, local_files_only=True,
            trust_remote_code=False, use_safetensors=True, device_map={"": device},
        ).eval()  # fmt: skip
        context = context_length(self._model.config.to_dict()) or DEFAULT_MAX_LENGTH
        self._recipe = Recipe(Kind.SUPERVISED, min(max_length or context, context), rendering=rendering, lenient=True)

    def scores(
        self,
        answered: Sequence[tuple[Example, str]],
        check_stop: Callable[[], None] = lambda: None,
        ranks: Ranks | None = None,
    ) -> list[float]:
        """The reward of each answer to its example, minus `reward_mean`. The `ranks` share the work.

        NaN for an answer that the model's template cannot write.
        """
        examples = [
            replace(example, responses=(text,), desirable=True, raw=False, turns=(), number=k)
            for k, (example, text) in enumerate(answered)
        ]
        written = list(rows(examples, self._tokenizer, self._recipe, Tally()))
        rewards = _rewards(self._model, [row.prompt + row.responses[0].ids for row in written], check_stop, ranks)
        values, mean = [math.nan] * len(answered), self._model.config.reward_mean
        for row, reward in zip(written, rewards, strict=True):
            values[row.number] = reward - mean
        return values

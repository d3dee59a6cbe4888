"""Base models whose stored weights are already quantised: which jobs can train on them."""

TRAINABLE = {"bnb-4bit": "nf4", "bnb-8bit": "int8"}
"""The methods whose models can be trained on, with the job's `quantization` for each. The weights are not converted."""


def refusal(name: str, method: str, *, quantization: str, full: bool, rewards: bool) -> tuple[str, str] | None:
    """Return (param, message) if a job cannot train on the base `name`, quantised by `method`, else None."""
    if method not in TRAINABLE:
        message = (
            f"'{name}' is already quantised ({method}), which cannot be trained here. Train on the original model: "
            "'quantization': 'nf4' makes it about as small."
        )
        return "model", message
    if full:
        return "adapter", f"'{name}' is already quantised ({method}): only an adapter can be trained on it."
    if rewards:
        message = f"'{name}' is already quantised ({method}), and a reward model is merged: use the original model."
        return "model", message
    if quantization != TRAINABLE[method]:
        message = (
            f"'{name}' is already quantised ({method}): set 'quantization': '{TRAINABLE[method]}', as its weights are."
        )
        return "quantization", message
    return None

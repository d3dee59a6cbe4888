"""Base models whose weights are quantised on the disk already: what can be trained on them."""

OWN = {"bnb-4bit": "nf4", "bnb-8bit": "int8"}
"""Those that can be trained on, with the name that a job has for their quantisation. They stay as they are."""


def refusal(name: str, method: str, *, quantization: str, full: bool, rewards: bool) -> tuple[str, str] | None:
    """(param, message) where a job cannot train on the base `name`, quantised by `method`; None where it can."""
    if method not in OWN:
        message = (
            f"'{name}' is quantised already ({method}), which cannot be trained here. Train on the model that it was "
            "made from: 'quantization': 'nf4' makes that as small."
        )
        return "model", message
    if full:
        return "adapter", f"'{name}' is quantised already ({method}): an adapter is all that can be trained on it."
    if rewards:
        message = f"'{name}' is quantised already ({method}), and a reward model is merged: train on the original."
        return "model", message
    if quantization != OWN[method]:
        message = f"'{name}' is quantised already ({method}): 'quantization': '{OWN[method]}' keeps it as it is."
        return "quantization", message
    return None

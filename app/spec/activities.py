"""The activities of a training apart from optimizer steps."""

from typing import Literal

Activity = Literal["fetching", "placing", "tokenizing", "loading", "reference", "validating", "saving"]
"""Fetch the model and the files, get machines of a cluster and send the files there, tokenise the rows, load the model,
compute the reference log-probs, validate, save."""

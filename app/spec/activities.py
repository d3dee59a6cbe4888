"""The activities of a training apart from optimizer steps."""

from typing import Literal

Activity = Literal["fetching", "tokenizing", "loading", "reference", "validating", "saving"]
"""Fetch the model and the files, tokenise the rows, load the model, compute the reference log-probs, validate, save."""

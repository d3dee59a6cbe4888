"""The measurement of this engine on a GPU, beside TRL, in one call of a few minutes."""

"""What a GPU does with this engine, beside TRL, in one call of a few minutes."""

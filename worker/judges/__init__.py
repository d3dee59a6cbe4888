"""Judges that are asked which of two answers is better."""

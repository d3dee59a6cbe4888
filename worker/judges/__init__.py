"""Judges that are asked which of two answers is better: their questions, verdicts and endpoints."""

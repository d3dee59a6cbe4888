"""Evaluations: whether a model is better."""

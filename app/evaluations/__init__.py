"""Evaluations: they measure whether a model is better."""

"""Objectives: pure functions from log-probabilities to losses, each with its paper and equation."""

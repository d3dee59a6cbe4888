"""Sweeps: one training for each point of a grid, and which of them is best."""

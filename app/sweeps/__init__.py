"""Sweeps: one training for each point of a grid, and a comparison of them."""

"""Estimates of a job's tokens, steps, memory and time before it runs."""

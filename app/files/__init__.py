"""Uploaded files: datasets, and the result files of jobs."""

"""Pipelines: jobs, evaluations and labellings whose inputs are outputs of others, in rounds."""

"""Projects: they own files, jobs, models and keys, and have limits."""

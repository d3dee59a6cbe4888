"""All that a user may ask for, as pure values: specs of jobs, evaluations and sweeps, losses, gates, datasets.

This package imports no database, HTTP or torch. The trainer imports this package and nothing else of `app`.
"""

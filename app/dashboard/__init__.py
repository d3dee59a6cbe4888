"""Read-only web pages: jobs, evaluations, sweeps, and reports of their data."""

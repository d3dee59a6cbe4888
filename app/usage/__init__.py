"""Usage: what each project has used in each month."""

"""A read-only page for people: jobs, their curves and events, and what is in their data."""

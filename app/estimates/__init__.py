"""Know before you run: tokens, steps, memory and time of a job, with nothing run."""

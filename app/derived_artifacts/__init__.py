"""Work of the CPU lane that is not a job's: dataset reports and merged models."""

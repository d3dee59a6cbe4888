"""Workers as the API sees them: which are running, on which device, and which base models they serve."""

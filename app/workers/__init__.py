"""Workers as the API sees them: who is there, on what device, and what it can do."""

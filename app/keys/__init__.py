"""API keys: who may call the service, and whose data a call reaches."""

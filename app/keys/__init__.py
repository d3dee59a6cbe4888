"""API keys: who may call, and on whose data."""

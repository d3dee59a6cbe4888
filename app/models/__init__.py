"""Base models that workers registered, and models that jobs made."""

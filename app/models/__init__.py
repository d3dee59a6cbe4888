"""Models: base models that workers registered, and models that jobs trained."""

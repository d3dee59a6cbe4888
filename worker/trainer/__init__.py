"""The engine: a folder in, events out, a folder left. No database, no HTTP, no Celery."""

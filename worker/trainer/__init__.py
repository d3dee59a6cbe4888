"""The training engine: it reads a work folder, writes events, and leaves its results in the folder.

It uses no database, no HTTP and no Celery.
"""

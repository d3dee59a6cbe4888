"""Uploads of large files in parts, which a client may send in parallel."""

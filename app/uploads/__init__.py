"""Uploads in parts: large files, sent as pieces that may travel at once."""

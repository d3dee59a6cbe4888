"""Datasets as pure functions: read records, detect their format, turn them into examples, report what is wrong.

Files are streamed: memory use does not grow with the file.
"""

"""Datasets as pure functions: read records, detect their format, normalise them to examples, report what is wrong.

Everything streams; memory does not grow with the file.
"""

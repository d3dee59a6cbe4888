"""Dataset reports: the contents of a file, checked before any job."""

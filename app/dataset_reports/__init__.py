"""Dataset reports: what a file holds, before any job."""

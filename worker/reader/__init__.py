"""The reader: whatever users have uploaded is read in a process of its own, with limits on memory and time.

A file can be made so that it takes all memory or an hour. Then one check ends with a clear report, and not a worker.
"""

NO_MEMORY = 3
"""The exit status of a task that needs more memory than it may have."""

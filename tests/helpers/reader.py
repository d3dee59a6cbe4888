"""One reader for all tests of a process: its libraries take a second to load."""

import atexit

from worker.reader.client import Reader

READER = Reader()
atexit.register(READER.close)

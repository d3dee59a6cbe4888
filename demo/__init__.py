"""`make demo`: the whole path, on generated data whose true preference is known."""

import logging
import os

# Before the libraries are imported: their progress bars and their advice are not the demo's.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

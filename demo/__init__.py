"""`make demo`: the whole path on a world whose true preference is known."""

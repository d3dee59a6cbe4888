"""`make demo`: the whole path, on generated data whose true preference is known."""

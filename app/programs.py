"""The commands that start programs of this package."""

import sys


def command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of this package, wherever the caller stands.

    Without `-P`, Python looks for modules in the caller's folder first. A folder `app` of a user's repository would
    then be taken for this package, and its code would run.
    """
    return [sys.executable, "-P", "-m", module, *arguments]

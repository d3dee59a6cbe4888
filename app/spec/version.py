"""The version of the specs, which tells a worker whether it knows all that a job asks for.

In a rolling upgrade, a new API creates jobs while old workers still run. An old worker leaves a job of a later version
to a new worker. It would ignore the settings that it does not know, and train something else.
"""

SPEC_VERSION = 7
"""Raise it with each change of a spec that a worker of the version before would not obey."""

"""Types of parsed JSON."""

from typing import Any

JsonObject = dict[str, Any]
"""A JSON object: its keys are strings, and its values are of any JSON type."""

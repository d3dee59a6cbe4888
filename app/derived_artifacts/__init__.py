"""Derived artifacts: dataset reports and merged models, which CPU workers make on request."""

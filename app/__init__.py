"""The HTTP service. It never imports torch, nor the `worker` package."""

__version__ = "0.1.0"

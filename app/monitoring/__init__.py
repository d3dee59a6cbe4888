"""Monitoring: metrics for Prometheus, health checks and request ids."""

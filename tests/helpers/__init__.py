"""Helpers that several test modules share: servers, services, tiny models, rows. No test module imports another."""

"""What several test modules use: servers, services, tiny models, rows. No test module imports another."""

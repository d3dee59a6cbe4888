"""Webhooks: events of jobs and evaluations, sent to the endpoints of their project (Standard Webhooks)."""

"""Idempotency: a request that is sent again makes nothing twice."""

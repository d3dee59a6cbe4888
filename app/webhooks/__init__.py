"""Webhooks: a job that ends is told to those who asked for it (Standard Webhooks)."""

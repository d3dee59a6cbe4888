"""Requests that are sent again make nothing twice."""

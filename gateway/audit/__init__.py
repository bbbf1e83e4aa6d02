"""Requests that are known to leak, and what an endpoint answers to them."""

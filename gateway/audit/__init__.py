"""Requests that leak on some servers, and the answers of an endpoint to them."""

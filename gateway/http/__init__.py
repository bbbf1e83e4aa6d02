"""The HTTP side of the gateway: requests, answers and the page."""

"""Speed and memory, each side by side with the plain way."""

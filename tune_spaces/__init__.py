"""Search spaces as data: what may vary, within which bounds, and why these."""

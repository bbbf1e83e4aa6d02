"""The embedded benchmark: fixed word problems and a family of tiny checkpoints."""

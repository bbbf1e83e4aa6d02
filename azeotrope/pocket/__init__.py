"""The embedded default: a frozen word-problem benchmark and a family of tiny checkpoints."""

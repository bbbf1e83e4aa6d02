"""From an engine's tokens to an answer: text, hidden reasoning, stop strings."""

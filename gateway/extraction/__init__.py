"""Signs that a caller extracts the model."""

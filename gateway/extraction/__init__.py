"""Signs that a customer's requests extract the model."""

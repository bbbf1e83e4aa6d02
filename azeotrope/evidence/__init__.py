"""Whose text and whose student: attribution of texts to keys."""

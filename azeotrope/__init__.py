"""Azeotrope: make a language model's outputs useful to read and poor to distil."""

__version__ = "0.1.0"

"""Defenses: one module each; `base.py` says what a module must have."""

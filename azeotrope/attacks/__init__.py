"""Attacks: what a thief does with what was observed; one module each."""

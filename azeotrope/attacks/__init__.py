"""Attacks: how an attacker trains a student on observed texts or logits; one module each."""

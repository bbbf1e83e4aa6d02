"""Proxies: models that stand for the attacker's student while the teacher writes."""

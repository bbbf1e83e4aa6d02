"""Clean-ups: what an attacker does to observed texts before training on them; one module each."""

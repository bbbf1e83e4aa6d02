"""The machinery of a run: settings, stages, steps, preflight, results."""

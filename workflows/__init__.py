"""Recipes: one file is one thing a user runs."""

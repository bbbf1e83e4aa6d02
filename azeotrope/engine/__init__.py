"""Serving one model: the protocol, the transformers engine, its row batch, defense variants."""

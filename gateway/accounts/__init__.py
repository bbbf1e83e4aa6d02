"""The customers of a gateway: API keys, quotas and the ledger."""

"""Who calls: API keys, quotas and the ledger."""

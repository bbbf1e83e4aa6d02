"""Mathematics on next-token distributions."""

"""What stands between an engine and the outside: requests in, answers out, and nothing else."""

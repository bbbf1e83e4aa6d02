"""The service between an engine and its clients: it checks requests, answers and bills them."""

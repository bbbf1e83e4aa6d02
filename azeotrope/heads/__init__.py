"""The output head: chunked losses, stored features, folding, surrogates, search, export."""

"""Images, pairs, prompts: everything that is read from or written to disk as training data."""

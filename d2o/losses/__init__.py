"""Floor 1: pure functions of tensors, each with its equation."""

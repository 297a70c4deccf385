"""The one loop that trains every method, its EMA, checkpoints, precision and logs."""

"""Networks that judge samples."""

"""Floor 2: networks that judge samples."""

"""Floor 3: feature extractors, distances and the protocols under which they are measured."""

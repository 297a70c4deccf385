"""One file for each family of feature extractors: how its images are prepared and its weights are read."""

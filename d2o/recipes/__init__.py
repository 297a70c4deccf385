"""What a run is: the typed schema of a recipe, loading, planning."""

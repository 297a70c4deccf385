"""What is measured, of what, and how: subjects, passes, probes, protocols and presets, references, statistics."""

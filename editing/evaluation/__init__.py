"""Measure what edits do to a model: benchmarks of concept editing, and the methods that they compare."""

"""The two-stream walk through the blocks of a model."""

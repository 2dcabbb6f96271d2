"""The stages of a compression."""

"""The stages of a compression, each of which returns values."""

"""The low-rank linear on GPUs. Importing this package does not import Triton; ``linear`` does."""

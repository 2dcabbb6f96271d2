"""The training loop, and the divergence from the teacher as its loss."""

"""The training loop, and the loss towards the teacher's logits."""

"""What methods know of inputs and gradients, and the linear algebra on it."""

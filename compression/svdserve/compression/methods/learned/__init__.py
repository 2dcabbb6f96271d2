"""Methods that learn which components stay, over the whole model."""

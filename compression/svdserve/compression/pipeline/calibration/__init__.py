"""The tokens that a model is calibrated on, and where they come from."""

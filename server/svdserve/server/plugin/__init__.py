"""What runs inside vLLM: the entry point, the loader and the layers."""

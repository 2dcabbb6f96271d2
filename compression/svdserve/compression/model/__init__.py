"""Hugging Face models block by block, and the plug-in with which transformers loads checkpoints."""

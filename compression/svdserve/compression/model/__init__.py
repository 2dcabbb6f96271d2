"""A Hugging Face model, block by block, and the plug-in by which transformers loads ours."""

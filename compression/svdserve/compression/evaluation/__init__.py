"""What a compressed model is worth: perplexity, tasks, comparison, inspection."""

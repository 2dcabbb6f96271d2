"""Evaluation of compressed models: perplexity, tasks, comparison, inspection."""
